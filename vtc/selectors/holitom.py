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
from ..kernels.host import on_host, upload
from ..registry import register_selector
from .frames import earlier_at_place, frames_of, lowest_per_group, place_of, proportional
from .saliency import SaliencySelector
from .schedule import check_number
from .static_cells import join, number_cells, numbers, peaks, static_units

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
        frame = frames.on_host
        earlier = earlier_at_place(frames.origin, torch.ones_like(frame))
        # From here on the host knows what stands still.
        similarity = on_host(kernels.temporal_similarity(x, upload(earlier, x.device)))
        similarity = similarity.masked_fill(earlier < 0, -torch.inf)
        window = best_windows(_still(similarity > self.tau, frames.origin, frame))
        cells = number_cells(frames.origin, frame, window)
        starts = torch.ones_like(window, dtype=torch.bool)
        starts[1:] = window[1:] != window[:-1]
        least = torch.full_like(cells.frames, torch.inf, dtype=torch.float32)
        least.scatter_reduce_(0, cells.of, similarity.masked_fill(starts[frame], torch.inf), reduce="amin")
        units = static_units(cells, least, self.tau, frame, window, ctx.budget)
        shares = proportional(ctx.budget, units.sizes)
        sizes, centres = units.sizes_of(True), units.sizes_of(True, shares)
        group, tokens, static = (upload(y, x.device) for y in (units.group, units.tokens, units.places))
        means, of = units.means(x), group[static]
        scores = self.saliency(ctx)[tokens].index_copy_(0, static, peaks(means, of, sizes))
        chosen = lowest_per_group(-scores, group, upload(torch.tensor(shares), x.device))
        joined = numbers(chosen)  # what is not kept is dropped, but for static places
        joined = joined.index_copy(0, static, join(means, of, joined[static], sizes, centres))
        return units.selection(tokens[torch.nonzero_static(chosen, size=ctx.budget)[:, 0]], joined)


def _still(above: Tensor, origin: Tensor, frame: Tensor) -> Tensor:
    """(T - 1, P) bool: which of P places stand still in the step to every frame but the first."""
    place = place_of(origin).unique(return_inverse=True)[1]
    table = torch.zeros(int(frame.max()) + 1, int(place.max()) + 1, dtype=torch.bool)
    table[frame, place] = above
    return table[1:]


def best_windows(still: Tensor) -> Tensor:
    """(T,) long: the window of every frame, such that the windows together save the most tokens.

    A window of d + 1 frames saves d tokens at every place that is `still` (T - 1, P) in all its steps. Of equal cuts
    the one with the shorter last window is chosen.
    """
    steps, places = still.shape
    run = torch.zeros(places, dtype=torch.long)
    saved = torch.zeros(steps + 2, dtype=torch.long)  # of the frames before this one
    start = [0] * (steps + 1)  # of the window that ends with this frame
    for last in range(steps + 1):
        if last:
            run = (run + 1) * still[last - 1]
        # Places that are still in at least so many steps up to this frame.
        long = torch.bincount(run, minlength=last + 1).flip(0).cumsum(0).flip(0)[: last + 1]
        length = torch.arange(last + 1)
        total = saved[: last + 1].flip(0) + long * length
        best = int(total.argmax())  # the first of equals
        saved[last + 1] = total[best]
        start[last] = last - best
    window = torch.zeros(steps + 1, dtype=torch.long)
    last = steps
    while last >= 0:
        window[start[last] :] += 1
        last = start[last] - 1
    return window - 1
