"""Cosines of rows with rows, some at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WORKSPACE = 64 * 2**20
"""Bytes that the matrix of all products may take where it is worth having."""

_STRIPE = 4096  # rows that are looked at in one go where all are
_BLOCK = 512  # rows of the whole matrix that are computed in one go


def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (N, D), at most float32 and out of the graph, and (N,) float32: what makes the norm of each of its rows 1.

    Zero rows stay zero: their cosine to everything is 0.
    """
    x = x.detach()
    x = x.float() if x.dtype == torch.float64 else x
    # In stripes: a norm of half precision makes a float32 copy of all that it is given.
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in x.split(_STRIPE)]
    return x, torch.cat(norms).clamp(min=1e-12).reciprocal()


def squared_norms(inverse: Tensor, weight: Tensor) -> Tensor:
    """(N,): of rows made as long as `weight` says; exactly, so that equal weights are ties, and 0 for zero rows."""
    return torch.where(inverse < 5e11, weight, 0.0).square()


def stripes(x: Tensor, scale: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Products (M, rows) of the rows `others` of `x` with all rows, stripe by stripe, each row times its `scale`."""
    pivots = x.index_select(0, others).float() * scale[others, None]
    for start in range(0, x.shape[0], _STRIPE):
        rows = slice(start, start + _STRIPE)
        yield rows, (pivots @ x[rows].float().T).mul_(scale[rows])


def products(x: Tensor, scale: Tensor, others: Tensor) -> Tensor:
    """(M, N): all of `stripes` side by side."""
    return torch.cat([part for _, part in stripes(x, scale, others)], dim=1)


def upper_blocks(x: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """All products, block by block, each (rows, N - first row): those with earlier rows are in the blocks before."""
    for start in range(0, x.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = x[rows].float() @ x[start:].float().T
        block *= scale[rows, None]
        block *= scale[start:]
        yield rows, block


def write_block(table: Tensor, rows: slice, block: Tensor) -> None:
    """Put one of `upper_blocks` into both halves of the whole matrix (N, N)."""
    table[rows, rows.start :] = block
    table[rows.start :, rows] = block.T
