"""What is particular to each of the first methods."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.selectors.inputs import make_context
from vtc.core.signals import ClsAttention, ReceivedAttention
from vtc.core.stage import ModelShape
from vtc.errors import ConfigError, InputError
from vtc.functional import select
from vtc.kernels import farthest_point, topk_indices
from vtc.registry import get_selector


# --- kernels ---------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.integers(0, 45))
def test_topk_is_the_front_of_the_stable_order(values: list[int], k: int) -> None:
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    assert topk_indices(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


def farthest_point_by_hand(x: torch.Tensor, k: int, first: int | None) -> list[int]:
    """The definition, over the whole distance matrix, in float64."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    distance = 1 - unit @ unit.T
    n = len(x)
    if first is None:
        nearest = [min((distance[i, j].item() for j in range(n) if j != i), default=0.0) for i in range(n)]
        first = max(range(n), key=nearest.__getitem__)
    picks = [first]
    while len(picks) < min(k, n):
        rest = [i for i in range(n) if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i, j].item() for j in picks)))
    return picks


@pytest.mark.parametrize("first", [None, 3])
@pytest.mark.parametrize(("n", "d", "k"), [(1, 4, 1), (2, 3, 2), (30, 8, 11), (30, 8, 30), (30, 8, 99)])
def test_farthest_point_is_its_definition(n: int, d: int, k: int, first: int | None) -> None:
    if first is not None and first >= n:
        first = 0
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    assert farthest_point(x, k, first).tolist() == farthest_point_by_hand(x, k, first)


def test_farthest_point_of_nothing_and_of_zeros() -> None:
    assert farthest_point(torch.randn(5, 3), 0).tolist() == []
    assert farthest_point(torch.zeros(4, 3), 3).tolist() == [0, 1, 2]
    mixed = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1]])
    assert farthest_point(mixed, 2).tolist()[0] == 1, "the zero row is at distance 1 from every other"


# --- random ----------------------------------------------------------------------------------------------------------
def test_random_depends_on_the_seed_and_covers_everything() -> None:
    kept = [tuple(select("random", grid_thw=(1, 6, 6), keep_tokens=9, seed=seed).keep.tolist()) for seed in range(40)]
    assert len(set(kept)) == 40
    assert {token for keep in kept for token in keep} == set(range(36))


# --- uniform ---------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(1, 6), st.integers(1, 14), st.integers(1, 14)), st.integers(0, 10**6))
def test_uniform_spreads_over_time_rows_and_columns(grid: tuple[int, int, int], draw: int) -> None:
    t, h, w = grid
    n = math.prod(grid)
    k = draw % n + 1
    selector = get_selector("uniform")
    context = make_context(selector, k, (grid,))
    selection = selector.select(context)
    assert selection.k == k
    _, frame, row, column = context.coords()[selection.keep].unbind(1)
    frames = torch.bincount(frame, minlength=t)
    assert frames.max() - frames.min() <= 1
    busiest = int(frames.max())
    # No axis is seen in fewer places than a square lattice of that many tokens would see, but for rounding.
    assert len(row.unique()) >= min(h, busiest, math.floor(math.sqrt(busiest * h / w) - 0.5))
    assert len(column.unique()) >= min(w, busiest, math.floor(math.sqrt(busiest * w / h) - 1))


@pytest.mark.parametrize("k", [16, 29, 36, 64, 100, 144, 288])
def test_uniform_covers_better_than_random_and_sees_every_column(k: int) -> None:
    places = torch.cartesian_prod(torch.arange(24), torch.arange(24)).double()

    def mean_distance(keep: torch.Tensor) -> float:
        return torch.cdist(places, places[keep]).min(dim=1).values.mean().item()

    uniform = select("uniform", grid_thw=(1, 24, 24), keep_tokens=k).keep
    rivals = [mean_distance(select("random", grid_thw=(1, 24, 24), keep_tokens=k, seed=s).keep) for s in range(10)]
    assert mean_distance(uniform) < min(rivals)
    assert len((uniform % 24).unique()) >= min(24, k)


def test_uniform_video_looks_at_other_places_in_other_frames() -> None:
    for grids in [(8, 6, 6), [(1, 6, 6)] * 8]:
        keep = select("uniform", grid_thw=grids, keep_tokens=16).keep
        assert torch.bincount(keep // 36).tolist() == [2] * 8
        assert len((keep % 36).unique()) >= 12


def test_uniform_views_share_by_largest_remainder() -> None:
    keep = select("uniform", grid_thw=[(1, 4, 4), (1, 2, 4), (1, 1, 4)], keep_tokens=10).keep  # 5.71, 2.86, 1.43
    assert [int(((keep >= a) & (keep < b)).sum()) for a, b in [(0, 16), (16, 24), (24, 28)]] == [6, 3, 1]


# --- pool ------------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 10**6))
def test_pool_cuts_frames_into_rectangles_of_nearly_equal_size(grid: tuple[int, int, int], draw: int) -> None:
    t, h, w = grid
    n = math.prod(grid)
    k = draw % n + 1
    selector = get_selector("pool")
    context = make_context(selector, k, (grid,))
    selection = selector.select(context)
    assert selection.k == k
    if k == n:
        return
    assert selection.assign is not None
    assert bool((selection.assign >= 0).all()), "no token is dropped"
    coords = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).reshape(n, 3)
    for slot in range(k):
        cell = coords[selection.assign == slot]
        spans = (cell.max(0).values - cell.min(0).values + 1).tolist()
        assert math.prod(spans) == len(cell), "a full rectangle"
        assert spans[0] == 1 or k < t, "frames are pooled one by one where there are tokens for all"
        assert selection.assign[selection.keep[slot]] == slot


