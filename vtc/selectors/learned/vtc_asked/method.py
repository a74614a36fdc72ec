"""The library's own method where the question counts: `vtc`, with a learned quality of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....core.actions import Action
from ....core.context import VisualContext
from ....core.selection import Selection
from ....core.signals import Signal, TextAttention, TextEmbeds
from ....core.sites import BeforeDecoder, DecoderLayer, Site
from ....core.stage import ModelShape, Stage
from ....registry import register_selector
from ...schedule import check_number
from ...vtc import Place, VtcSelector
from ..trained import TrainedSelector
from .module import Heard, Scorer

__all__ = ["VtcAskedSelector", "taught_layers"]


@register_selector
@dataclass(frozen=True)
class VtcAskedSelector(TrainedSelector):
    """Choose and merge as `vtc` does, with a learned quality: what the decoder will look at, given the question.

    A small scorer reads the input embeddings of the prompt's text and the features and places of the visual tokens,
    and tells the logarithm s_i of the attention that the last token of the prompt would give to token i inside the
    decoder (`Scorer`). The quality of `vtc`'s point process is

        q_i = exp(exponent * (s_i - max s)).

    [CLS] attention is not used. Everything else is as in `vtc`, which see. Without text in the prompt all q_i are 1.

    The scorer is trained by ``vtc train vtc-asked``, on the user's own prompts and without labels: the model reads them
    uncompressed, and the scorer imitates the attention in the second half of its decoder. What is chosen is chosen for
    the question that came with the picture: later turns about something else find less of what they need than with
    `vtc`.

    Parameters
    ----------
    modules
        Folder made by ``vtc train vtc-asked``.
    exponent
        How much the question counts; 0: `vtc` without [CLS] attention.
    merge_weight
        As in `vtc`.
    imitate
        Keep all tokens, and let the scorer hear what it is to imitate; for training.

    Raises
    ------
    ConfigError
        The folder cannot be read, or there is none; the modules were made for another model; an option is invalid.

    References
    ----------
    This library; docs/measurements.md.
    """

    name: ClassVar[str] = "vtc-asked"
    paper: ClassVar[str] = "vtc, this library's own"
    cost: ClassVar[str] = "N d + N T + K N (d + K)"
    requires: ClassVar[tuple[Signal, ...]] = (Place(), TextEmbeds())
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    module_class: ClassVar[type[nn.Module]] = Scorer

    exponent: float = 0.25
    merge_weight: float = 0.5
    imitate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("vtc-asked", "exponent", self.exponent, 0, 10)
        check_number("vtc-asked", "merge_weight", self.merge_weight, 0, 10)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model; to imitate, also on entering the layers whose attention teaches."""
        if self.imitate and shape is not None:
            layers = (Stage(DecoderLayer(layer), (TextAttention(),)) for layer in taught_layers(shape.decoder_layers))
            return (Stage(requires=self.requires), *layers)
        return (Stage(requires=self.requires, action=Action.MERGE if self.merge_weight else Action.KEEP),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose and merge; to imitate, listen and keep all."""
        if self.imitate:
            self._listen(ctx)
            return Selection.full(ctx.n, ctx.features.device)
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        if self.module is None:
            raise self.without_modules()
        return VtcSelector(merge_weight=self.merge_weight).chosen(ctx, self._quality(ctx))

    def _quality(self, ctx: VisualContext) -> Tensor | None:
        text = ctx[TextEmbeds]
        if not len(text) or not self.exponent:
            return None
        scores = self.module.to(ctx.features.device)(ctx.features, ctx[Place], text)
        return torch.exp(self.exponent * (scores - scores.max()))

    def _listen(self, ctx: VisualContext) -> None:
        heard = None if self.module is None else self.module.heard
        if heard is None:
            return
        if isinstance(ctx.site, BeforeDecoder):
            heard.append(Heard(ctx.features.detach(), ctx[Place], ctx[TextEmbeds].detach()))
            return
        # Pictures come in the same order at every layer.
        fewest = min(heard, key=lambda each: len(each.attention))
        fewest.attention.append(ctx[TextAttention][:, -1].float().mean(dim=0))


def taught_layers(depth: int) -> tuple[int, ...]:
    """Return the decoder layers (0-based) before which the attention of the layer in front is read: the second half."""
    return tuple(range(max(1, depth // 2), depth))
