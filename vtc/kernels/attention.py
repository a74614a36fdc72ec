"""Rows and sums of an attention matrix, without the matrix."""

from __future__ import annotations

import torch


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, scaling: float, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax rows of chosen queries.

    Parameters
    ----------
    query : Tensor (B, H, R, d)
        The chosen queries only.
    key : Tensor (B, Hkv, M, d)
        Hkv divides H: each key head serves H / Hkv query heads.
    scaling : float
        Factor on the logits.
    allowed : BoolTensor broadcastable to (B, H, R, M), optional
        Keys a query may see. A query that sees none gets a row of zeros.

    Returns
    -------
    Tensor (B, H, R, M), float32
    """
    logits = _logits(query, key, scaling)
    if allowed is None:
        return logits.softmax(dim=-1)
    logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(dim=-1).nan_to_num(nan=0.0)


def attention_received(
    query: torch.Tensor, key: torch.Tensor, scaling: float, allowed: torch.Tensor | None = None, block: int = 256
) -> torch.Tensor:
    """Attention that each key receives, averaged over the queries, in blocks of queries: O(block x M) memory.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    allowed : BoolTensor (B, 1, M or 1, M), optional
        Keys a query may see. Keys that nobody may see are padding, and do not count as queries either.
    block : int
        Queries per block.

    Returns
    -------
    Tensor (B, H, M), float32
        Sums to 1 over the keys.
    """
    received = query.new_zeros(query.shape[0], query.shape[1], key.shape[2], dtype=torch.float32)
    if allowed is None:
        for rows in query.split(block, dim=2):
            received += _logits(rows, key, scaling).softmax(dim=-1).sum(dim=2)
        return received / query.shape[2]
    exists = allowed.any(dim=2)  # (B, 1, M)
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        rows = attention_rows(
            query[:, :, part], key, scaling, allowed if allowed.shape[2] == 1 else allowed[:, :, part]
        )
        received += (rows * exists[:, :, part, None]).sum(dim=2)
    return received / exists.sum(dim=-1, keepdim=True).clamp(min=1)


def _logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled logits (B, H, R, M) in float32, keys shared by groups of query heads without being copied."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    # Scaled before the product: half precision would overflow in the product first.
    grouped = (query * scaling).reshape(batch, key.shape[1], groups * rows, width)
    return (grouped @ key.transpose(2, 3)).float().reshape(batch, heads, rows, key.shape[2])
