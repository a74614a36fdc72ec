"""Whole calls on a GPU that is not there: nothing is left on the host, and decode steps wait no more than before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants.matrix import method
from tests.pretend import GPU, Wait, pretended, to_gpu

CELLS = (
    ("llava", "vtc", "single"),
    ("llava", "divprune at vision:1", "ragged"),
    ("gemma3", "uniform at decoder:2", "ragged"),
    ("llava", "snapkv", "ragged"),
    ("paligemma", "pixelprune", "ragged"),
    ("llava_next", "divprune+fastv", "two_images"),
    ("qwen2_5_vl", "tome", "ragged"),
    ("qwen2_5_vl", "pyramiddrop", "single"),
    ("qwen2_5_vl_video", "dycoke", "ragged"),
    ("qwen3_vl", "vtc by text", "ragged"),
)
"""Family, method and batch: sites and actions, rows with and without padding."""


def generated(model: Any, batch: dict[str, Any], waits: list[Wait]) -> tuple[torch.Tensor, Counter[bool]]:
    """Tokens, and the waits of a decode step by whether the package makes them."""
    marks: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda *_: marks.append(len(waits)))
    try:
        tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    finally:
        hook.remove()
    return tokens.cpu(), Counter(wait.own for wait in waits[marks[1] : marks[2]])


@pytest.mark.parametrize(("family", "name", "kind"), CELLS)
def test_a_call(family: str, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTC_KERNELS", "torch")  # interpreted kernels take long; tests of selections have those
    case = tiny.build(family)
    batch = case.batch(kind)
    with method(name).on(case.model):
        expected = case.model.generate(**batch, max_new_tokens=4, do_sample=False)
    with pretended() as waits:
        model, batch = to_gpu(case.model), to_gpu(batch)
        _, before = generated(model, batch, waits)
        with method(name).on(model):
            tokens, during = generated(model, batch, waits)
            told = vtc.report(model)
        assert not vtc.is_compressed(model)
    assert torch.equal(tokens, expected)
    assert told.visual_tokens_before > 0
    assert sum(during.values()) <= sum(before.values()), (before, during)


def test_what_waits_and_what_does_not() -> None:
    host = torch.arange(6.0)
    with pretended() as seen:
        x = to_gpu(host)
        mask = x > 2
        works: list[tuple[Callable[[], Any], int]] = [
            (lambda: float(x.sum()), 1),
            (lambda: bool(mask.any()), 1),
            (lambda: mask.nonzero(), 1),
            (lambda: x[mask], 1),
            (lambda: x[torch.arange(2)], 1),
            (lambda: x.clone().index_put_((mask,), x[:3]), 1),
            (lambda: x.tolist(), 1),
            (lambda: torch.tensor([1.0], device=GPU), 1),
            (lambda: torch.tensor([x[0], x[1]], device=GPU), 3),
            (lambda: host.to(GPU), 1),
            (lambda: host.to(GPU, non_blocking=True), 1),  # not pinned
            (lambda: x.clone().copy_(host), 1),
            (lambda: x.unique(), 1),
            (lambda: torch.nn.functional.normalize(x, dim=0)[mask], 1),
            (lambda: x.clone().masked_fill_(mask, 0.0), 0),
            (lambda: x[torch.arange(2, device=GPU)], 0),
            (lambda: x.sort().values.cumsum(0), 0),
            (lambda: torch.nonzero_static(mask, size=3), 0),
            (lambda: host.pin_memory().to(GPU, non_blocking=True), 0),
            (lambda: x + torch.tensor(2.0), 0),
            (lambda: (host.tolist(), host.unique(), torch.tensor([1.0])), 0),
        ]
        for place, (work, count) in enumerate(works):
            seen.clear()
            work()
            assert len(seen) == count, (place, list(map(str, seen)))
        with pytest.raises(RuntimeError, match="are on the host"):
            x + host
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device=GPU, generator=torch.Generator())
        assert (x @ x[:, None]).shape == (1,)  # an operator that changes a shape in place
