"""DyCoke: of every four frames the first whole, and of the others what changed most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import kernels
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Origin, Signal
from ..kernels.host import upload
from ..registry import register_selector
from .frames import earlier_at_place, frames_of, lowest_per_group, proportional, spread_over

__all__ = ["DyCokeSelector"]

_BACK = (0, 1, 2, 1)  # frames between each of four and the one that it is compared with


@register_selector
@dataclass(frozen=True)
class DyCokeSelector(Selector):
    """Keep the first frame of every four, and of the other three the tokens least similar to an earlier frame.

    In groups of four frames, the second and the third are compared with the first, and the fourth with the third, each
    token with the one at its place. What the budget has room for beside the first frames is shared by the others in
    proportion to their tokens, the earlier ones first, and goes to the lowest cosines, the lower index winning ties. A
    token whose counterpart an earlier stage has dropped comes first.

    This is the stage of the paper that works on the prompt. Its second stage lets a decode step attend to some of the
    cached tokens, chosen anew when attention moves on, and frees none of them, so that it saves no memory. What leaves
    a cache here does not come back, so that stage is left out; a cache method such as `h2o` can follow instead
    (``"dycoke=0.25+h2o@cache:decoding=0.5"``). The released code is told a fraction of the later frames instead of a
    budget; it leaves the third frame of the last group whole, drops the last of an odd number of frames, fails for four
    frames or fewer, and orders tokens by similarity. Here every group is treated alike, an incomplete one too, and
    tokens keep their order. A budget below the first frames is held by an even spread over them, and so is any budget
    for a picture.

    Of a video that is read in windows, groups begin anew in every window: where windows are of a multiple of four
    steps, they are those of the whole video.

    References
    ----------
    "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", arXiv 2411.15024.
    """

    name: ClassVar[str] = "dycoke"
    paper: ClassVar[str] = "DyCoke, arXiv 2411.15024"
    cost: ClassVar[str] = "N d"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    requires: ClassVar[tuple[Signal, ...]] = (Origin(),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        device, frames = ctx.features.device, frames_of(ctx)
        back = torch.tensor(_BACK)[frames.origin[:, 1] % 4]
        is_whole = back == 0
        whole = is_whole.nonzero()[:, 0]
        if ctx.budget <= len(whole):
            firsts = tuple((-(-t // 4), h, w) for t, h, w in ctx.grids)
            return Selection(ctx.n, upload(spread_over(whole, ctx.budget, firsts), device))
        earlier, is_whole = upload(earlier_at_place(frames.origin, back), device), upload(is_whole, device)
        similarity = kernels.temporal_similarity(ctx.features, earlier).masked_fill(earlier < 0, -torch.inf)
        sizes = torch.bincount(frames.on_host[back > 0], minlength=len(frames.sizes)).tolist()
        counts = upload(torch.tensor(proportional(ctx.budget - len(whole), sizes)), device)
        chosen = lowest_per_group(similarity.masked_fill(is_whole, torch.inf), frames.number, counts) | is_whole
        return Selection(ctx.n, torch.nonzero_static(chosen, size=ctx.budget)[:, 0])
