"""Rows and weighted column sums of an attention matrix, without the whole matrix.

The PyTorch implementations compute the matrix in tiles that fit into a processor's cache; each tile overwrites the one
before. Beside inputs and outputs they need the memory of one tile and, for half precision, of the keys of one batch
row in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.errors import ConfigError, InputError

from .dispatch import op
from .visibility import VisibilityMask

__all__ = ["REDUCTIONS", "attention_column_sums", "attention_rows"]

REDUCTIONS = ("none", "mean", "max", "sum", "rms")

_TILE = {"cpu": 2**20, "other": 2**26}
"""Bytes of one tile: about half of a core's second-level cache; on other devices enough to amortise the launches."""

_ROWS = 256
"""Rows of a tile per key head; more of them do not make the matrix product faster."""


@op(triton="vtc.kernels.triton_attention:attention_rows")
def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: VisibilityMask | Tensor | None = None,
    *,
    reduce: str = "none",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute softmax rows of chosen queries, reduced over the heads in the same pass.

    Parameters
    ----------
    query : Tensor (..., H, R, d)
        The chosen queries only. Further leading axes are allowed, for example one for several layers.
    key : Tensor (..., Hkv, M, d)
        Hkv divides H: H / Hkv query heads share one key head.
    scaling : float
        Factor of the logits.
    mask : VisibilityMask or BoolTensor broadcastable to (B, H, R, M), optional
        True where a query attends to a key; requires a single leading axis. A query without any key gets a row of
        zeros.
    reduce : str
        Over the heads: "none", "mean", "max", "sum" or "rms", the root of the mean square.
    cu_seqlens : IntTensor (S + 1,), optional
        Cumulative lengths of S sequences packed along the key axis of `key`, which then is (1, Hkv, M, d); `query` is
        (S, H, R, d) with R queries of each sequence, which attend to the keys of their own sequence.

    Returns
    -------
    Tensor (..., H, R, M) or, reduced, (..., R, M), float32
        With `cu_seqlens` the leading axis is 1, and the rows of a sequence cover its own keys.

    Raises
    ------
    ConfigError
        Unknown reduction.
    InputError
        The shapes do not fit together.
    """
    check_rows(query, key, mask, reduce, cu_seqlens)
    if cu_seqlens is not None:
        parts = key.split(cu_seqlens.diff().tolist(), dim=2)
        own = [attention_rows(query[s : s + 1], part, scaling, reduce=reduce) for s, part in enumerate(parts)]
        return torch.cat(own, dim=-1)
    leading, heads, length, key_length = query.shape[:-3], query.shape[-3], query.shape[-2], key.shape[-2]
    query, key = query.flatten(0, -4), key.flatten(0, -4)
    shape = (heads, length, key_length) if reduce == "none" else (length, key_length)
    rows = query.new_zeros(len(query), *shape, dtype=torch.float32)
    for row, some, part, keys, tile, nonempty in _tiles(query, key, scaling, mask):
        if nonempty is not None:
            tile *= nonempty[..., None]
        if reduce == "none":
            rows[row, some, part, keys] = tile
        elif reduce == "max":
            torch.maximum(rows[row, part, keys], tile.amax(dim=0), out=rows[row, part, keys])
        else:
            rows[row, part, keys] += (tile.square_() if reduce == "rms" else tile).sum(dim=0)
    if reduce in ("mean", "rms"):
        rows /= heads
    return (rows.sqrt_() if reduce == "rms" else rows).view(*leading, *shape)


@op(triton="vtc.kernels.triton_attention:attention_column_sums")
def attention_column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    weights: Tensor,
    mask: VisibilityMask | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute weighted sums of attention rows: the weight that the keys receive if every query has some.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    weights : Tensor (B, H or 1, W, Q), float32
        W sets of weights of the queries.
    mask : VisibilityMask or BoolTensor broadcastable to (B, H, Q, M), optional
        True where a query attends to a key; None: everywhere. The weight of a query without any key is dropped.
    cu_seqlens : IntTensor (S + 1,), optional
        Cumulative lengths of S sequences packed into the only row of the batch, Q = M; each attends to itself only.

    Returns
    -------
    Tensor (B, H, W, M), float32

    Raises
    ------
    InputError
        The shapes do not fit together.
    """
    check_column_sums(query, key, weights, mask, cu_seqlens)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), weights.split(lengths, 3), strict=True)
        return torch.cat([attention_column_sums(q, k, scaling, w) for q, k, w in parts], dim=-1)
    batch, heads, sets = query.shape[0], query.shape[1], weights.shape[2]
    sums = query.new_zeros(batch, heads, sets, key.shape[2], dtype=torch.float32)
    weights = weights.expand(batch, heads, -1, -1)
    for row, some, part, keys, tile, nonempty in _tiles(query, key, scaling, mask):
        weight = weights[row, some, :, part]
        sums[row, some, :, keys] += (weight if nonempty is None else weight * nonempty[:, None]) @ tile
    return sums


Tile = tuple[int, slice, slice, slice, Tensor, Tensor | None]


