"""HoliTom: the windows in which most tokens stand still; these once, and of the others what the tower attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.signals import Origin, Signal
from ..core.sites import BeforeDecoder, Site
from ..kernels.host import upload
from ..registry import register_selector
from .frames import Frames, frames_of, lowest_per_group, shared
from .saliency import SaliencySelector
from .schedule import check_number
from .static_cells import Places, places_of, static_units

__all__ = ["HoliTomSelector", "best_windows"]


@register_selector
@dataclass(frozen=True)
class HoliTomSelector(SaliencySelector):
    """Cut a video where that saves most, merge in time what stands still, and spend the budget on what is left.

    A place is static in a window [a, b] of frames if the cosine of its tokens to those one frame earlier is above
    `tau` in every step of it. The **windows** are those with the largest sum of ``(static places) * (b - a)``, the
    tokens that merging in time saves, found by dynamic programming. The tokens of a static place become their mean, in
    the first frame of the window. What is left shares the **budget** by size: each frame gets its part for the other
    tokens with the most attention in the tower, and each window for its static places, which are clustered by density
    (DPC-kNN with 7 neighbours, `vtc.kernels.density_peaks`); every cluster becomes its mean, at its centre.

    This is the outer merging of the paper. The inner one, which averages tokens into each other at decoder layer 18, is
    left out: tokens do not merge inside the decoder. Other differences from the released code. Parts of the budget are
    exact, by the method of largest remainders, where it rounds the part of every frame and window. Where static places
    leave fewer tokens than the budget, those with the lowest least cosine are not merged, where it keeps fewer. Its
    option to cluster some of the other tokens, off by default, is not here. Its attention is that of SigLIP's pooling
    head; here it is what a token receives in the layer that makes the features, or [CLS] attention. A picture is a
    video of one frame. Of a video that is read in windows, each of those counts as a video.

    Parameters
    ----------
    tau
        Cosine to the frame before above which a token stands still.
    score_source
        "received": the attention that a token receives from all others; or "cls".

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "HoliTom: Holistic Token Merging for Fast Video Large Language Models", arXiv 2505.21334.
    """

    name: ClassVar[str] = "holitom"
    paper: ClassVar[str] = "HoliTom, arXiv 2505.21334"
    cost: ClassVar[str] = "N^2 d / frames"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    beside: ClassVar[tuple[Signal, ...]] = (Origin(),)
    action: ClassVar[Action] = Action.MERGE

    score_source: str = "received"
    tau: float = 0.8

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return the range of the threshold."""
        return {"tau": Float(0.5, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("holitom", "tau", self.tau, -1, 1)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose and merge into ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        x, frames = ctx.features, frames_of(ctx)
        places = places_of(frames)
        steps = places.table(self._similarity(x, frames, places), -torch.inf)
        window = best_windows(steps[1:] > self.tau)
        # The least of every place, but for the step into the window.
        begins = torch.nn.functional.pad(window[1:] != window[:-1], (1, 0), value=True)
        within, at = steps.masked_fill_(begins[:, None], torch.inf), window[:, None].expand_as(steps)
        least = torch.full_like(steps, torch.inf).scatter_reduce_(0, at, within, reduce="amin")
        units = static_units(places, window, least, self.tau, ctx.budget)
        shares = shared(ctx.budget, units.sizes)
        moving = units.moving
        best = lowest_per_group(-self.saliency(ctx), moving, shares[: units.frames])
        centre = torch.where(best, torch.arange(ctx.n, device=x.device), -1)
        return units.selection(x, centre, shares, ctx.budget)

    def _similarity(self, x: Tensor, frames: Frames, places: Places) -> Tensor:
        """(N,): the cosine of every token to the one at its place one time before; minus infinity without one."""
        before = torch.nn.functional.pad(places.token[:-1], (0, 0, 1, 0), value=-1)
        earlier, time = places.of_tokens(before), upload(frames.origin[:, 1], x.device)
        missing = (earlier < 0) | (time[earlier] + 1 != time)
        return kernels.temporal_similarity(x, earlier.masked_fill_(missing, -1)).masked_fill_(missing, -torch.inf)


def best_windows(still: Tensor) -> Tensor:
    """(T,) long: the window of every frame, such that the windows together save the most tokens.

    A window of d + 1 frames saves d tokens at every place that is `still` (T - 1, P) in all its steps. Of equal cuts
    the one with the shorter last window is chosen.
    """
    frames = len(still) + 1
    frame = torch.arange(frames, device=still.device)
    moved = torch.where(still, 0, frame[1:, None]).cummax(dim=0).values if frames > 1 else frame[1:, None]
    run = frame[1:, None] - moved  # steps up to every frame in which a place has been still
    long = frame.new_zeros(frames, frames)
    long[1:].scatter_add_(1, run, torch.ones_like(run))
    gain = long.flip(1).cumsum(1).flip(1) * frame  # of the window of d + 1 frames that ends with a frame
    saved = frame.new_zeros(frames + 1)  # by all frames up to one; the last comes first, and behind all none
    length = torch.zeros_like(saved)  # d of the window that ends before a frame
    for last, row in enumerate(gain.unbind(0)):
        begin = frames - last
        found = saved[begin - 1 : begin], length[last + 1 : last + 2]
        torch.max(saved[begin:] + row[: last + 1], dim=0, keepdim=True, out=found)  # the first of equals
    # Windows begin where the lengths lead, from behind the last frame on; every step sees twice as far.
    start = torch.nn.functional.pad(frame - length[1:], (1, 0))
    begins = torch.nn.functional.pad(torch.zeros_like(frame), (0, 1), value=1)
    for _ in range(frames.bit_length()):
        begins = begins.scatter_reduce(0, start, begins, reduce="amax")
        start = start[start]
    return begins[:frames].cumsum(0) - 1
