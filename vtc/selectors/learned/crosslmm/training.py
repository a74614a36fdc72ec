"""How the modules of CrossLMM begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....core.stage import ModelShape
from ....errors import ConfigError
from ..attention import between_layers
from ..decoder import Decoder
from ..folder import Modules
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
    if shape.width is None:
        raise ConfigError("crosslmm: modules are made for one model, but the width of its embeddings is not known.")
    settings: dict[str, Any] = {
        "width": shape.width,
        "layers": between_layers(shape.decoder_layers, every),
        "inner": shape.width // 2 if inner is None else inner,
        "heads": heads,
    }
    modules = Modules.of(CrossLmmSelector.name, shape, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return modules, CrossAttentions(**settings)
