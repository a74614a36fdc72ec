"""VTC-CLS: [CLS] attention summed over the last layers of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.context import VisualContext
from ..core.ranges import Int, Range
from ..core.selector import ScoreSelector
from ..core.signals import ClsAttention, Signal
from ..core.sites import BeforeDecoder, DecoderLayer, Site, VisionLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .saliency import SOURCES, check_source

__all__ = ["VtcClsSelector"]


@register_selector
@dataclass(frozen=True)
class VtcClsSelector(ScoreSelector):
    """Keep the tokens that the [CLS] token looks at most.

    The score of a token is the sum, over the tower layers `start_layer` .. feature layer, of the attention probability
    that [CLS] gives it, averaged over heads; no layer weights, no renormalisation for the [CLS] column. Sums run in
    float32 (the released code adds in the tower's precision, so scores closer than that may order differently).

    Parameters
    ----------
    start_layer
        First layer of the ensemble, counted like a Python index over the tower's layers. The default, -8, is layer 16
        of the 24 layers of CLIP ViT-L, as released.
    score_source
        "cls", the method; or "received", a stand-in for towers without a [CLS] token: the attention that a token
        receives from all others. Never chosen silently.

    Raises
    ------
    ConfigError
        An option is invalid, or the tower has no such layer.

    References
    ----------
    "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
    """

    name: ClassVar[str] = "vtc-cls"
    paper: ClassVar[str] = "VTC-CLS, arXiv 2412.05819"
    cost: ClassVar[str] = "N d"
    sites: ClassVar[tuple[type[Site], ...]] = (VisionLayer, BeforeDecoder, DecoderLayer)
    reads_features: ClassVar[bool] = False
    instead: ClassVar[Mapping[type[Signal], str]] = {ClsAttention: 'score_source="received"'}

    start_layer: int = -8
    score_source: str = "cls"

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """The first layer of the ensemble, from the feature layer alone to two dozen."""
        return {"start_layer": Int(-24, -1)}

    def __post_init__(self) -> None:
        if isinstance(self.start_layer, bool) or not isinstance(self.start_layer, int):
            raise ConfigError(f"vtc-cls: start_layer must be an integer, got {self.start_layer!r}.")
        check_source("vtc-cls", self.score_source)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model, with the attention of layers `start_layer` to the feature layer."""
        signal = SOURCES[self.score_source]
        if shape is None or shape.vision_layers is None or shape.feature_layer is None:
            return (Stage(requires=(signal(),)),)
        return (Stage(requires=(signal(self.layers(shape.vision_layers, shape.feature_layer)),)),)

    def layers(self, depth: int, feature_layer: int) -> tuple[int, ...]:
        """Layers of the ensemble in a tower of `depth` layers."""
        start = self.start_layer + depth if self.start_layer < 0 else self.start_layer
        if not 0 <= start <= feature_layer:
            raise ConfigError(
                f"vtc-cls: start_layer={self.start_layer} is layer {start} of this tower, but it must lie within "
                f"0..{feature_layer} (or {-depth}..{feature_layer - depth}): the tower has {depth} layers and layer "
                f"{feature_layer} makes the features."
            )
        return tuple(range(start, feature_layer + 1))

    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) sum over layers of the mean over heads."""
        return ctx[SOURCES[self.score_source]].float().mean(dim=1).sum(dim=0)
