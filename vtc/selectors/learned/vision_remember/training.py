"""How the modules of Vision Remember begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.stage import ModelShape
from ....errors import ConfigError
from ..attention import between_layers
from ..decoder import Decoder
from ..folder import Modules, begin_module
from .method import VisionRememberSelector
from .module import Resamplers

__all__ = ["begin"]


def begin(
    shape: ModelShape,
    projector: Mapping[str, Tensor] | None = None,
    decoder: Decoder | None = None,
    *,
    levels: Sequence[int] | None = None,
    every: int | None = None,
    inner: int | None = None,
    heads: int = 4,
    seed: int = 0,
) -> tuple[Modules, Resamplers]:
    """Make untrained modules for a model: matrices as `nn.Linear` begins, the last of each attention zero.

    Parameters
    ----------
    shape
        Of the model.
    projector, decoder
        Not used.
    levels
        Layers of the tower (0-based); None: the one that feeds the projector, and those at a third and two thirds of
        the way to it.
    every
        They stand in front of every so many decoder layers; None: 4, or in a shallow decoder so many that there are two
        places at least.
    inner
        Width of queries, keys and values; None: half of the language model's.
    heads
        Of the attentions.
    seed
        Of the matrices.

    Raises
    ------
    ConfigError
        The model's sizes are not known, or no modules of these sizes can be made.
    """
    if shape.width is None or shape.vision_width is None or shape.feature_layer is None:
        raise ConfigError(
            "vision-remember: modules are made for one model, but the widths of its embeddings and of its tower, and "
            "the layer of the tower that it reads, are not all known."
        )
    last = shape.feature_layer
    settings: dict[str, Any] = {
        "width": shape.width,
        "vision_width": shape.vision_width,
        "levels": sorted({last // 3, 2 * last // 3, last}) if levels is None else levels,
        "layers": between_layers(shape.decoder_layers, every),
        "inner": shape.width // 2 if inner is None else inner,
        "heads": heads,
    }
    return begin_module(VisionRememberSelector.name, shape, Resamplers, settings, seed)