def _tiles(query: Tensor, key: Tensor, scaling: float, mask: VisibilityMask | Tensor | None) -> Iterator[Tile]:
    """Yield tiles of the attention of `query` (B, H, Q, d) to `key` (B, Hkv, M, d), without entirely masked ones.

    Yields
    ------
    row, heads, queries, keys
        Location of the tile: an index and three slices.
    Tensor (h, r, m), float32
        Softmax rows; the caller may overwrite them.
    Tensor (1 or h, r), float32, or None
        0 for a query without any key, whose softmax row is meaningless, 1 for all others.
    """
    query, key = query.detach(), key.detach()  # the indices that are selected by these have no gradient
    batch, heads, length, width = query.shape
    key_heads, key_length = key.shape[1], key.shape[2]
    group = heads // key_heads
    size = _TILE["cpu" if query.device.type == "cpu" else "other"] // (4 * max(1, key_length))  # rows of a tile
    step = max(1, min(length, min(size, _ROWS) // group))
    key_heads_per_tile = max(1, size // (group * step))
    for row in range(batch):
        keys = key[row].float().transpose(1, 2)
        for start in range(0, length, step):
            part = slice(start, min(start + step, length))
            bias, nonempty, columns = _bias(mask, row, part, key_length)
            if columns.start == columns.stop:
                continue
            for first in range(0, key_heads, key_heads_per_tile):
                last = min(first + key_heads_per_tile, key_heads)
                some = slice(first * group, last * group)
                rows = query[row, some, part].float() * scaling
                logits = rows.reshape(last - first, -1, width) @ keys[first:last, :, columns]
                logits = logits.view(*rows.shape[:2], -1)
                if bias is not None:
                    logits += bias if len(bias) == 1 else bias[some]
                torch.softmax(logits, dim=-1, out=logits)
                own = nonempty if nonempty is None or len(nonempty) == 1 else nonempty[some]
                yield row, some, part, columns, logits, own


def _bias(
    mask: VisibilityMask | Tensor | None, row: int, part: slice, key_length: int
) -> tuple[Tensor | None, Tensor | None, slice]:
    """Convert the mask of the queries of `part` into an additive bias of their logits.

    Returns
    -------
    Tensor (1 or H, r, m) or None
        Minus infinity where masked, else 0. All 0 for a query without any key, so that its softmax is not NaN.
    Tensor (1 or H, r), float32, or None
        0 for a query without any key, 1 for all others.
    slice
        The m keys from the first to the last that any of the queries attends to.
    """
    if mask is None:
        return None, None, slice(0, key_length)
    if isinstance(mask, VisibilityMask):
        allowed = mask.row(row)(part, key_length)
    else:
        allowed = mask[row : row + 1] if mask.shape[0] > 1 else mask
        allowed = allowed if allowed.shape[2] == 1 else allowed[:, :, part]
    allowed = allowed.expand(1, -1, part.stop - part.start, key_length)[0]
    used = allowed.flatten(0, 1).any(dim=0).nonzero()
    columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
    allowed = allowed[..., columns]
    nonempty = allowed.any(dim=-1)
    bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(nonempty[..., None] & ~allowed, -torch.inf)
    return bias, nonempty.float(), columns


def check_rows(
    query: Tensor, key: Tensor, mask: VisibilityMask | Tensor | None, reduce: str, cu_seqlens: Tensor | None
) -> None:
    """Raise an error unless the arguments of `attention_rows` fit together."""
    if reduce not in REDUCTIONS:
        raise ConfigError(f"attention_rows: reduce is one of {', '.join(REDUCTIONS)}; got {reduce!r}.")
    _check_heads("attention_rows", query, key)
    if cu_seqlens is not None:
        if mask is not None or query.ndim != 4 or key.shape[0] != 1 or len(cu_seqlens) != len(query) + 1:
            raise InputError(
                "attention_rows: with cu_seqlens (S + 1,), query is (S, H, R, d), key (1, Hkv, M, d) and mask None; "
                f"got {len(cu_seqlens)} bounds, {tuple(query.shape)}, {tuple(key.shape)}."
            )
    elif query.shape[:-3] != key.shape[:-3] or (mask is not None and query.ndim != 4):
        raise InputError(
            f"attention_rows: query {tuple(query.shape)} and key {tuple(key.shape)} need the same leading axes, one if "
            "there is a mask."
        )


def check_column_sums(
    query: Tensor, key: Tensor, weights: Tensor, mask: VisibilityMask | Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise an error unless the arguments of `attention_column_sums` fit together."""
    _check_heads("attention_column_sums", query, key)
    batch, heads, length = query.shape[:3]
    fits = weights.ndim == 4 and weights.shape[0] in (1, batch) and weights.shape[1] in (1, heads)
    if not fits or weights.shape[3] != length or key.shape[0] != batch:
        raise InputError(
            f"attention_column_sums: query {tuple(query.shape)}, key {tuple(key.shape)} and weights "
            f"{tuple(weights.shape)} are not (B, H, Q, d), (B, Hkv, M, d) and (B, H or 1, W, Q)."
        )
    if cu_seqlens is not None and (mask is not None or batch != 1 or key.shape[2] != length):
        raise InputError(
            "attention_column_sums: cu_seqlens goes with one row that attends to itself, without a mask; got query "
            f"{tuple(query.shape)} and key {tuple(key.shape)}."
        )


def _check_heads(name: str, query: Tensor, key: Tensor) -> None:
    if query.ndim < 4 or key.ndim < 4 or query.shape[-1] != key.shape[-1] or query.shape[-3] % key.shape[-3]:
        raise InputError(
            f"{name}: query {tuple(query.shape)} and key {tuple(key.shape)} need the same width, and a number of heads "
            "that is a multiple of the keys'."
        )
