"""While a method chooses, a GPU is waited for once: at the end, where the selection is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.interpreted import needs_triton
from tests.selectors.inputs import SELECTING, make_context
from tests.selectors.waits import OnDevice, on_device, patch_queues, waits
from vtc.core.context import VisualContext
from vtc.core.observations import TokenGrids
from vtc.core.sites import BeforeDecoder
from vtc.kernels import dispatch
from vtc.kernels.dispatch import NoKernelError
from vtc.registry import get_selector

pytestmark = needs_triton

MORE = {
    "fastvid": (2, "how many anchors a token flows into, the width of the merge, depends on the segments"),
    "prumerge": (2, "how many tokens stay, and how many centres one flows into, is the shape of the merge"),
    "prumerge-plus": (2, "the same"),
}
"""How often at most a method waits that cannot do with once, and why; of 4 frames of 4 x 4 tokens, 20 of them kept."""


def in_front() -> list[str]:
    """Methods that choose before the decoder."""
    stages = {name: get_selector(name).resolve(None, 0.5).stages() for name in SELECTING}
    return [name for name in SELECTING if any(isinstance(stage.site, BeforeDecoder) for stage in stages[name])]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the code that a GPU would run: kernels, here interpreted, where there are any."""

    def check(this: dispatch.Op, choice: str, tensors: list[torch.Tensor]) -> None:
        if this.triton is None or not any(isinstance(tensor, OnDevice) for tensor in tensors):
            raise NoKernelError("the operation has none, or its tensors are on the host")

    monkeypatch.setattr(dispatch, "_check", check)
    patch_queues(monkeypatch)


def moved(context: VisualContext) -> VisualContext:
    """The same context on a GPU, its places as `TokenGrids` has them there."""
    context.features = on_device(context.features)
    raw = TokenGrids(context.grids, context.features.device)
    context.signals = {
        signal: signal.compute(raw) if signal.reads is TokenGrids else on_device(value)
        for signal, value in context.signals.items()
    }
    return context


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", in_front())
def test_a_selection_waits_once(name: str) -> None:
    selector = get_selector(name).resolve(None, 0.5)
    expected = selector.select(make_context(selector, 20, ((4, 4, 4),)))
    with waits() as seen:
        context = moved(make_context(selector, 20, ((4, 4, 4),)))
        seen.clear()
        selection = selector.select(context)
        assert isinstance(selection.keep, OnDevice)
    most, _ = MORE.get(name, (1, ""))
    assert len(seen) <= most, "\n".join(seen)
    assert torch.equal(selection.keep, expected.keep), "the code of a GPU chooses something else"
    torch.testing.assert_close(selection.slots, expected.slots)


def test_exceptions_are_methods_that_wait_more() -> None:
    assert set(MORE) <= set(in_front())
    assert all(most > 1 and reason for most, reason in MORE.values())


def test_waits_are_seen() -> None:
    host = torch.arange(6.0)
    with waits():
        x = on_device(host)
        mask = x > 2
    works: list[tuple[Any, int]] = [
        (lambda: float(x.sum()), 1),
        (lambda: bool(mask.any()), 1),
        (lambda: mask.nonzero(), 1),
        (lambda: x[mask], 1),
        (lambda: x.tolist(), 1),
        (lambda: torch.tensor([1.0], device=x.device), 1),
        (lambda: host.to(x.device), 1),
        (lambda: x.unique(), 1),
        (lambda: torch.nn.functional.normalize(x, dim=0)[mask], 1),
        (lambda: x.clone().masked_fill_(mask, 0.0), 0),
        (lambda: x[torch.arange(2, device=x.device)], 0),
        (lambda: x.sort().values.cumsum(0), 0),
        (lambda: torch.nonzero_static(mask, size=3), 0),
        (lambda: host.to(x.device, non_blocking=True), 0),
        (lambda: (host.tolist(), host.unique(), torch.tensor([1.0])), 0),
    ]
    for work, count in works:
        with waits() as seen:
            work()
        assert len(seen) == count, (count, seen)
    with waits(), pytest.raises(AssertionError, match="are on the host"):
        x + host
