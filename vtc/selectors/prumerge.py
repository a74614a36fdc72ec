"""PruMerge and PruMerge+: outliers of [CLS] attention, each with the tokens that its key resembles merged in."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.actions import Action
from ..core.context import VisualContext
from ..core.observations import Observation, VisionAttention
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Signal, VisionKeys, VisionSignal
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..kernels.cluster import counts_of
from ..kernels.dispatch import queues
from ..registry import register_selector
from .schedule import check_layer

__all__ = ["PruMergePlusSelector", "PruMergeSelector", "outliers"]

_BLOCK = 512  # centres compared with all tokens at a time


@dataclass(frozen=True)
class WideClsAttention(VisionSignal):
    """Attention that [CLS] gives to every token where all heads of a layer are taken for one, (N,)."""

    name: ClassVar[str] = "wide_cls_attention"
    reads: ClassVar[type[Observation]] = VisionAttention
    needs_cls: ClassVar[bool] = True

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M): the softmax of the products of whole queries and keys, over the root of their width.

        As in the tower's own attention, a merged token counts as often as it stands for others.
        """
        parts = []
        for one in raw.sequences():
            query, keys = one.queries[:, :, :1].float(), one.keys.float()
            heads, width = query.shape[1], query.shape[3]
            keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
            logits = (query @ keys.transpose(2, 3)).sum(dim=1)[:, 0] / (heads * width) ** 0.5
            if one.bias is not None:
                logits = logits + one.bias.float()
            if one.mask is not None:
                logits = logits.masked_fill(~one.mask[:, 0, 0], -torch.inf)
            parts.append(logits.softmax(dim=-1))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Centred(Selector):
    """What PruMerge and PruMerge+ share."""

    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    requires: ClassVar[tuple[Signal, ...]] = (WideClsAttention((-1,)), VisionKeys((-1,)))
    reads_features: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    count: str = "outliers"
    neighbours: int = 32

    def __post_init__(self) -> None:
        if self.count not in ("outliers", "budget"):
            raise ConfigError(f'{self.name}: count must be "outliers" or "budget", got {self.count!r}.')
        check_layer(self.name, "neighbours", self.neighbours, least=1)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=self.requires, action=Action.MERGE),)

    def select(self, ctx: VisualContext) -> Selection:
        """Find the centres, and merge."""
        if ctx.n == 1 or (ctx.budget >= ctx.n and (self.count == "budget" or ctx.keep_ratio == 1)):
            return Selection.full(ctx.n, ctx.features.device)
        attention = ctx[WideClsAttention].float()
        most = min(ctx.budget, ctx.n) - 1
        chosen = self.centres(attention, most)
        # The token that stands for all of the rest stands where the best of them stood.
        last = attention.masked_fill(chosen, -torch.inf).argmax(dim=0, keepdim=True)
        kept = chosen.index_fill(0, last, True)
        slot = kept.cumsum(0) - 1
        # A GPU is asked once for all numbers, and compares as many centres with all tokens as there can be.
        size = most if queues(attention) else int(chosen.sum())
        centres = torch.nonzero_static(chosen, size=size, fill_value=ctx.n)[:, 0]
        each = min(self.neighbours, ctx.n - 1)
        near = _nearest(ctx[VisionKeys], centres.clamp(max=ctx.n - 1), each)
        joins = near.masked_fill((centres == ctx.n)[:, None], -1).flatten()
        count, times = torch.stack([chosen.sum(), counts_of(joins, ctx.n).amax()]).tolist()
        centres, near = centres[:count], near[:count].flatten()
        tokens = torch.arange(ctx.n, device=near.device)
        token = torch.cat([tokens, near])
        into = torch.cat([torch.where(chosen, slot, slot[last]), slot[centres].repeat_interleave(each)])
        weight = torch.cat([attention.masked_fill(chosen, 1.0), attention[near]])
        keep = torch.nonzero_static(kept, size=count + 1)[:, 0]
        return Selection.from_entries(ctx.n, keep, token, into, weight, times + 1)

    @abstractmethod
    def centres(self, attention: Tensor, most: int) -> Tensor:
        """(N,) bool: the centres, at most `most` and fewer than N, or as many as that if the budget counts."""


