"""`select`: the methods as functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vtc import registry
from vtc.core.context import VisualContext
from vtc.core.selector import ScoreSelector
from vtc.core.signals import ClsAttention, Signal
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.functional import select


def test_n_comes_from_whatever_is_given() -> None:
    rows = torch.rand(2, 2, 12)
    assert select("random", features=torch.randn(12, 3), keep_tokens=5).n == 12
    assert select("vtc-cls", cls_attention=rows, keep_tokens=5).n == 12
    assert select("fastv", text_attention=rows, keep_tokens=5).n == 12
    assert select("random", grid_thw=(1, 3, 4), keep_tokens=5).n == 12
    assert select("random", grid_thw=torch.tensor([[1, 2, 3], [1, 1, 6]]), keep_tokens=5).n == 12
    assert select("random", keys=torch.randn(12, 3), keep_ratio=0.5).k == 6
    assert select("random", hidden_states=torch.randn(12, 3), keep_ratio=0.5).k == 6


def test_disagreement_names_the_inputs() -> None:
    with pytest.raises(InputError, match="features 4, cls_attention 5"):
        select("vtc-cls", features=torch.randn(4, 2), cls_attention=torch.rand(1, 1, 5), keep_tokens=1)
    with pytest.raises(InputError, match="features 4, grid_thw 6"):
        select("divprune", features=torch.randn(4, 2), grid_thw=(1, 2, 3), keep_tokens=1)


@pytest.mark.parametrize(
    ("method", "missing"), [("divprune", "features"), ("vtc-cls", "cls_attention"), ("fastv", "text_attention")]
)
def test_missing_input_is_named(method: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} needs {missing}; got hidden_states"):
        select(method, hidden_states=torch.randn(4, 2), keep_tokens=1)


def test_nothing_at_all() -> None:
    with pytest.raises(ConfigError, match="number of tokens is unknown"):
        select("random", keep_tokens=1)
    with pytest.raises(InputError, match="no visual tokens"):
        select("divprune", features=torch.randn(0, 4), keep_tokens=1)


def test_broken_values_are_named() -> None:
    x = torch.randn(4, 2)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[1, 1] = value
        with pytest.raises(InputError, match="features: NaN or infinite"):
            select("divprune", features=x, keep_tokens=2)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (1, 2, 2, 5)])
def test_wrong_number_of_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"cls_attention must have 3 axes with N=5"):
        select("vtc-cls", cls_attention=torch.rand(shape), keep_tokens=2)


@pytest.mark.parametrize("grid", [(1, 2), (1, 0, 4), (1.0, 2.0, 2.0), [[1, 2, 2], [1, 2]], "1x2x2"])
def test_bad_grids(grid: object) -> None:
    with pytest.raises(InputError, match="grid_thw must be"):
        select("uniform", grid_thw=grid, keep_tokens=1)  # type: ignore[arg-type]


def test_method_option_and_budget_errors() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(UnsupportedMethodError, match="Did you mean 'divprune'"):
        select("DivPrun", features=x, keep_tokens=1)
    with pytest.raises(ConfigError, match="divprune has no option 'layer'"):
        select("divprune", features=x, keep_tokens=1, layer=2)
    with pytest.raises(ConfigError, match="exactly one of keep_ratio and keep_tokens"):
        select("divprune", features=x)


def test_no_graph_is_kept() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    assert not select("divprune", features=x, keep_tokens=2).keep.requires_grad


def test_several_signals_of_one_type_are_given_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ClsAttention((0,)), ClsAttention((1,))

    @dataclass(frozen=True)
    class Difference(ScoreSelector):
        name: ClassVar[str] = "difference"
        paper: ClassVar[str] = "none"
        requires: ClassVar[tuple[Signal, ...]] = (first, second)
        reads_features: ClassVar[bool] = False

        def score(self, ctx: VisualContext) -> torch.Tensor:
            return (ctx[second] - ctx[first])[0, 0]

    monkeypatch.setitem(registry._SELECTORS._classes, "difference", Difference)
    one, two = torch.tensor([[[0.1, 0.2, 0.7]]]), torch.tensor([[[0.3, 0.3, 0.4]]])
    assert select("difference", signals={first: one, second: two}, keep_tokens=1).keep.tolist() == [0]
    assert select("difference", signals={first: two, second: one}, keep_tokens=1).keep.tolist() == [2]
    with pytest.raises(ConfigError, match="difference needs cls_attention; got cls_attention"):
        select("difference", signals={first: one}, keep_tokens=1)
    for ambiguous in ({"signals": {ClsAttention: one}}, {"cls_attention": one}):
        with pytest.raises(ConfigError, match=r"several signals cls_attention; give each by itself: .*\(0,\).*\(1,\)"):
            select("difference", keep_tokens=1, **ambiguous)


def test_a_signal_of_other_parameters_serves_where_one_is_required() -> None:
    rows = torch.rand(2, 2, 6)
    by_name = select("vtc-cls", cls_attention=rows, keep_tokens=2)
    for key in (ClsAttention, ClsAttention((21, 22))):
        assert torch.equal(select("vtc-cls", signals={key: rows}, keep_tokens=2).keep, by_name.keep)


def test_scores_of_another_number_of_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class OnePerHead(ScoreSelector):
        name: ClassVar[str] = "one-per-head"
        paper: ClassVar[str] = "none"
        requires: ClassVar[tuple[Signal, ...]] = (ClsAttention(),)
        reads_features: ClassVar[bool] = False

        def score(self, ctx: VisualContext) -> torch.Tensor:
            return ctx[ClsAttention][0].mean(dim=1)

    monkeypatch.setitem(registry._SELECTORS._classes, "one-per-head", OnePerHead)
    with pytest.raises(InputError, match=r"one-per-head computed scores \(2,\); 3 tokens need \(3,\)"):
        select("one-per-head", signals={ClsAttention(): torch.rand(1, 2, 3)}, keep_tokens=1)
