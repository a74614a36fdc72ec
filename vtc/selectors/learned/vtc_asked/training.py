"""How the scorer of `vtc-asked` begins, and what it learns from: where the untouched model looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....core.stage import ModelShape
from ..decoder import Decoder
from ..folder import Modules, begin_module, embedding_width
from .method import VtcAskedSelector
from .module import Heard, Scorer

__all__ = ["begin", "loss", "study"]


def begin(
    shape: ModelShape,
    projector: Mapping[str, Tensor] | None = None,
    decoder: Decoder | None = None,
    *,
    inner: int = 128,
    heads: int = 4,
    blocks: int = 2,
    seed: int = 0,
) -> tuple[Modules, Scorer]:
    """Make an untrained scorer for a model: it gives every token the same score.

    Parameters
    ----------
    shape
        Of the model.
    projector, decoder
        Not used.
    inner, heads, blocks
        As in `Scorer`.
    seed
        Of the weights.

    Raises
    ------
    ConfigError
        The model's sizes are not known, or an argument is invalid.
    """
    width = embedding_width(VtcAskedSelector.name, shape)
    settings: dict[str, Any] = {"width": width, "inner": inner, "heads": heads, "blocks": blocks}
    modules, scorer = begin_module(VtcAskedSelector.name, shape, Scorer, settings, seed)
    for weight in scorer.score[-1].parameters():
        nn.init.zeros_(weight)
    return modules, scorer


@torch.no_grad()
def study(module: Scorer, read: Callable[[], Tensor]) -> list[Heard]:
    """Read one sample with all tokens, and hear of each of its pictures where the prompt's last token looks."""
    with module.listening() as heard:
        read()
    return heard


def loss(module: Scorer, found: list[Heard]) -> Tensor:
    """Compute KL(a || softmax(s)) of scores s and attention a, a mean over the pictures of a prompt.

    a is the attention to each token, a mean over layers and heads, divided by its sum over the picture.
    """
    parts = []
    for each in found:
        attention = torch.stack(each.attention).mean(dim=0)
        scores = module(each.features, each.places, each.text)
        parts.append(functional.kl_div(scores.log_softmax(0), attention / attention.sum(), reduction="sum"))
    return torch.stack(parts).mean()
