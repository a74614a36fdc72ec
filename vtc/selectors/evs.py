"""EVS: the first frame whole, and of later frames what changed most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Origin, Signal
from ..kernels.host import on_host, upload
from ..registry import register_selector
from .frames import place_of, spread_over

__all__ = ["EvsSelector"]


@register_selector
@dataclass(frozen=True)
class EvsSelector(Selector):
    """Keep the tokens that differ most from the same place one frame earlier; the first frame stays whole.

    The score of a token is one minus the cosine to the token at its place in the frame before it. The lower index wins
    ties, and a token that equals its predecessor scores exactly 0 (the released code leaves that order to rounding).

    Where this goes further than the published rule, which keeps at least one whole frame whatever was asked for: a
    budget below that is held, by an even spread over the first frame. The same happens to a still picture, in which
    nothing precedes anything: use another method there. After a stage that dropped tokens, the frame before is the
    last one in which the place is still present.

    References
    ----------
    "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "EVS, arXiv 2510.14624"
    cost: ClassVar[str] = "N d"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    requires: ClassVar[tuple[Signal, ...]] = (Origin(),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        budget, device = min(ctx.budget, ctx.n), ctx.features.device
        earlier = before(on_host(ctx[Origin]))
        whole = (earlier < 0).nonzero()[:, 0]
        if budget < len(whole):
            keep = spread_over(whole, budget, tuple((1, h, w) for _, h, w in ctx.grids))
            return Selection(ctx.n, upload(keep, device))
        similarity = kernels.temporal_similarity(ctx.features, earlier := upload(earlier, device))
        return Selection.best((1 - similarity).masked_fill(earlier < 0, torch.inf), budget)


def before(origin: Tensor) -> Tensor:
    """(N,) long: the token at the place of each one in the last frame before that has it, -1 where there is none.

    `origin` (N, 6) is as the signal `Origin`, on the host.
    """
    frame, place = origin[:, 1], place_of(origin)
    # Sorted by place and then by time (a stable sort of tokens in time's order), predecessors are neighbours.
    order = torch.argsort(place * (frame.max() + 1) + frame, stable=True)
    same = place[order[:-1]] == place[order[1:]]
    earlier = torch.full_like(order, -1)
    earlier[order[1:][same]] = order[:-1][same]
    return earlier