@register_selector
@dataclass(frozen=True)
class PruMergeSelector(_Centred):
    """Keep the outliers of [CLS] attention, add to each what resembles it, and make one token of all others.

    The attention a is that of the last layer of the tower with all its heads taken for one:
    ``softmax(q k^T / sqrt(width))`` of the whole queries and keys. Centres are the tokens with the most, as many as
    there are outliers, tokens above ``Q3 + 1.5 (Q3 - Q1)``, the quartiles interpolated over the tokens of the picture;
    at least one, at most a third. Centre i becomes ``x_i + sum_j a_j x_j`` over the `neighbours` other tokens, centres
    too, whose keys have the largest cosine to its own; nothing is normalised. One token more is ``sum_j a_j x_j`` over
    all that are no centre.

    The budget is a ceiling: of more centres those with the most attention stay. ``keep_ratio=1`` keeps everything; for
    no ceiling, name a `keep_tokens` of more than there are. ``count="budget"`` takes as many as the
    budget has room for, which is the released code's fixed ratio.

    Four differences from the released code. It merges before the projector, and this behind it. It leaves centres in
    the order of attention, here they stand where they stood, and the last token where the best of the others stood. It
    computes quartiles over all pictures of a batch, here each has its own. And without any outlier it divides by 0.

    A GPU is waited for twice: how many centres there are, and how many of them one token flows into, is the shape of
    the merge, so that it is asked for before the merge is made and checked.

    Parameters
    ----------
    count
        "outliers": how many tokens stay depends on the picture; "budget": exactly the budget.
    neighbours
        Tokens that flow into a centre.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    cost: ClassVar[str] = "K N d"

    def centres(self, attention: Tensor, most: int) -> Tensor:
        """(N,) bool: those with the most attention."""
        return _ranks(attention) < (most if self.count == "budget" else outliers(attention).clamp(max=most))


@register_selector
@dataclass(frozen=True)
class PruMergePlusSelector(_Centred):
    """PruMerge with an even spread of centres beside the outliers.

    With m outliers of N tokens (at least one, at most a third) every s-th token is a centre too, if it is none yet,
    where s is ``int(int(N / m) / 3)``; the last token is never one of these. All else is as in `prumerge`.

    Where that is more than the budget, outliers come first and of the spread an even part stays. ``count="budget"``
    makes outliers of half of the budget, whatever their attention, and spreads the other half over all tokens, as the
    released code's fixed ratio does. Where the spread meets an outlier, one of the tokens that are left takes its
    place; the released code has that centre twice, and loses as many of the lowest other tokens.

    Parameters
    ----------
    count
        "outliers": how many tokens stay depends on the picture; "budget": exactly the budget.
    neighbours
        Tokens that flow into a centre.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388.
    """

    name: ClassVar[str] = "prumerge-plus"
    paper: ClassVar[str] = "LLaVA-PruMerge+, arXiv 2403.15388"
    cost: ClassVar[str] = "K N d"

    def centres(self, attention: Tensor, most: int) -> Tensor:
        """(N,) bool: outliers, and the spread."""
        n, rank = len(attention), _ranks(attention)
        tokens = torch.arange(n, device=rank.device)
        if self.count == "budget":
            best = rank < most // 2
            chosen = best | _evenly(torch.ones_like(best), rank.new_full((), most - most // 2), most)
            return chosen | _evenly(~chosen, most - chosen.sum(), most)
        count = outliers(attention)
        best = rank < count.clamp(max=most)
        step = (1 / (count.double() / n)).long().div(3, rounding_mode="floor").clamp(min=1)
        spread = (tokens % step == 0) & (tokens < max(1, n - 1)) & ~best
        return best | _evenly(spread, (most - best.sum()).minimum(spread.sum()), most)


def _ranks(attention: Tensor) -> Tensor:
    """(N,) long: place of every token by descending attention."""
    order = attention.sort(descending=True, stable=True).indices
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))


def _evenly(among: Tensor, count: Tensor, most: int) -> Tensor:
    """(N,) bool: `count`, at most `most`, of the tokens `among` (N,) which this is true of, at equal distances."""
    n = len(among)
    tokens = torch.nonzero_static(among, size=n, fill_value=n)[:, 0]
    number = torch.arange(most, device=among.device)
    places = ((number + 0.5) * (among.sum().double() / count.clamp(min=1)).float()).long()
    picked = tokens[places.clamp(max=n - 1)].masked_fill(number >= count, n)
    return torch.zeros(n + 1, dtype=torch.bool, device=among.device).index_fill_(0, picked, True)[:n]


def outliers(attention: Tensor) -> Tensor:
    """Count, (), the tokens whose attention (N,) is an outlier: at least 1 and at most a third of them."""
    share = torch.arange(1, 4, 2, device=attention.device) / 4
    low, high = torch.quantile(attention.float(), share)
    return (attention > high + 1.5 * (high - low)).sum().clamp(max=len(attention) // 3).clamp(min=1)


def _nearest(keys: Tensor, centres: Tensor, count: int) -> Tensor:
    """Return the tokens (M, count) whose keys are most similar to those of the centres, which are not among their own.

    The lower index comes first among equals.
    """
    unit = torch.nn.functional.normalize(keys.float(), dim=1, eps=1e-12)
    found = [centres.new_empty(0, count)]
    for block in centres.split(_BLOCK):
        cosine = (unit[block] @ unit.T).scatter_(1, block[:, None], -torch.inf)
        found.append(cosine.sort(dim=1, descending=True, stable=True).indices[:, :count])
    return torch.cat(found)