def test_pool_of_a_square_is_average_pooling() -> None:
    x = torch.randn(36, 5)
    selection = select("pool", features=x, grid_thw=(1, 6, 6), keep_tokens=9)
    pooled = torch.nn.functional.avg_pool2d(x.T.reshape(1, 5, 6, 6), 2).flatten(2)[0].T
    torch.testing.assert_close(selection.merge(x), pooled)


# --- vtc-cls ---------------------------------------------------------------------------------------------------------
def test_vtc_cls_sums_layers_and_averages_heads() -> None:
    rows = torch.zeros(2, 2, 4)
    rows[0, 0, 1] = 0.4  # 0.2
    rows[1, :, 2] = 0.3  # 0.3
    rows[:, 1, 3] = 0.2  # 0.1 + 0.1
    context = make_context(get_selector("vtc-cls"), 2, ((1, 2, 2),))
    context.signals = {ClsAttention(): rows}
    selector = get_selector("vtc-cls")
    torch.testing.assert_close(selector.score(context), torch.tensor([0.0, 0.2, 0.3, 0.2]))  # type: ignore[attr-defined]
    assert selector.select(context).keep.tolist() == [1, 2], "1 and 3 tie: the lower index stays"


@pytest.mark.parametrize(
    ("start", "depth", "feature", "layers"),
    [(-8, 24, 22, range(16, 23)), (0, 4, 3, range(4)), (3, 4, 3, [3]), (-1, 4, 3, [3]), (-4, 4, 2, range(3))],
)
def test_vtc_cls_layers(start: int, depth: int, feature: int, layers: list[int]) -> None:
    (stage,) = get_selector("vtc-cls", start_layer=start).stages(ModelShape(32, depth, feature))
    assert stage.requires == (ClsAttention(tuple(layers)),)


@pytest.mark.parametrize(("start", "depth", "feature"), [(-8, 4, 2), (3, 4, 2), (-1, 4, 2), (24, 24, 22)])
def test_vtc_cls_layers_out_of_range(start: int, depth: int, feature: int) -> None:
    with pytest.raises(ConfigError, match=f"start_layer={start}.*must lie within"):
        get_selector("vtc-cls", start_layer=start).stages(ModelShape(32, depth, feature))


def test_vtc_cls_score_source_is_explicit() -> None:
    assert get_selector("vtc-cls").stages()[0].requires == (ClsAttention(),)
    assert get_selector("vtc-cls", score_source="received").stages()[0].requires == (ReceivedAttention(),)
    rows = torch.rand(2, 2, 6)
    with pytest.raises(ConfigError, match="vtc-cls needs cls_attention; got received_attention"):
        select("vtc-cls", received_attention=rows, keep_tokens=2)
    with pytest.raises(ConfigError, match="needs received_attention"):
        select("vtc-cls", cls_attention=rows, keep_tokens=2, score_source="received")
    received = select("vtc-cls", received_attention=rows, keep_tokens=2, score_source="received")
    assert received.keep.tolist() == select("vtc-cls", cls_attention=rows, keep_tokens=2).keep.tolist()


@pytest.mark.parametrize(
    "options", [{"start_layer": 1.5}, {"start_layer": True}, {"score_source": "cLs"}, {"score_source": None}]
)
def test_vtc_cls_invalid_options(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
        get_selector("vtc-cls", **options)


# --- fastv -----------------------------------------------------------------------------------------------------------
def test_fastv_reads_the_last_query() -> None:
    rows = torch.zeros(2, 3, 4)
    rows[:, 0, 0] = 1.0
    rows[0, 2, 3] = 0.5
    rows[1, 2, 1] = 0.4
    assert select("fastv", text_attention=rows, keep_tokens=2).keep.tolist() == [1, 3]


@pytest.mark.parametrize("layer", [0, -1, 1.0, True, "2"])
def test_fastv_layer_is_validated(layer: object) -> None:
    with pytest.raises(ConfigError, match="fastv: layer must be an integer of at least 1"):
        get_selector("fastv", layer=layer)


# --- scores ----------------------------------------------------------------------------------------------------------
def test_nan_scores_name_the_method() -> None:
    selector = get_selector("vtc-cls")
    context = make_context(selector, 3)
    context[ClsAttention][0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"vtc-cls computed NaN scores.*cls_attention"):
        selector.select(context)
