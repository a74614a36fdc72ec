"""FasterVLM: [CLS] attention of the layer that makes the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.context import VisualContext
from ..core.selector import ScoreSelector
from ..registry import register_selector
from .saliency import SaliencySelector

__all__ = ["FasterVlmSelector"]


@register_selector
@dataclass(frozen=True)
class FasterVlmSelector(SaliencySelector, ScoreSelector):
    """Keep the tokens that [CLS] looks at most in the layer that makes the features, averaged over heads.

    That layer is the last but one of LLaVA's tower, as released. `vtc-cls` with ``start_layer=-2`` is the same there.

    Parameters
    ----------
    score_source
        "cls", the method; or "received", a stand-in for towers without a [CLS] token: the attention that a token
        receives from all others. Never chosen silently.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
    arXiv 2412.01818.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818"
    cost: ClassVar[str] = "N d"
    reads_features: ClassVar[bool] = False

    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) attention averaged over heads."""
        return self.saliency(ctx)
