"""How the modules of LLaVA-Mini begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....core.stage import ModelShape
from ....errors import ConfigError
from ..decoder import Decoder
from ..folder import Modules, begin_module, embedding_width
from .method import LlavaMiniSelector
from .module import Compressor

__all__ = ["begin", "copied_projector", "reads"]

_PROJECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}


def begin(
    shape: ModelShape,
    projector: Mapping[str, Tensor] | None = None,
    decoder: Decoder | None = None,
    *,
    side: int = 2,
    heads: int = 8,
    fusion: int = 0,
    seed: int = 0,
) -> tuple[Modules, Compressor]:
    """Make untrained modules for a model.

    Queries are drawn from N(0, 0.02^2) as in the code. Unlike there, the matrices of the attention begin as the
    identity: the first tokens are means of normalised features, weighted by how near to each query they stand.

    Parameters
    ----------
    shape
        Of the model.
    projector
        Weights of its projector, if that is a two-layer MLP with the names of LLaVA 1.5: the modules then read the
        tower and begin with a copy. None, or any other: they read projected features.
    decoder
        The model's, for a fusion, which takes its shape and begins with copies of its first layers where they are
        Llama's: their output is not used before training.
    side, heads
        C, and the heads of the attention.
    fusion
        Layers that fuse the tokens with the text; the paper has 4.
    seed
        Of the queries.

    Raises
    ------
    ConfigError
        The model's sizes are not known, or no modules of these sizes can be made.
    """
    width_out = embedding_width(LlavaMiniSelector.name, shape)
    source, width = reads(width_out, projector)
    settings: dict[str, Any] = {
        "source": source,
        "width": width,
        "width_out": width_out,
        "side": side,
        "heads": heads,
    }
    if fusion:
        if decoder is None:
            raise ConfigError("llava-mini: a fusion takes the shape of the model's decoder, which is not known.")
        settings["fusion"] = {**decoder.shape, "layers": fusion}
    modules, compressor = begin_module(LlavaMiniSelector.name, shape, Compressor, settings, seed)
    attention = compressor.resampler.attn
    with torch.no_grad():
        nn.init.eye_(attention.out_proj.weight)
        attention.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
    if compressor.projector is not None and projector is not None:
        copied_projector(compressor.projector, projector)
    if compressor.fusion is not None and decoder is not None:
        compressor.fusion.adopt(decoder.layers)
    return modules, compressor


def reads(width: int, projector: Mapping[str, Tensor] | None) -> tuple[str, int]:
    """Say what modules read, and how wide that is; `width` is that of the embeddings.

    The "tower", where they can begin with a copy of the projector, or else the features that it has "projected".
    """
    if projector is not None and set(projector) == _PROJECTOR:
        return "tower", projector["linear_1.weight"].shape[1]
    return "projected", width


def copied_projector(module: nn.Module, projector: Mapping[str, Tensor]) -> None:
    """Give a `Projector` the weights of the model's."""
    module.load_state_dict({name: value.detach().float().cpu() for name, value in projector.items()})
