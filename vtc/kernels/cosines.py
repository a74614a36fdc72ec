"""Cosine similarities between rows, computed in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WORKSPACE = 64 * 2**20
"""Most bytes of a whole similarity matrix, where keeping it is faster."""

_STRIPE = 4096  # rows per block of a pass over all rows
_BLOCK = 192  # rows per block of half of the whole matrix


def with_inverse_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` (N, D), detached and at most float32, and the inverse norms (N,) float32 of its rows.

    The inverse norm of a zero row is finite, so that its cosine to every row is 0.
    """
    x = x.detach()
    x = x.float() if x.dtype == torch.float64 else x
    # In blocks, because the norm of a half-precision tensor makes a float32 copy of it.
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in x.split(_STRIPE)]
    return x, torch.cat(norms).clamp(min=1e-12).reciprocal()


def squared_norms(inverse: Tensor, weight: Tensor) -> Tensor:
    """Return the squared norms (N,) of rows scaled to norm `weight`, 0 for zero rows.

    They do not depend on the rows otherwise, so that rows of equal weight tie exactly.
    """
    return torch.where(inverse < 5e11, weight, 0.0).square()


def stripes(x: Tensor, scale: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield products (M, rows) of the rows `others` of `x` with blocks of all rows, every row scaled by `scale`."""
    pivots = x.index_select(0, others).float() * scale[others, None]
    for start in range(0, x.shape[0], _STRIPE):
        rows = slice(start, start + _STRIPE)
        yield rows, (pivots @ x[rows].float().T).mul_(scale[rows])


def products(x: Tensor, scale: Tensor, others: Tensor) -> Tensor:
    """Concatenate all `stripes` to (M, N)."""
    return torch.cat([part for _, part in stripes(x, scale, others)], dim=1)


def upper_blocks(x: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the upper triangle of all products in blocks (rows, N - first row); the matrix is symmetric."""
    for start in range(0, x.shape[0], _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = x[rows].float() @ x[start:].float().T
        block *= scale[rows, None]
        block *= scale[start:]
        yield rows, block


def write_block(table: Tensor, rows: slice, block: Tensor) -> None:
    """Write one of the `upper_blocks` into both triangles of the whole matrix (N, N)."""
    table[rows, rows.start :] = block
    table[rows.start :, rows] = block.T
