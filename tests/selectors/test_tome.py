"""ToMe against the released code (tests/golden/README.md), and its schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
from tests.selectors.inputs import make_context
from tests.selectors.test_golden import case, load
from vtc import kernels
from vtc.core.signals import MeanKeys, VisionKeys
from vtc.registry import get_selector
from vtc.selectors.tome import merge_schedule

GOLDEN = load("tome.npz")
CASES = sorted({key.split("_")[0] for key in GOLDEN if key.endswith("_source")})


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_the_released_one(name: str) -> None:
    golden = case(GOLDEN, f"{name}_")
    protected = int(golden["class_token"]) + int(golden["distill_token"])
    metric, x = golden["metric"][:, protected:], golden["x"][0, protected:]
    merged = min(golden["r"], metric.shape[1] // 2)
    keep, assign = kernels.bipartite_merge(metric, merged, first=protected % 2)
    selection = vtc.Selection(metric.shape[1], keep[0], assign[0])
    sizes = golden["size"][0, protected:, 0] if "size" in golden else torch.ones(len(x))
    totals = torch.zeros(selection.k).index_add_(0, assign[0], sizes)
    weighted = torch.zeros(selection.k, x.shape[1]).index_add_(0, assign[0], x * sizes[:, None]) / totals[:, None]
    # Which tokens are in which slot; the released code orders slots differently.
    theirs = {tuple(row.nonzero()[:, 0].tolist()): place for place, row in enumerate(golden["source"][0])}
    for slot in range(selection.k):
        members = (assign[0] == slot).nonzero()[:, 0] + protected
        place = theirs[tuple(members.tolist())]
        torch.testing.assert_close(weighted[slot], golden["out_wavg"][0, place], rtol=1e-5, atol=1e-6)
        assert float(golden["out_size"][0, place, 0]) == float(totals[slot])
        if "size" not in golden:
            torch.testing.assert_close(selection.merge(x)[slot], golden["out_mean"][0, place], rtol=1e-5, atol=1e-6)
    assert len(theirs) == selection.k + protected
    # Their sources and destinations are the even and the odd tokens, protected ones included.
    merges = torch.stack([2 * golden["src_idx"], 2 * golden["dst_idx"] + 1])[:, 0, :, 0] - protected
    assert torch.equal(keep[0][assign[0][merges[0]]], merges[1])
    stays = 2 * golden["unm_idx"][0, :, 0] - protected
    order = kernels.bipartite_merge(metric, merged, "author", protected % 2)[0][0]
    if protected:
        assert torch.equal(keep[0][keep[0] % 2 == protected % 2], stays[stays >= 0].sort().values)
    else:
        assert torch.equal(order[: len(stays)], stays)


def test_a_single_token_is_left_whatever_the_budget() -> None:
    context = make_context(get_selector("tome"), 0)
    assert get_selector("tome").select(context).k == 1


def test_without_a_tower_it_merges_down_to_the_budget() -> None:
    keys = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    selection = vtc.select("tome", mean_keys=keys, keep_tokens=7)  # in three rounds
    assert selection.k == 7
    assert int(selection.sizes.sum()) == 40
    torch.testing.assert_close(selection.merge(keys).mean(dim=1) @ selection.sizes.float(), keys.mean(dim=1).sum())


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 40), st.floats(-1, 1))
def test_schedules_end_at_the_budget(entered: int, budget: int, steps: int, inflection: float) -> None:
    budget = min(entered, budget)
    left = merge_schedule(entered, budget, steps, inflection)
    assert len(left) == steps
    assert left[-1] == budget
    assert all(before >= after for before, after in itertools.pairwise([entered, *left]))


@pytest.mark.parametrize("name", [key for key in GOLDEN if key.startswith("parse_r_") and f"{key}_args" in GOLDEN])
def test_schedules_are_those_of_the_paper(name: str) -> None:
    args, expected = GOLDEN[f"{name}_args"].tolist(), GOLDEN[name].tolist()
    layers, inflection = int(args[0]), args[2] if len(args) > 2 else 0.0
    entered = sum(expected) + 50
    left = [entered, *merge_schedule(entered, 50, layers, inflection)]
    ours = [before - after for before, after in itertools.pairwise(left)]
    assert all(abs(one - other) <= 1 for one, other in zip(ours, expected, strict=True))  # they cut every step


def test_keys_are_averaged_over_heads() -> None:
    raw = vtc.VisionAttention(*torch.randn(3, 2, 4, 9, 5), scaling=1.0)
    torch.testing.assert_close(MeanKeys().compute(raw), VisionKeys().compute(raw).unflatten(-1, (4, 5)).mean(dim=2))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"inflection": 2}, "inflection must be"), ({"first_layer": 0}, "first_layer must be"),
     ({"first_layer": 3, "last_layer": 2}, "last_layer must be")],
)  # fmt: skip
def test_wrong_options(options: dict[str, float], match: str) -> None:
    with pytest.raises(vtc.ConfigError, match=match):
        vtc.selectors.ToMeSelector(**options)
