"""Elastic Cache: what leaves the cache is merged into the nearest entry that stays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.cache_signals import AttentionSums
from ..core.eviction import CacheContext, CacheSelector, DecodingState, Eviction, Leaving, protect
from ..core.signals import Signal
from ..core.sites import CacheAfterPrefill, CacheWhileDecoding, Site
from ..errors import ConfigError
from ..plain import shown
from ..registry import register_selector
from .prefixkv import check_start, leave_behind_prefix, mean_over_heads

__all__ = ["ElasticCacheSelector"]


@register_selector
@dataclass(frozen=True)
class ElasticCacheSelector(CacheSelector):
    """Keep the entries that received most attention, and merge each other one into the nearest of them.

    ``score_j = sum over queries i of the mean over heads of A[i, j]``, one ranking per layer. Keys and values of a kept
    entry become the mean of its own and of those merged into it; the nearer place in the prompt decides, and the
    earlier one in ties. The first `start` entries of the prompt and the last stay as they are.

    At ``at="cache:decoding"`` entries leave by the rule of `prefixkv`, unmerged, as in the paper.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`.
    start
        How many of the first tokens of the prompt stay unmerged.
    variant
        "paper": as above. "released": the published code takes the indices of a sort for ranks, so that what it keeps
        are not the best scores; it keeps one entry less; and it merges, in place of each dropped entry, the one that
        stands `start` before it, a kept one then counting twice. While decoding it counts from what was asked for, and
        places before the prompt from the end of the cache.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "Efficient Inference of Vision Instruction-Following Models with Elastic Cache", arXiv 2407.18121, section 3.2.
    """

    name: ClassVar[str] = "elastic-cache"
    paper: ClassVar[str] = "Elastic Cache, arXiv 2407.18121"
    cost: ClassVar[str] = "N^2 d"
    requires: ClassVar[tuple[Signal, ...]] = (AttentionSums(),)
    sites: ClassVar[tuple[type[Site], ...]] = (CacheAfterPrefill, CacheWhileDecoding)
    adaptive: ClassVar[bool] = True  # the released variant keeps one entry less

    start: int = 1
    variant: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.name, self.start)
        if self.variant not in ("paper", "released"):
            raise ConfigError(f'elastic-cache: variant must be "paper" or "released", got {shown(self.variant)}.')

    def leaving(self, state: DecodingState) -> Leaving:
        """Return one entry, or none."""
        if self.variant == "paper":
            return leave_behind_prefix(state)
        # One entry more than were left was asked for, and a short prompt counts from the end of all there are.
        asked = dataclasses.replace(state, kept=state.kept + 1)
        place = asked.kept - 25
        return Leaving(leave_behind_prefix(asked).count, place if place >= 0 else max(0, state.stored + place))

    def score(self, ctx: CacheContext) -> Tensor:
        """(N,) attention received."""
        return protect(mean_over_heads(ctx), self._edge(ctx))

    def evict(self, ctx: CacheContext) -> Eviction:
        """Keep the best scores, and merge the others by their places."""
        edge = self._edge(ctx)
        keep = (
            self._released(ctx, edge)
            if self.variant == "released"
            else Eviction.best(self.score(ctx), ctx.budget).keep[0]
        )
        kept = torch.zeros(ctx.n, dtype=torch.bool, device=keep.device)
        kept[keep] = True
        targets = keep[~edge[keep]]  # what the edges hold stays as it is
        if not len(targets):
            return Eviction(ctx.n, keep[None])
        near = targets[_nearest(ctx.places, ctx.places[targets])]
        slots = torch.full((ctx.n,), -1, device=keep.device)
        slots[keep] = torch.arange(len(keep), device=keep.device)
        assign = torch.where(kept, slots, slots[near])
        if self.variant == "paper":
            return Eviction(ctx.n, keep[None], assign[None])
        movable = (~edge).nonzero()[:, 0]
        merged = (movable[~kept[movable]] - int(edge[: int(movable[0])].sum())).clamp(min=0)
        weight = kept.float()
        weight[merged] += 1
        assign = torch.where(weight > 0, assign, -1)
        return Eviction(ctx.n, keep[None], assign[None], weight[None])

    def _released(self, ctx: CacheContext, edge: Tensor) -> Tensor:
        """Return what the published code keeps, ascending."""
        movable = (~edge).nonzero()[:, 0]
        order = mean_over_heads(ctx)[movable].sort(stable=True).indices
        return torch.cat([edge.nonzero()[:, 0], movable[order > ctx.n - ctx.budget]]).sort().values

    def _edge(self, ctx: CacheContext) -> Tensor:
        """(N,) bool: entries at the ends of the prompt."""
        return (ctx.places < self.start) | (ctx.places == ctx.length - 1)


def _nearest(places: Tensor, targets: Tensor) -> Tensor:
    """(N,) index of the nearest of `targets` (K,), ascending, to each place; of two, the earlier."""
    behind = torch.searchsorted(targets, places).clamp(max=len(targets) - 1)
    before = (behind - 1).clamp(min=0)
    return torch.where((places - targets[before]).abs() <= (targets[behind] - places).abs(), before, behind)
