"""PyramidDrop: the same share leaves at a few evenly spaced layers of the decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.context import VisualContext
from ..core.observations import EnteredAttention, Observation
from ..core.selection import Selection
from ..core.selector import ScoreSelector
from ..core.signals import Signal, TextAttention
from ..core.sites import DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_layers, layers_at_depth

__all__ = ["EnteringAttention", "PyramidDropSelector"]

_LAYERS = (8, 16, 24)  # of 32


@dataclass(frozen=True)
class EnteringAttention(TextAttention):
    """`TextAttention` in the layer that is entered, as it would be if no token left, (heads, queries, N)."""

    name: ClassVar[str] = "entering_attention"
    reads: ClassVar[type[Observation]] = EnteredAttention


@register_selector
@dataclass(frozen=True)
class PyramidDropSelector(ScoreSelector):
    """Keep what the last token of the prompt attends to most, a smaller part on entering each of three decoder layers.

    The layers are 8, 16 and 24 of 32. Attention is that of the layer that is entered, whose queries and keys are
    computed ahead for it, averaged over the heads. With S stages and N tokens at the input of the language model, stage
    s keeps

        floor(N lambda^s),   lambda = keep_ratio^(1 / S),

    at least 1. So `keep_ratio` is what is left at last: the paper's 0.5 at each of three stages is 0.125. Layers in
    front of the first stage see every token.

    Two differences from the released code: positions stay as they were, while theirs are numbered anew; and every
    picture has a budget of its own. In `vtc.select` it is one stage, with the budget that is asked for.

    Parameters
    ----------
    layers
        Decoder layers (0-based) on entering which tokens leave, ascending, at least 1; None: those above, in proportion
        to the depth.

    Raises
    ------
    ConfigError
        The layers are no such, or a count of tokens is asked for of a model: the budget is shared among layers.

    References
    ----------
    "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv
    2410.17247, and github.com/Cooperx521/PyramidDrop at 6444f304.
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    cost: ClassVar[str] = "N d^2"
    requires: ClassVar[tuple[Signal, ...]] = (EnteringAttention(),)
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers("pyramiddrop", self.layers))

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> PyramidDropSelector:
        """Set `layers` for a decoder of this depth."""
        if self.layers is not None:
            return self
        depth = 32 if shape is None else shape.decoder_layers
        return dataclasses.replace(self, layers=layers_at_depth(_LAYERS, 32, depth))

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Drop tokens on entering each of `layers`."""
        if shape is not None and keep_ratio == 1:
            return ()
        layers = self.resolve(shape, keep_ratio).layers or ()
        share = None
        if shape is not None:
            if keep_ratio is None:
                raise ConfigError(
                    "pyramiddrop shares its budget among decoder layers: give keep_ratio, not keep_tokens."
                )
            share = keep_ratio ** (1 / len(layers))
        return tuple(Stage(DecoderLayer(layer), self.requires, keep=share) for layer in layers)

    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) attention of the last query, averaged over heads."""
        return ctx[EnteringAttention][:, -1].float().mean(dim=0)

    def select(self, ctx: VisualContext) -> Selection:
        """Keep the best, as many as the schedule says."""
        if ctx.tokens_at_input is not None and ctx.keep_ratio is not None and isinstance(ctx.site, DecoderLayer):
            stage = (self.layers or ()).index(ctx.site.layer) + 1
            left = max(1, int(ctx.tokens_at_input * ctx.keep_ratio**stage + 1e-9))
            ctx = dataclasses.replace(ctx, budget=min(left, ctx.n))
        return super().select(ctx)
