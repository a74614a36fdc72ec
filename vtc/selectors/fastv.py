"""FastV: drop what the last text token does not look at, inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.context import VisualContext
from ..core.selector import ScoreSelector
from ..core.signals import Signal, TextAttention
from ..core.sites import DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector

__all__ = ["FastVSelector"]


@register_selector
@dataclass(frozen=True)
class FastVSelector(ScoreSelector):
    """Keep, from decoder layer `layer` on, the tokens that the last query attended to most in the layer before.

    Layers before `layer` see every token, so they save nothing and their caches keep their length.

    Parameters
    ----------
    layer
        Decoder layer (0-based) on entering which tokens are dropped; at least 1, because the scores are the attention
        of layer `layer` - 1. The paper's K.

    Raises
    ------
    ConfigError
        `layer` is not an integer of at least 1.

    References
    ----------
    "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"
    cost: ClassVar[str] = "N d"
    requires: ClassVar[tuple[Signal, ...]] = (TextAttention(),)
    sites: ClassVar[tuple[type[Site], ...]] = (DecoderLayer,)
    reads_features: ClassVar[bool] = False

    layer: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ConfigError(
                f"fastv: layer must be an integer of at least 1 (scores come from layer - 1), got {self.layer!r}."
            )

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, on entering decoder layer `layer`."""
        return (Stage(DecoderLayer(self.layer), requires=self.requires),)

    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) attention of the last query, averaged over heads."""
        return ctx[TextAttention][:, -1].float().mean(dim=0)
