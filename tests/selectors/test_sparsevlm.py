"""SparseVLM and PyramidDrop: cases worked out by hand, and the edges of their budgets."""

from __future__ import annotations

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import build
from vtc.core.signals import HiddenStates
from vtc.core.stage import ModelShape
from vtc.errors import ConfigError
from vtc.functional import select
from vtc.registry import get_selector
from vtc.selectors.pyramiddrop import EnteringAttention
from vtc.selectors.sparsevlm import Raters, SparseVlmSelector, TextRows, recycled


def rows(*scores: float) -> torch.Tensor:
    """(N, 2) attention of two text tokens, of which the first is the rater."""
    return torch.tensor([[score, 1 - score] for score in scores])


def test_raters_alone_count() -> None:
    signals = {Raters: torch.tensor([1.0, 0.0]), TextRows: rows(0.1, 0.9, 0.2, 0.8, 0.3)}
    selection = select("sparsevlm", signals=signals, keep_tokens=2, recycle=False)
    assert selection.keep.tolist() == [1, 3]
    assert selection.assign is None


def test_what_leaves_is_recycled_by_what_it_shows() -> None:
    """Of 40 tokens 4 stay: 36 leave, the best 11 of them in 2 clusters, which are those of equal states."""
    assert recycled(38) == (12, 2)
    score = torch.linspace(1.0, 0.0, 40)
    states = torch.zeros(40, 2)
    states[2:14, 0] = torch.arange(12) % 2 * 100.0 + torch.arange(12) * 0.01
    signals = {Raters: torch.ones(1), TextRows: score[:, None], HiddenStates: states}
    selection = select("sparsevlm", signals=signals, keep_tokens=4)
    assert selection.keep[:2].tolist() == [0, 1]
    assert selection.k == 4
    slots = selection.slots
    assert (slots[14:] == -1).all(), "the worst leave for good"
    even, odd = slots[2:14:2].unique(), slots[3:14:2].unique()
    assert sorted([*even.tolist(), *odd.tolist()]) == [2, 3]
    merged = selection.merge(states)
    torch.testing.assert_close(merged[even[0]], states[2:14:2].mean(dim=0))
    assert torch.equal(merged[:2], states[:2]), "what is kept is left alone"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 11, 40, 341])
