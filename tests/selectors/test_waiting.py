"""While a method chooses, a GPU is waited for once: at the end, where the selection is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.interpreted import needs_triton
from tests.selectors.inputs import SELECTING, make_context
from tests.selectors.waits import waits
from vtc.core.sites import BeforeDecoder
from vtc.kernels import dispatch, greedy, merge
from vtc.kernels.dispatch import NoKernelError
from vtc.registry import get_selector

pytestmark = needs_triton

MORE = {
    "aim": (5, "merges in frames of different lengths, whose slots are numbered anew"),
    "dycoke": (9, "frames share the budget by largest remainders, on the host"),
    "evs": (4, "the places of the frames before are paired by what the grids hold"),
    "fastvid": (32, "segments, salient tokens and anchors are as many as the video makes them"),
    "flashvid": (59, "trees of tokens are as many as the video makes them"),
    "hiprune": (7, "anchors share neighbours, so that these are fewer than four each"),
    "holitom": (36, "windows and static places are as many as the video makes them"),
    "holov": (8, "crops share the budget in turns, on the host"),
    "pool": (2, "made of the grids alone, on the host, and copied at the end"),
    "prumerge": (6, "keeps as many tokens as are outliers"),
    "prumerge-plus": (7, "keeps as many tokens as are outliers"),
    "prunevid": (62, "windows, static places and clusters are as many as the video makes them"),
    "uniform": (4, "made of the grids alone, on the host, and copied at the end"),
    "vidcom2": (5, "frames share the budget by largest remainders"),
    "vispruner": (13, "rounds end when no duplicates are left"),
    "vscan": (5, "windows are as many as the grids make them"),
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
        if this.triton is None:
            raise NoKernelError("the operation has none")

    monkeypatch.setattr(dispatch, "_check", check)
    for module in (greedy, merge):
        monkeypatch.setattr(module, "queues", lambda x: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", in_front())
def test_a_selection_waits_once(name: str) -> None:
    selector = get_selector(name).resolve(None, 0.5)
    context = make_context(selector, 20, ((4, 4, 4),))
    with waits() as seen:
        selection = selector.select(context)
    most, _ = MORE.get(name, (1, ""))
    assert len(seen) <= most, "\n".join(seen)
    assert selection.n == 64
    assert selection.k <= 20


def test_exceptions_are_methods_that_wait_more() -> None:
    assert set(MORE) <= set(in_front())
    assert all(most > 1 and reason for most, reason in MORE.values())


def test_waits_are_seen() -> None:
    x = torch.arange(6.0)
    mask = x > 2
    works: list[tuple[Any, int]] = [
        (lambda: float(x.sum()), 1),
        (lambda: bool(mask.any()), 1),
        (lambda: mask.nonzero(), 1),
        (lambda: x[mask], 1),
        (lambda: x.tolist(), 1),
        (lambda: torch.tensor([1.0], device=x.device), 1),
        (lambda: x.unique(), 1),
        (lambda: x.clone().masked_fill_(mask, 0.0), 0),
        (lambda: x[torch.arange(2)], 0),
        (lambda: x.sort().values.cumsum(0), 0),
        (lambda: torch.nonzero_static(mask, size=3), 0),
    ]
    for work, count in works:
        with waits() as seen:
            work()
        assert len(seen) == count, (count, seen)
