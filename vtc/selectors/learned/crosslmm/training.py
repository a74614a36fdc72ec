"""How the modules of CrossLMM begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ....core.stage import ModelShape
from ..attention import between_layers
from ..decoder import Decoder
from ..folder import Modules, begin_module, embedding_width
from .method import CrossLmmSelector
from .module import CrossAttentions

__all__ = ["begin"]


def begin(
    shape: ModelShape,
    projector: Mapping[str, Tensor] | None = None,
    decoder: Decoder | None = None,
    *,
    every: int | None = None,
    inner: int | None = None,
    heads: int = 4,
    seed: int = 0,
) -> tuple[Modules, CrossAttentions]:
    """Make untrained modules for a model: matrices as `nn.Linear` begins, gates at zero.

    Parameters
    ----------
    shape
        Of the model.
    projector, decoder
        Not used.
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
    width = embedding_width(CrossLmmSelector.name, shape)
    settings: dict[str, Any] = {
        "width": width,
        "layers": between_layers(shape.decoder_layers, every),
        "inner": width // 2 if inner is None else inner,
        "heads": heads,
    }
    return begin_module(CrossLmmSelector.name, shape, CrossAttentions, settings, seed)
