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
        """(B, M): the softmax of the products of whole queries and keys, over the root of their width."""
        parts = []
        for one in raw.sequences():
            query, keys = one.queries[:, :, :1].float(), one.keys.float()
            heads, width = query.shape[1], query.shape[3]
            keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
            logits = (query @ keys.transpose(2, 3)).sum(dim=1)[:, 0] / (heads * width) ** 0.5
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
        centres = self.centres(attention, most)
        is_rest = torch.ones(ctx.n, dtype=torch.bool, device=attention.device).index_fill_(0, centres, False)
        rest = torch.nonzero_static(is_rest, size=ctx.n - len(centres))[:, 0]
        # The token that stands for all of the rest stands where the best of them stood.
        last = rest.gather(0, attention[rest].argmax(dim=0, keepdim=True))
        chosen = torch.cat([centres, last])
        keep = chosen.sort().values
        slot = torch.searchsorted(keep, chosen)
        near = _nearest(ctx[VisionKeys], centres, min(self.neighbours, ctx.n - 1))
        token = torch.cat([centres, near.flatten(), rest])
        into = torch.cat([slot[:-1], slot[:-1].repeat_interleave(near.shape[1]), slot[-1].expand(len(rest))])
        weight = torch.cat([torch.ones_like(attention[centres]), attention[near.flatten()], attention[rest]])
        return Selection.from_entries(ctx.n, keep, token, into, weight)

    @abstractmethod
    def centres(self, attention: Tensor, most: int) -> Tensor:
        """Return the distinct centres, at most `most` and fewer than N, or as many as that if the budget counts."""


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
        """(M,) by descending attention."""
        count = most if self.count == "budget" else min(outliers(attention), most)
        return attention.sort(descending=True, stable=True).indices[:count]


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
        """(M,): outliers by descending attention, then the spread."""
        n = len(attention)
        ranked = attention.sort(descending=True, stable=True).indices
        tokens = torch.arange(n, device=ranked.device)
        if self.count == "budget":
            best = ranked[: most // 2]
            spread = _without(_evenly(tokens, most - len(best)), best)
            chosen = torch.cat([best, spread])
            return torch.cat([chosen, _evenly(_without(tokens, chosen), most - len(chosen))])
        count = outliers(attention)
        best = ranked[: min(count, most)]
        spread = _without(tokens[: max(1, n - 1) : max(1, int(1 / (count / n)) // 3)], best)
        return torch.cat([best, _evenly(spread, min(most - len(best), len(spread)))])


def _without(tokens: Tensor, others: Tensor) -> Tensor:
    return tokens[~torch.isin(tokens, others)]


def _evenly(tokens: Tensor, count: int) -> Tensor:
    """Return `count` of the tokens at equal distances."""
    places = (torch.arange(count, device=tokens.device) + 0.5) * (len(tokens) / max(1, count))
    return tokens[places.long()]


def outliers(attention: Tensor) -> int:
    """Count the tokens whose attention (N,) is an outlier: at least 1 and at most a third of them."""
    low, high = torch.quantile(attention.float(), attention.new_tensor([0.25, 0.75], dtype=torch.float32))
    found = int((attention > high + 1.5 * (high - low)).sum())
    return max(1, min(found, len(attention) // 3))


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
