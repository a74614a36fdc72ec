"""The operations that methods share, as plain functions.

`reference` is the specification: plain PyTorch, any device. Callers import from here, so that a faster implementation
can be put underneath without touching a method.
"""

from __future__ import annotations

from .reference import (
    attention_exchange,
    bipartite_merge,
    context_relevance,
    farthest_point,
    max_sum,
    pagerank,
    patch_entropy,
    recycle_cells,
    topk_indices,
)

__all__ = [
    "attention_exchange",
    "bipartite_merge",
    "context_relevance",
    "farthest_point",
    "max_sum",
    "pagerank",
    "patch_entropy",
    "recycle_cells",
    "topk_indices",
]