def test_the_budget_is_met_whatever_is_recycled(n: int) -> None:
    draw = torch.Generator().manual_seed(n)
    signals = {
        Raters: torch.ones(3),
        TextRows: torch.rand(n, 3, generator=draw),
        HiddenStates: torch.randn(n, 4, generator=draw),
    }
    for budget in {1, 2, n // 3, n // 2, n - 1, n, n + 5} - {0, -1}:
        assert select("sparsevlm", signals=signals, keep_tokens=budget).k == min(budget, n)
        ranked = select("sparsevlm-rank", signals=signals, keep_tokens=budget, scale=1.0, bias=1.0)
        assert 1 <= ranked.k <= min(budget, n)


def test_the_rank_decides() -> None:
    """Three raters that look alike are one direction; attention of no rank keeps one token."""
    draw = torch.Generator().manual_seed(0)
    one = torch.rand(50, 1, generator=draw)
    for table, rank in ((one.expand(-1, 3), 1), (torch.rand(50, 3, generator=draw), 3), (torch.zeros(50, 3), 0)):
        signals = {Raters: torch.ones(3), TextRows: table.contiguous()}
        kept = select("sparsevlm-rank", signals=signals, keep_tokens=50, scale=5.0, recycle=False).k
        assert kept == max(1, 5 * rank)


def test_the_rank_needs_no_settings_for_its_layers() -> None:
    """Version 1.0 works behind the layers 2, 6, 15 and 19; the first stage has the budget, the others a rank."""
    selector = get_selector("sparsevlm-rank", layers=(3, 7, 16, 20))
    stages = selector.stages(ModelShape(32), 0.25)
    assert [(str(stage.site), stage.keep) for stage in stages] == [
        ("decoder:3", None),
        ("decoder:7", 1.0),
        ("decoder:16", 1.0),
        ("decoder:20", 1.0),
    ]
    with pytest.raises(ConfigError, match="sparsevlm-rank: layers must be ascending decoder layers"):
        get_selector("sparsevlm-rank", layers=(3, 3))


def test_shares_between_the_released_settings() -> None:
    selector = SparseVlmSelector()
    for recycle in (True, False):
        selector = SparseVlmSelector(recycle=recycle)
        assert selector.shares_of(1.0) == (1.0, 1.0, 1.0)
        for ratio in (0.01, 0.056, 0.11, 0.25, 0.5, 0.9):
            shares = selector.shares_of(ratio)
            assert 1 >= shares[0] >= shares[1] >= shares[2] > 0
    average = [
        sum(n * k for n, k in zip((3, 4, 9, 16), (1, *selector.shares_of(r)), strict=True)) / 32 for r in (0.25, 0.5)
    ]
    assert average == pytest.approx([0.25, 0.5], abs=0.05)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("sparsevlm", {"layers": (3, 2)}, "layers must be at most 3 ascending decoder layers"),
        ("sparsevlm", {"layers": (1, 2, 3, 4)}, "layers must be at most 3 ascending decoder layers"),
        ("sparsevlm", {"layers": (0,)}, "layers must be an integer of at least 1"),
        ("sparsevlm", {"heads": 0}, "heads must be an integer of at least 1"),
        ("sparsevlm", {"recycle": 1}, "recycle must be True or False"),
        ("sparsevlm", {"text": "before"}, 'text must be "after" or "all"'),
        ("sparsevlm-rank", {"heads": 2}, "leave heads out"),
        ("sparsevlm-rank", {"scale": -1.0}, "scale must be a number of at least 0"),
        ("pyramiddrop", {"layers": ()}, "layers must be ascending decoder layers"),
    ],
)
def test_wrong_options_are_named(method: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=f"{method}: .*{match}"):
        get_selector(method, **options)


@pytest.mark.parametrize("method", ["sparsevlm", "pyramiddrop"])
def test_a_count_cannot_be_shared_among_layers(method: str) -> None:
    case = build(tiny.family("llava"))
    with pytest.raises(ConfigError, match=f"{method} shares its budget among decoder layers: give keep_ratio"):
        vtc.compress(case.model, method, keep_tokens=4)
    with pytest.raises(ConfigError, match="this model has layers 1 to 3"):
        vtc.compress(case.model, method, keep_ratio=0.5, layers=(1, 7))


def test_pyramiddrop_keeps_what_the_last_token_looks_at() -> None:
    attention = torch.tensor([[[0.1, 0.4, 0.1, 0.4]], [[0.3, 0.3, 0.1, 0.3]]])
    assert select("pyramiddrop", signals={EnteringAttention: attention}, keep_tokens=2).keep.tolist() == [1, 3]
    assert select("pyramiddrop", signals={EnteringAttention: attention}, keep_tokens=3).keep.tolist() == [0, 1, 3]


@torch.no_grad()
def test_pyramiddrop_counts_from_the_tokens_at_the_input() -> None:
    case = build(tiny.family("llava_next"))
    with vtc.compressed(case.model, "pyramiddrop", keep_ratio=0.125) as model:
        model(**case.batch("single"))
        (segment,) = vtc.report(model).segments
    assert [selection.k for _, selection in segment.selections] == [40, 20, 10]  # of 80
    assert [str(site) for site, _ in segment.selections] == ["decoder:1", "decoder:2", "decoder:3"]


def test_where_there_is_no_room_for_three_stages_the_last_count() -> None:
    selector = get_selector("sparsevlm").resolve(ModelShape(3), 1 / 3)
    assert selector.layers == (1, 2)
    stages = selector.stages(ModelShape(3), 1 / 3)
    assert [stage.keep for stage in stages] == pytest.approx([204 / 576, 113 / 204])
