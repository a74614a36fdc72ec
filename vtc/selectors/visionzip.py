"""VisionZip: tokens that [CLS] looks at, and an even spread of the others with what resembles them merged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.signals import MeanKeys, Signal
from ..core.sites import BeforeDecoder, Site
from ..registry import register_selector
from .saliency import SaliencySelector
from .schedule import check_fraction

__all__ = ["VisionZipSelector"]


@register_selector
@dataclass(frozen=True)
class VisionZipSelector(SaliencySelector):
    """Keep dominant tokens, which [CLS] looks at most, and contextual tokens that take up the rest.

    Dominant are the tokens with the most [CLS] attention in the layer that makes the features, averaged over heads. Of
    the R others, in raster order, every ``max(1, R // C)``-th is a contextual token, C in all. What is left flows into
    the contextual token whose key, averaged over heads, has the largest cosine. A contextual token becomes itself plus
    the mean of what flows into it; if that is nothing, it stays as it is.

    As released, but for four things. Tokens are merged behind the projector instead of before it. The [CLS] token,
    which the released code hands to the language model too and counts as a dominant token, is none here: only patches
    have a place in the prompt. Contextual tokens stay where they stand in the picture instead of following all dominant
    ones. And the released code for Qwen2.5-VL, whose tower has no [CLS], is ``score_source="received"``.

    Parameters
    ----------
    contextual
        Fraction of the budget for contextual tokens. The default is that of the settings of the paper for 64, 128 and
        192 tokens: 10, 20 and 30.
    score_source
        "cls", or "received": the attention that a token receives from all others, for towers without a [CLS] token.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    cost: ClassVar[str] = "K N d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    reads_features: ClassVar[bool] = False
    beside: ClassVar[tuple[Signal, ...]] = (MeanKeys(),)
    action: ClassVar[Action] = Action.MERGE

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("visionzip", "contextual", self.contextual)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose, and merge what is left."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        context = round(ctx.budget * self.contextual)
        dominant = kernels.topk_indices(self.saliency(ctx), ctx.budget - context)
        tokens = torch.arange(ctx.n, device=dominant.device)
        other = torch.ones_like(tokens, dtype=torch.bool).index_fill_(0, dominant, False)
        rest = torch.nonzero_static(other, size=ctx.n - len(dominant))[:, 0]
        targets = rest[:: max(1, len(rest) // max(1, context))][:context]
        keep = torch.cat([dominant, targets]).sort().values
        assign = kernels.nearest_slots(ctx[MeanKeys], keep, targets)
        followers = torch.zeros_like(keep).index_add_(0, assign.clamp(min=0), (assign >= 0).long()) - 1
        weight = (1 / followers.clamp(min=1))[assign.clamp(min=0)].index_fill(0, keep, 1.0)
        return Selection(ctx.n, keep, assign, weight.masked_fill(assign < 0, 0.0))
