"""How the modules of PixelRefer begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....core.stage import ModelShape
from ....errors import ConfigError
from ..decoder import Decoder
from ..folder import Modules
from ..llava_mini.training import copied_projector, reads
from .method import PixelReferSelector
from .module import ObjectEncoder

__all__ = ["begin"]


def begin(
    shape: ModelShape,
    projector: Mapping[str, Tensor] | None = None,
    decoder: Decoder | None = None,
    *,
    heads: int = 8,
    iterations: int = 3,
    tokens: int = 16,
    seed: int = 0,
) -> tuple[Modules, ObjectEncoder]:
    """Make untrained modules for a model: what they add is zero, so that they do what the method does without any.

    Parameters
    ----------
    shape
        Of the model.
    projector
        As for `llava-mini`.
    decoder
        Not used.
    heads
        Of both attentions.
    iterations
        Of the grouping; the released Lite code has 3, the larger one 5.
    tokens
        Most tokens of an object: 16 in the released Lite code, 32 in its training scripts.
    seed
        Of the weights.

    Raises
    ------
    ConfigError
        The model's sizes are not known, or no modules of these sizes can be made.
    """
    if shape.width is None:
        raise ConfigError("pixelrefer: modules are made for one model, but the width of its embeddings is not known.")
    source, width = reads(shape.width, projector)
    settings: dict[str, Any] = {
        "source": source,
        "width": width,
        "width_out": shape.width,
        "heads": heads,
        "iterations": iterations,
        "tokens": tokens,
    }
    modules = Modules.of(PixelReferSelector.name, shape, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ObjectEncoder(**settings)
    for last in (encoder.position, encoder.local.out_proj, encoder.around.out_proj):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    if encoder.projector is not None and projector is not None:
        copied_projector(encoder.projector, projector)
    return modules, encoder
