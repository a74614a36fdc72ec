"""ToDRE: the most diverse tokens before the language model, none behind the layer where the text stops looking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.observations import DecoderAttention, Observation
from ..core.ranges import Choice, Float, Int, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import ClsAttention, ReceivedAttention, Signal
from ..core.sites import BeforeDecoder, DecoderLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_fraction, check_layer

__all__ = ["ToDreSelector"]

_PIVOTS: dict[str, Signal | None] = {
    "cls": ClsAttention((-1,)),
    "received": ReceivedAttention((-1,)),
    "random": None,
    "center": None,
}
_DIVERSITY: dict[str, Callable[[Tensor, int, int | Tensor], Tensor]] = {
    "sum": kernels.max_sum,
    "min": kernels.farthest_point,
}


@dataclass(frozen=True)
class AttentionExchange(Signal):
    """Share of attention from the text to the visual tokens, and from these to the text, over the prompt, (2,).

    Parameters
    ----------
    text
        "after": the text behind the first visual token counts; "all": the whole prompt's.
    """

    name: ClassVar[str] = "attention_exchange"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("text to visual, visual to text",)
    per_token: ClassVar[bool] = False

    text: str = "after"

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, 2)."""
        groups = raw.text_and_visual(self.text)
        received = kernels.received_from(
            raw.queries, raw.keys, raw.scaling, raw.visibility, groups, known=raw.key_length
        )
        return (received * groups.flip(1)).sum(dim=2)


@register_selector
@dataclass(frozen=True)
class ToDreSelector(Selector):
    """Keep a diverse subset; drop it whole once text and vision hardly attend to each other any more.

    Stage 1, before the language model: start at a pivot token, then always add the token that is least similar to
    those chosen so far. Stage 2, on entering decoder layer `exit_layer`: if the text gives less than `tau` of its
    attention to the visual tokens, and they less than `tau` of theirs to the text, no visual token goes on, and the
    layers from there on keep none in their caches. With one image before the question nothing visual can see the
    question, so the text alone decides.

    ``keep_ratio=1`` keeps everything, at both stages. A `keep_tokens` of more than there are leaves stage 2 alone.

    Parameters
    ----------
    pivot
        Where stage 1 starts. "cls": the token with the most [CLS] attention in the last layer of the tower, the method.
        For towers without a [CLS] token: "received", the token that receives the most attention there; "random"; or
        "center", the middle of the picture. Where there is a thumbnail beside one grid of tiles, the pivot lies in it.
    diversity
        "sum" (version 2 of the paper): least similar to the chosen tokens together; "min" (version 1): to the closest.
    exit_layer
        Decoder layer (0-based) of stage 2, whose ratios are those of the layer before it; None: 7/8 of the depth.
    tau
        Threshold of both ratios; 0 switches stage 2 off.
    text
        Which text stage 2 asks. "after": all behind the first visual token of the prompt, so that what stands before it
        counts as the system's; "all": the whole prompt's.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757v2.
    """

    name: ClassVar[str] = "todre"
    paper: ClassVar[str] = "ToDRE, arXiv 2505.18757"
    cost: ClassVar[str] = "N^2 d"
    requires: ClassVar[tuple[Signal, ...]] = (ClsAttention((-1,)),)
    instead: ClassVar[Mapping[type[Signal], str]] = {ClsAttention: 'pivot="random", "received" or "center"'}

    pivot: str = "cls"
    diversity: str = "sum"
    exit_layer: int | None = None
    tau: float = 0.10
    text: str = "after"

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the distance, of the exit layer and of its threshold."""
        return {
            "diversity": Choice(("sum", "min")),
            "exit_layer": Int(max(1, depth // 2), depth - 1),
            "tau": Float(0.0, 0.5),
        }

    def __post_init__(self) -> None:
        if self.pivot not in _PIVOTS:
            raise ConfigError(f"todre: pivot must be one of {sorted(_PIVOTS)}, got {self.pivot!r}.")
        if self.diversity not in _DIVERSITY:
            raise ConfigError(f"todre: diversity must be one of {sorted(_DIVERSITY)}, got {self.diversity!r}.")
        if self.text not in ("after", "all"):
            raise ConfigError(f'todre: text must be "after" or "all", got {self.text!r}.')
        if self.exit_layer is not None:
            check_layer("todre", "exit_layer", self.exit_layer, least=1)
        check_fraction("todre", "tau", self.tau)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Select before the language model, and drop all or nothing on entering `exit_layer`."""
        pivot = _PIVOTS[self.pivot]
        first = Stage(requires=() if pivot is None else (pivot,))
        if shape is None or keep_ratio == 1 or self.tau == 0:
            return (first,)
        layer = max(1, 7 * shape.decoder_layers // 8) if self.exit_layer is None else self.exit_layer
        return first, Stage(DecoderLayer(layer), (AttentionExchange(self.text),), keep=1.0)

    def select(self, ctx: VisualContext) -> Selection:
        """Select the diverse subset; at stage 2 all or nothing."""
        if isinstance(ctx.site, BeforeDecoder):
            spread = _DIVERSITY[self.diversity](ctx.features, min(ctx.budget, ctx.n), self._pivot(ctx))
            return Selection.from_indices(ctx.n, spread)
        if bool((ctx[AttentionExchange].float() < self.tau).all()):
            return Selection.from_indices(ctx.n, torch.empty(0, dtype=torch.long, device=ctx.features.device))
        return Selection.full(ctx.n, ctx.features.device)

    def _pivot(self, ctx: VisualContext) -> int | Tensor:
        """Return the index of the first token."""
        t, h, w = ctx.grids[0]
        candidates = t * h * w if len(ctx.grids) == 2 else ctx.n  # a thumbnail comes before its tiles
        pivot = _PIVOTS[self.pivot]
        if pivot is not None:
            scores = ctx[type(pivot)][-1].float().mean(dim=0)[:candidates]
            return scores.argmax()  # the first of equals
        if self.pivot == "random":
            return int(torch.randint(candidates, (1,), generator=ctx.generator))
        return (t // 2 * h + h // 2) * w + w // 2
