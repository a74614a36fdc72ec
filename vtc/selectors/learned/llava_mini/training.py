"""How the modules of LLaVA-Mini begin before they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....core.stage import ModelShape
from ....errors import ConfigError
from ..folder import Modules
from .method import LlavaMiniSelector
from .module import Compressor

__all__ = ["begin"]

_PROJECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}


def begin(
    shape: ModelShape, projector: Mapping[str, Tensor] | None = None, *, side: int = 2, heads: int = 8, seed: int = 0
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
    side, heads
        C, and the heads of the attention.
    seed
        Of the queries.

    Raises
    ------
    ConfigError
        The model's sizes are not known, or no modules of these sizes can be made.
    """
    if shape.width is None:
        raise ConfigError("llava-mini: modules are made for one model, but the width of its embeddings is not known.")
    source, width = "projected", shape.width
    if projector is not None and set(projector) == _PROJECTOR:
        source, width = "tower", projector["linear_1.weight"].shape[1]
    settings: dict[str, Any] = {
        "source": source,
        "width": width,
        "width_out": shape.width,
        "side": side,
        "heads": heads,
    }
    modules = Modules.of(LlavaMiniSelector.name, shape, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        compressor = Compressor(**settings)
    attention = compressor.resampler.attn
    with torch.no_grad():
        nn.init.eye_(attention.out_proj.weight)
        attention.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
    if compressor.projector is not None and projector is not None:
        compressor.projector.load_state_dict({name: value.detach().float().cpu() for name, value in projector.items()})
    return modules, compressor
