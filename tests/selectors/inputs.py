"""Contexts with everything a method may ask for, so that every registered method can be put through the same tests."""

from __future__ import annotations

import math

import torch

from vtc.core.context import Grid, VisualContext, grid_origin
from vtc.selectors import Selector

WIDTH, HEADS, LAYERS, TEXT = 12, 2, 3, 5
FLOATS = (
    "features",
    "cls_attention",
    "received_attention",
    "attention",
    "keys",
    "pre_projector",
    "pixels",
    "text_embeds",
    "text_attention",
    "clip_relevance",
    "hidden_states",
    "context_relevance",
    "entropy",
    "modality_attention",
    "attention_exchange",
    "pagerank",
)


def make_context(
    selector: Selector,
    budget: int,
    grids: tuple[Grid, ...] = ((1, 6, 6),),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VisualContext:
    """Random tensors for the first stage of `selector`; the same seed gives the same values in every dtype."""
    n = sum(math.prod(grid) for grid in grids)
    draw = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    def probabilities(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).softmax(-1).to(dtype)

    return VisualContext(
        features=normal(n, WIDTH),
        budget=budget,
        generator=torch.Generator().manual_seed(seed),
        grids=grids,
        modality="video" if any(t > 1 for t, _, _ in grids) else "image",
        layer_idx=selector.stages()[0].layer,
        cls_attention=probabilities(LAYERS, HEADS, n),
        received_attention=probabilities(LAYERS, HEADS, n),
        attention=probabilities(n, n),
        keys=normal(n, WIDTH),
        pre_projector=normal(4 * n, WIDTH),
        group=torch.arange(n).repeat_interleave(4),
        pixels=normal(4 * n, 3 * 14 * 14),
        text_embeds=normal(TEXT, WIDTH),
        text_attention=probabilities(HEADS, TEXT, n),
        clip_relevance=normal(n),
        hidden_states=normal(n, WIDTH),
        context_relevance=probabilities(n),
        entropy=probabilities(n),
        modality_attention=probabilities(2, n),
        attention_exchange=torch.tensor([0.3, 0.0], dtype=dtype),
        pagerank=probabilities(n),
        origin=grid_origin(grids),
    ).check()
