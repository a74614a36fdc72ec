"""`Selection` and `PackPlan` against the plainest reference there is: Python lists and dense matrices."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc.core.packing import PackPlan
from vtc.core.selection import Selection
from vtc.errors import ConfigError, InputError

quick = settings(max_examples=80, deadline=None)


@st.composite
def selection_of(draw: st.DrawFn, n: int, kinds: tuple[str, ...] = ("plain", "mean", "weighted")) -> Selection:
    """Any legal selection from n tokens: plain, or merging by means or weights into up to three slots per token."""
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    keep = [i for i in range(n) if mask[i]]
    kind, width = draw(st.sampled_from(kinds)), draw(st.integers(1, 3)) if n else 1
    if kind == "plain":
        return Selection(n, torch.tensor(keep, dtype=torch.long))
    rows = []
    for i in range(n):
        own = [keep.index(i)] if mask[i] else []
        others = [slot for slot in range(len(keep)) if slot not in own]
        size = draw(st.integers(0, min(width - len(own), len(others))))
        slots = [*own, *draw(st.permutations(others))[:size]]
        rows.append(draw(st.permutations([*slots, *[-1] * (width - len(slots))])))
    assign = torch.tensor(rows, dtype=torch.long).view(n, width)
    floats = st.floats(-2, 2, width=32)
    weight = draw(st.lists(floats, min_size=n * width, max_size=n * width)) if kind == "weighted" else None
    shape = (n,) if width == 1 else (n, width)
    return Selection(
        n,
        torch.tensor(keep, dtype=torch.long),
        assign.view(shape),
        None if weight is None else torch.tensor(weight, dtype=torch.float32).view(shape),
    )


selections = st.integers(0, 9).flatmap(selection_of)
chains = (
    st.integers(0, 9)
    .flatmap(selection_of)
    .flatmap(lambda a: selection_of(a.k).flatmap(lambda b: selection_of(b.k).map(lambda c: (a, b, c))))
)


def matrix(selection: Selection) -> torch.Tensor:
    """(K, N) float64: the linear map that `merge` is, written entry by entry."""
    dense = torch.zeros(selection.k, selection.n, dtype=torch.float64)
    if selection.assign is None:
        for slot, token in enumerate(selection.keep.tolist()):
            dense[slot, token] = 1
        return dense
    assign = selection.assign.view(selection.n, -1).tolist() if selection.n else []
    members = [slot for slots in assign for slot in slots]
    for token, slots in enumerate(assign):
        for place, slot in enumerate(slots):
            if slot >= 0:
                weight = None if selection.weight is None else selection.weight[token].view(-1)[place]
                dense[slot, token] = 1 / members.count(slot) if weight is None else weight
    return dense


def values(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


# --- Selection -------------------------------------------------------------------------------------------------------
@quick
@given(selections)
def test_merge_is_its_matrix_and_so_is_its_gradient(selection: Selection) -> None:
    x, c = values(selection.n, 2, 3).requires_grad_(), values(selection.k, 2, 3)
    merged = selection.merge(x)
    dense = matrix(selection)
    torch.testing.assert_close(merged, torch.einsum("kn,nab->kab", dense, x), rtol=1e-6, atol=1e-6)
    if merged.numel():
        (gradient,) = torch.autograd.grad((merged * c).sum(), x)
        torch.testing.assert_close(gradient, torch.einsum("kn,kab->nab", dense, c), rtol=1e-6, atol=1e-6)


@quick
@given(st.integers(0, 9).flatmap(lambda n: selection_of(n, ("mean",))))
def test_mean_merging_keeps_mass(selection: Selection) -> None:
    assert selection.assign is not None
    x = values(selection.n, 3)
    total = (selection.sizes[:, None] * selection.merge(x)).sum(0)
    times = (selection.assign.view(selection.n, -1) >= 0).sum(1) if selection.n else torch.zeros(0)
    torch.testing.assert_close(total, (times[:, None] * x).sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix(selection).sum(1), torch.ones(selection.k, dtype=torch.float64))


@quick
@given(selections)
def test_derived_views_agree(selection: Selection) -> None:
    mask = selection.mask
    assert mask.nonzero().squeeze(1).tolist() == selection.keep.tolist()
    assert selection.ratio == (selection.k / selection.n if selection.n else 1.0)
    assert int(selection.sizes.sum()) == (
        selection.k if selection.assign is None else int((selection.assign >= 0).sum())
    )
    y = values(selection.k, 2)
    spread = selection.unmerge(y)
    assert torch.equal(spread[selection.keep], y)
    dense, slots = matrix(Selection(selection.n, selection.keep, selection.assign)), selection.slots
    flows = slots >= 0
    assert torch.equal(flows, (dense != 0).any(dim=0)), "a token without a slot is one that was dropped"
    assert bool((spread[~flows] == 0).all())
    assert torch.equal(spread[flows], y[slots[flows]])
    assert bool((dense[slots[flows], flows.nonzero().squeeze(1)] != 0).all())


@quick
@given(chains)
def test_then_composes_and_is_associative(chain: tuple[Selection, Selection, Selection]) -> None:
    a, b, c = chain
    x = values(a.n, 2)
    torch.testing.assert_close(a.then(b).merge(x), b.merge(a.merge(x)), rtol=1e-5, atol=1e-5)
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.keep, right.keep)
    assert left.keep.tolist() == [a.keep.tolist()[b.keep.tolist()[i]] for i in c.keep.tolist()]
    assert (left.assign is None) == (right.assign is None)
    if left.assign is not None and right.assign is not None:
        assert torch.equal(left.sizes, right.sizes)
        if all(part.assign is None or part.assign.ndim == 1 for part in chain):
            assert torch.equal(left.assign, right.assign)
    torch.testing.assert_close(matrix(left), matrix(c) @ matrix(b) @ matrix(a), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix(left), matrix(right), rtol=1e-5, atol=1e-5)


@quick
@given(selections)
def test_json_round_trip_is_exact(selection: Selection) -> None:
    again = Selection.from_dict(json.loads(json.dumps(selection.to_dict())))
    assert again.n == selection.n
    for name in ("keep", "assign", "weight"):
        one, two = getattr(selection, name), getattr(again, name)
        assert (one is None) == (two is None)
        assert one is None or (one.dtype == two.dtype and torch.equal(one, two))


@quick
@given(st.lists(st.integers(0, 5).flatmap(selection_of), min_size=1, max_size=3))
def test_concatenate_is_the_block_diagonal_matrix(parts: list[Selection]) -> None:
    whole = Selection.concatenate(parts)
    assert whole.n == sum(part.n for part in parts)
    starts = [sum(part.n for part in parts[:place]) for place in range(len(parts))]
    assert whole.keep.tolist() == [start + i for start, part in zip(starts, parts, strict=True) for i in part.keep]
    assert (whole.assign is None) == all(part.assign is None for part in parts)
    expected = torch.block_diag(*map(matrix, parts))
    torch.testing.assert_close(matrix(whole), expected[: whole.k, : whole.n], rtol=1e-6, atol=1e-6)


def test_a_token_of_several_slots() -> None:
    # Tokens 0 and 2 stay; 1 is shared between them; 3 is dropped.
    assign = torch.tensor([[0, -1], [1, 0], [-1, 1], [-1, -1]])
    weight = torch.tensor([[1.0, 9.0], [0.25, 0.75], [9.0, 1.0], [9.0, 9.0]])
    shared = Selection(4, torch.tensor([0, 2]), assign, weight)
    assert shared.merge(torch.eye(4)).tolist() == [[1.0, 0.75, 0.0, 0.0], [0.0, 0.25, 1.0, 0.0]]
    assert (shared.sizes.tolist(), shared.slots.tolist()) == ([2, 2], [0, 1, 1, -1])
    joined = shared.then(Selection(2, torch.tensor([0]), torch.tensor([0, 0]), torch.tensor([1.0, 1.0])))
    assert joined.merge(torch.eye(4)).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert joined.sizes.tolist() == [3], "both shares of token 1 come to the same slot: it counts once"
    second = shared.then(Selection(2, torch.tensor([1])))
    assert second.slots.tolist() == [-1, 0, 0, -1]


@quick
@given(selections)
def test_identity_is_neutral(selection: Selection) -> None:
    for same in (Selection.full(selection.n).then(selection), selection.then(Selection.full(selection.k))):
        assert torch.equal(same.keep, selection.keep)
        torch.testing.assert_close(matrix(same), matrix(selection), rtol=1e-6, atol=1e-6)


def test_plain_merge_is_bit_identical_indexing_of_any_dtype() -> None:
    selection = Selection.from_indices(6, torch.tensor([4, 0, 3]))
    assert selection.keep.tolist() == [0, 3, 4]
    for x in (torch.randn(6, 2, dtype=torch.bfloat16), torch.arange(6), torch.rand(6) > 0.5):
        assert torch.equal(selection.merge(x), x[[0, 3, 4]])
        assert selection.merge(x).dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_in_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    n = 3001  # a running sum in half precision stops growing long before this
    selection = Selection(n, torch.tensor([0]), torch.zeros(n, dtype=torch.long))
    x = (torch.rand(n, 8) + 1).to(dtype)
    assert torch.equal(selection.merge(x)[0], selection.merge(x.double())[0].to(dtype))


def test_merge_refuses_to_average_integers() -> None:
    selection = Selection(2, torch.tensor([0]), torch.tensor([0, 0]))
    with pytest.raises(InputError, match="averages"):
        selection.merge(torch.arange(2))


def test_grid_mask_cuts_the_mask_into_views() -> None:
    selection = Selection(10, torch.tensor([0, 5, 6, 9]))
    first, second = selection.grid_mask([(1, 2, 3), (2, 1, 2)])
    assert first.tolist() == [[[True, False, False], [False, False, True]]]
    assert second.tolist() == [[[True, False]], [[False, True]]]
    with pytest.raises(InputError, match="hold 6 tokens, but the selection was made from 10"):
        selection.grid_mask([(1, 2, 3)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, [2, 1]), "ascending, unique"),
        ((4, [1, 1]), "ascending, unique"),
        ((4, [-1, 1]), r"within 0\.\.3"),
        ((4, [1, 4]), r"within 0\.\.3"),
        ((4, [[1]]), r"must be \(K,\) long"),
        ((4, [0.0, 1.0]), r"must be \(K,\) long"),
        ((4, [0, 1], [0, 1, 0]), r"assign must be \(4,\) or \(4, A\) long"),
        ((1, [], [[[-1]]]), r"assign must be \(1,\) or \(1, A\) long"),
        ((1, [], [[]]), r"assign must be \(1,\) or \(1, A\) long"),
        ((4, [0, 1], [0, 1, 2, 0]), r"slots 0\.\.1 or -1"),
        ((4, [0, 1], [0, 1, -2, 0]), r"slots 0\.\.1 or -1"),
        ((4, [0, 1], [1, 0, 0, 0]), "every kept token to its own slot"),
        ((4, [0, 1], [0, -1, 1, 0]), "every kept token to its own slot"),
        ((2, [0], [[-1, -1], [0, -1]]), "every kept token to its own slot"),
        ((2, [0], [[0, -1], [0, 0]]), "no token to one slot twice"),
        ((2, [0], None, [1.0, 1.0]), "needs assign"),
        ((2, [0], [[0, -1], [0, -1]], [1.0, 1.0]), r"weight must be \(2, 2\) float"),
        ((2, [0], [0, 0], [1.0]), r"weight must be \(2,\) float"),
        ((2, [0], [0, 0], [1, 1]), r"weight must be \(2,\) float"),
        ((2, [0], [0, 0], [1.0, float("nan")]), "NaN"),
    ],
)
def test_construction_is_validated(arguments: tuple[object, ...], message: str) -> None:
    n, *tensors = arguments
    given = [None if x is None else torch.tensor(x, dtype=None if x else torch.long) for x in tensors]  # type: ignore
    with pytest.raises(InputError, match=message):
        Selection(n, *given)  # type: ignore[arg-type]


def test_shape_errors() -> None:
    selection = Selection(4, torch.tensor([1, 2]))
    with pytest.raises(InputError, match="merge expects 4"):
        selection.merge(torch.randn(3, 2))
    with pytest.raises(InputError, match="unmerge expects 2"):
        selection.unmerge(torch.randn(4, 2))
    with pytest.raises(InputError, match="made from 4 tokens, but the first leaves 2"):
        selection.then(selection)


# --- PackPlan --------------------------------------------------------------------------------------------------------
keeps = st.tuples(st.integers(1, 4), st.integers(1, 8)).flatmap(
    lambda shape: st.lists(
        st.one_of(
            st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]),
            st.sampled_from([[True] * shape[1], [False] * shape[1]]),
        ),
        min_size=shape[0],
        max_size=shape[0],
    ).map(torch.tensor)
)
sides = st.sampled_from(["left", "right"])


@quick
@given(keeps, sides)
def test_packing_is_list_filtering(keep: torch.Tensor, side: str) -> None:
    rows, length = keep.shape
    plan = PackPlan.from_keep(keep, side)
    kept = [[column for column in range(length) if keep[row, column]] for row in range(rows)]
    width = max(map(len, kept))
    assert plan.index.shape == plan.mask.shape == (rows, width)
    assert (plan.source_length, plan.side) == (length, side)
    assert plan.lengths.tolist() == list(map(len, kept))
    for row in range(rows):
        packed = plan.index[row].tolist()
        assert [column for column, valid in zip(packed, plan.mask[row].tolist(), strict=True) if valid] == kept[row]
        assert len(set(packed)) == width
        padding = width - len(kept[row])
        flags = [False] * padding + [True] * len(kept[row])
        assert plan.mask[row].tolist() == (flags if side == "left" else flags[::-1])


@quick
@given(keeps, sides)
def test_take_and_scatter_undo_each_other(keep: torch.Tensor, side: str) -> None:
    rows, length = keep.shape
    plan = PackPlan.from_keep(keep, side)
    for shape in ((rows, length), (rows, length, 3), (rows, length, 2, 2)):
        x = torch.randn(shape)
        expanded = keep.view(rows, length, *[1] * (x.ndim - 2))
        assert torch.equal(plan.scatter(plan.take(x)), torch.where(expanded, x, 0.0))
        y = torch.randn(*plan.index.shape, *shape[2:])
        valid = plan.mask.view(*plan.mask.shape, *[1] * (x.ndim - 2))
        assert torch.equal(torch.where(valid, plan.take(plan.scatter(y)), 0.0), torch.where(valid, y, 0.0))


@quick
@given(keeps, sides)
def test_take_of_position_ids_and_of_shared_tensors(keep: torch.Tensor, side: str) -> None:
    rows, length = keep.shape
    plan = PackPlan.from_keep(keep, side)
    ids = torch.randint(0, 99, (3, rows, length))
    assert torch.equal(plan.take(ids, dim=2), torch.stack([plan.take(axis) for axis in ids]))
    shared = torch.randint(0, 99, (3, 1, length))
    assert torch.equal(plan.take(shared, dim=2), plan.take(shared.expand(3, rows, length), dim=2))
    table = torch.randn(1, length, 2)
    assert torch.equal(plan.take(table), plan.take(table.expand(rows, length, 2)))


@quick
@given(keeps, sides)
def test_gradients_equal_those_of_masking(keep: torch.Tensor, side: str) -> None:
    rows, length = keep.shape
    plan = PackPlan.from_keep(keep, side)
    coefficient = torch.randn(rows, length, 2, dtype=torch.float64)
    x = torch.randn(rows, length, 2, dtype=torch.float64, requires_grad=True)

    packed = (plan.take(x).sin() * plan.take(coefficient) * plan.mask[..., None]).sum()
    masked = (x.sin() * coefficient * keep[..., None]).sum()
    torch.testing.assert_close(packed, masked)
    assert torch.equal(torch.autograd.grad(packed, x)[0], torch.autograd.grad(masked, x)[0])

    y = torch.randn(*plan.index.shape, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((plan.scatter(y) * coefficient).sum(), y)
    assert torch.equal(gradient, plan.take(coefficient) * plan.mask[..., None])


def test_a_row_packs_alone_as_it_does_in_a_batch() -> None:
    keep = torch.rand(5, 12) > 0.4
    x = torch.randn(5, 12, 2)
    plan = PackPlan.from_keep(keep)
    for row in range(5):
        alone = PackPlan.from_keep(keep[row : row + 1])
        width = int(plan.lengths[row])
        assert torch.equal(plan.take(x)[row, plan.index.shape[1] - width :], alone.take(x[row : row + 1])[0])


def test_plan_errors() -> None:
    with pytest.raises(ConfigError, match='side must be "left" or "right", got \'up\''):
        PackPlan.from_keep(torch.ones(1, 2, dtype=torch.bool), "up")
    for bad in (torch.ones(2, 2), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"keep must be \(B, L\) bool"):
            PackPlan.from_keep(bad)
    plan = PackPlan.from_keep(torch.tensor([[True, False, True], [True, True, True]]))
    for shape, dim in [((3, 3), 1), ((2, 4), 1), ((3, 2, 3), 1), ((2, 3), 0), ((2, 3), 2), ((3, 3, 3), 2)]:
        with pytest.raises(InputError, match="Cannot pack"):
            plan.take(torch.zeros(shape), dim)
    with pytest.raises(InputError, match="Cannot scatter"):
        plan.scatter(torch.zeros(2, 2))


def test_from_entries() -> None:
    token, slot = torch.tensor([1, 3, 0, 1]), torch.tensor([0, 1, 0, 1])
    selection = Selection.from_entries(4, torch.tensor([1, 3]), token, slot, torch.tensor([1.0, 1.0, 0.5, 0.25]))
    x = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert selection.merge(x).tolist() == [10.5, 1002.5]
    assert selection.slots.tolist() == [0, 0, -1, 1]


def test_new_features_stand_in_the_slots() -> None:
    new = torch.randn(2, 3)
    selection = Selection(5, torch.tensor([1, 4]), features=new)
    x = torch.randn(5, 3)
    assert torch.equal(selection.tokens(x), new)
    assert torch.equal(selection.merge(x), x[[1, 4]]), "other values are those of the places"
    assert torch.equal(Selection.full(5).tokens(x), x)
    assert selection.tokens(x.double()).dtype == torch.float64
    assert selection.without_features().features is None
    again = Selection.from_dict(json.loads(json.dumps(selection.to_dict())))
    assert torch.equal(again.features, new)


def test_new_features_compose() -> None:
    new, newer = torch.randn(2, 3), torch.randn(1, 3)
    selection = Selection(5, torch.tensor([1, 4]), features=new)
    one = Selection(2, torch.tensor([1]))
    assert torch.equal(selection.then(one).features, new[1:])
    assert selection.then(one).keep.tolist() == [4]
    mean = Selection(2, torch.tensor([0]), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(selection.then(mean).features, new.mean(dim=0, keepdim=True))
    assert torch.equal(selection.then(Selection(2, torch.tensor([0]), features=newer)).features, newer)
    assert torch.equal(
        Selection(3, torch.tensor([0, 2])).then(Selection(2, torch.tensor([1]), features=newer)).features, newer
    )
    joined = Selection.concatenate([selection, selection])
    assert joined.keep.tolist() == [1, 4, 6, 9]
    assert torch.equal(joined.features, torch.cat([new, new]))


def test_new_features_are_checked() -> None:
    keep = torch.tensor([1, 4])
    with pytest.raises(InputError, match=r"features must be \(2, D\) float"):
        Selection(5, keep, features=torch.randn(3, 3))
    with pytest.raises(InputError, match="NaN or infinite"):
        Selection(5, keep, features=torch.full((2, 3), torch.inf))
    with pytest.raises(InputError, match="no assign"):
        Selection(5, keep, torch.tensor([-1, 0, -1, -1, 1]), features=torch.randn(2, 3))
    with pytest.raises(InputError, match="3 wide, what they replace 7"):
        Selection(5, keep, features=torch.randn(2, 3)).tokens(torch.randn(5, 7))
    with pytest.raises(InputError, match="1 of 2 selections bring new features"):
        Selection.concatenate([Selection(5, keep, features=torch.randn(2, 3)), Selection.full(2)])


def test_best_takes_the_lower_of_equals_in_ascending_order() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, -torch.inf])
    assert Selection.best(scores, 2).keep.tolist() == [1, 2]
    assert Selection.best(scores, 9).keep.tolist() == [0, 1, 2, 3, 4]
    best = Selection.best(scores, 3)
    assert (best.n, best.assign, best.merge(torch.arange(5.0)[:, None])[:, 0].tolist()) == (5, None, [1, 2, 3])
    assert Selection.best(torch.empty(0), 3).keep.tolist() == []


def test_best_refuses_nan() -> None:
    with pytest.raises(InputError, match="Of 3 scores, 1 are NaN"):
        Selection.best(torch.tensor([1.0, torch.nan, torch.inf]), 1)
