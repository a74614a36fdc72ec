"""Invariant 7: no N x N attention matrix is ever made for a score that needs only rows or column sums of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtc
from tests import tiny
from tests.invariants.matrix import build

N = 324
"""Visual tokens of the large tiny models; all their widths, the vocabulary of 300 included, are below."""


class SquareWatch(TorchDispatchMode):
    """Notes every operator that makes a tensor with two axes of at least N: tokens by tokens, or patches by patches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and sum(size >= N for size in leaf.shape) >= 2:
                self.found.append((str(func), tuple(leaf.shape)))
        return out


def squares(model: Any, inputs: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    with torch.no_grad(), SquareWatch() as watch:
        model(**inputs)
    return watch.found


CASES = [
    ("llava_large", "vtc-cls", {"start_layer": 0}),
    ("llava_large", "vtc-cls", {"start_layer": 1, "score_source": "received"}),
    ("llava_large", "fastv", {"layer": 2}),
    ("internvl_large", "vtc-cls", {"start_layer": 1}),
    ("internvl_large", "vtc-cls", {"start_layer": 1, "score_source": "received"}),
    ("internvl_large", "fastv", {"layer": 3}),
    ("qwen2_5_vl_large", "vtc-cls", {"start_layer": 2, "score_source": "received"}),
    ("qwen2_5_vl_large", "fastv", {"layer": 1}),
    ("llava_large", "pyramiddrop", {}),
    ("qwen2_5_vl_large", "pyramiddrop", {"layers": (2,)}),
]


@pytest.mark.parametrize(("name", "method", "options"), CASES)
def test_scores_make_no_square(name: str, method: str, options: dict[str, Any]) -> None:
    case = build(tiny.family(name))
    inputs = case.batch("single")
    assert squares(case.model, inputs) == [], "the untouched model on sdpa makes none"
    with vtc.compressed(case.model, method, keep_ratio=0.25, **options) as model:
        assert squares(model, inputs) == []
        assert vtc.report(model).visual_tokens_after == N // 4


@pytest.mark.parametrize("method", ["sparsevlm", "sparsevlm-rank"])
@pytest.mark.parametrize("name", ["llava_large", "qwen2_5_vl_large"])
def test_raters_and_recycling_make_no_square(name: str, method: str) -> None:
    case = build(tiny.family(name))
    with vtc.compressed(case.model, method, keep_ratio=0.5) as model:
        assert squares(model, case.batch("single")) == []
        assert vtc.report(model).visual_tokens_after < N


def test_the_watch_sees_an_eager_attention_matrix() -> None:
    case = build(tiny.family("llava_large"), "eager")
    assert any(shape[-2:] == (N + 1, N + 1) for _, shape in squares(case.model, case.batch("single")))
