"""How the modules of PixelRefer begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ....core.stage import ModelShape
from ..decoder import Decoder
from ..folder import Modules, begin_module, embedding_width
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
    width_out = embedding_width(PixelReferSelector.name, shape)
    source, width = reads(width_out, projector)
    settings: dict[str, Any] = {
        "source": source,
        "width": width,
        "width_out": width_out,
        "heads": heads,
        "iterations": iterations,
        "tokens": tokens,
    }
    modules, encoder = begin_module(PixelReferSelector.name, shape, ObjectEncoder, settings, seed)
    for last in (encoder.position, encoder.local.out_proj, encoder.around.out_proj):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    if encoder.projector is not None and projector is not None:
        copied_projector(encoder.projector, projector)
    return modules, encoder
