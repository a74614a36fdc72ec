"""GemFilter: the first decoder layers read the whole prompt, and the model what their last query attends to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.context import VisualContext
from ..core.observations import DecoderAttention
from ..core.selector import ScoreSelector
from ..core.signals import ProbeSignal, Signal
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import at_depth, check_layer

__all__ = ["GemFilterSelector", "LastQueryLogits"]


@dataclass(frozen=True)
class LastQueryLogits(ProbeSignal):
    """Products of the prompt's last query with the keys of each token, summed over heads and pooled, (N,).

    Neither scaled nor normalised: the order would be the same for one head, and heads count by their logits.

    Parameters
    ----------
    layer
        As in `ProbeSignal`.
    kernel
        Odd length of the window of the mean along the prompt; zeros beyond its ends count. 1: none.
    """

    name: ClassVar[str] = "last_query_logits"
    axes: ClassVar[tuple[str, ...]] = ("N",)

    kernel: int = 5

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T)."""
        return raw.per_row(self._row)

    def _row(self, raw: DecoderAttention) -> Tensor:
        heads = raw.keys.shape[1]
        last = raw.queries[0, :, -1].float().unflatten(0, (heads, -1)).sum(dim=1)  # those that share keys
        logits = torch.einsum("hd,hnd->n", last, raw.keys[0, :, raw.past :].float())
        if self.kernel == 1:
            return logits
        return F.avg_pool1d(logits[None], self.kernel, stride=1, padding=self.kernel // 2)[0]


@register_selector
@dataclass(frozen=True)
class GemFilterSelector(ScoreSelector):
    """Keep what the last query of the prompt attends to in an early decoder layer, and run the model on that alone.

    The layers before `layer` read the whole prompt once, without a cache; ``score_j`` is the mean over the neighbours
    of ``j`` of ``sum over heads of q . k_j`` for the last query. Then the untouched model reads the best tokens from
    the start. That costs ``layer / L`` of a prefill, and pays if what leaves would cost more.

    Differences from the released code: only visual tokens leave, not text, nor ever the last token; tokens keep their
    positions unless ``positions="compact"`` asks for the authors' renumbering; and layer `layer` itself is not run
    through, because its queries and keys are all that is read.

    Parameters
    ----------
    layer
        Decoder layer (0-based) whose attention is read; None: 13 of 32 layers, as for Llama-3.1-8B, scaled.
    kernel
        Odd length of the pooling window along the prompt; 1: none.

    Raises
    ------
    ConfigError
        An option is invalid, or there is no such layer.

    References
    ----------
    "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    arXiv 2409.17422, algorithm 1.
    """

    name: ClassVar[str] = "gemfilter"
    paper: ClassVar[str] = "GemFilter, arXiv 2409.17422"
    cost: ClassVar[str] = "r decoder layers"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    reads_features: ClassVar[bool] = False

    layer: int | None = None
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_layer(self.name, "layer", self.layer)
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"gemfilter: kernel must be an odd integer, got {self.kernel!r}.")

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> GemFilterSelector:
        """Set `layer` for a decoder of this depth."""
        if shape is None or self.layer is not None:
            return self
        return dataclasses.replace(self, layer=max(1, at_depth(13, 32, shape.decoder_layers)))

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        signals: tuple[Signal, ...] = (LastQueryLogits(13 if self.layer is None else self.layer, self.kernel),)
        return (Stage(requires=signals),)

    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) pooled logits of the last query."""
        return ctx[LastQueryLogits].float()
