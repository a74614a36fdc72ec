"""While a method chooses, a GPU is waited for once: at the end, where the selection is checked."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted import needs_triton
from tests.pretend import pretended, to_gpu
from tests.selectors.inputs import SELECTING, make_context
from vtc.core.context import VisualContext
from vtc.core.observations import TokenGrids
from vtc.core.sites import BeforeDecoder
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


def moved(context: VisualContext) -> VisualContext:
    """The same context on a GPU, its places as `TokenGrids` has them there."""
    context.features = to_gpu(context.features)
    raw = TokenGrids(context.grids, context.features.device)
    context.signals = {
        signal: signal.compute(raw) if signal.reads is TokenGrids else to_gpu(value)
        for signal, value in context.signals.items()
    }
    return context


@pytest.mark.parametrize("name", in_front())
def test_a_selection_waits_once(name: str) -> None:
    selector = get_selector(name).resolve(None, 0.5)
    expected = selector.select(make_context(selector, 20, ((4, 4, 4),)))
    with pretended() as seen:
        context = moved(make_context(selector, 20, ((4, 4, 4),)))
        seen.clear()
        selection = selector.select(context)
        waited = list(seen)
        assert selection.keep.is_cuda
        assert torch.equal(selection.keep.cpu(), expected.keep), "the code of a GPU chooses something else"
        if expected.slots is not None:
            torch.testing.assert_close(selection.slots.cpu(), expected.slots)
    most, _ = MORE.get(name, (1, ""))
    assert len(waited) <= most, "\n".join(map(str, waited))


def test_exceptions_are_methods_that_wait_more() -> None:
    assert set(MORE) <= set(in_front())
    assert all(most > 1 and reason for most, reason in MORE.values())
