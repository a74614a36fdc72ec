"""Rows and weighted column sums of an attention matrix, without the matrix.

The PyTorch paths work on tiles of the matrix that fit into a processor's cache: a tile is made, used and overwritten by
the next. Memory beside inputs and outputs is that of one tile, and, for half precision, of the keys of one batch row in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.errors import ConfigError, InputError

from .dispatch import op
from .sight import Sight

__all__ = ["REDUCTIONS", "attention_push", "attention_rows"]

REDUCTIONS = ("none", "mean", "max", "sum", "rms")

_TILE = {"cpu": 2**20, "other": 2**26}
"""Bytes of one tile: about half of a core's second-level cache; elsewhere enough to make launches cheap."""

_ROWS = 256
"""Rows of a tile per key head: a matrix product gains nothing from more of them."""


@op(triton="vtc.kernels.triton_attention:attention_rows")
def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sight: Sight | Tensor | None = None,
    *,
    reduce: str = "none",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Softmax rows of chosen queries, reduced over the heads in the same pass.

    Parameters
    ----------
    query : Tensor (..., H, R, d)
        The chosen queries only. Several layers at once are one more leading axis.
    key : Tensor (..., Hkv, M, d)
        Hkv divides H: each key head serves H / Hkv query heads.
    scaling : float
        Factor on the logits.
    sight : Sight or BoolTensor broadcastable to (B, H, R, M), optional
        Which keys a query sees; the leading axes are one then. A query that sees none gets a row of zeros.
    reduce : str
        Over the heads: "none", "mean", "max", "sum" or "rms", the root of the mean square.
    cu_seqlens : IntTensor (S + 1,), optional
        Cumulative lengths of S sequences that lie one behind the other in `key`, which then is (1, Hkv, M, d); `query`
        is (S, H, R, d), R of each, and sees the keys of its own sequence.

    Returns
    -------
    Tensor (..., H, R, M) or, reduced, (..., R, M), float32
        With `cu_seqlens` the leading axis is 1 and the rows of a sequence stand over its own keys.

    Raises
    ------
    ConfigError
        Unknown reduction.
    InputError
        The shapes contradict each other.
    """
    check_rows(query, key, sight, reduce, cu_seqlens)
    if cu_seqlens is not None:
        parts = key.split(cu_seqlens.diff().tolist(), dim=2)
        own = [attention_rows(query[s : s + 1], part, scaling, reduce=reduce) for s, part in enumerate(parts)]
        return torch.cat(own, dim=-1)
    leading, heads, length, room = query.shape[:-3], query.shape[-3], query.shape[-2], key.shape[-2]
    query, key = query.flatten(0, -4), key.flatten(0, -4)
    shape = (heads, length, room) if reduce == "none" else (length, room)
    rows = query.new_zeros(len(query), *shape, dtype=torch.float32)
    for row, some, part, seen, tile, sees in _tiles(query, key, scaling, sight):
        if sees is not None:
            tile *= sees[..., None]
        if reduce == "none":
            rows[row, some, part, seen] = tile
        elif reduce == "max":
            torch.maximum(rows[row, part, seen], tile.amax(dim=0), out=rows[row, part, seen])
        else:
            rows[row, part, seen] += (tile.square_() if reduce == "rms" else tile).sum(dim=0)
    if reduce in ("mean", "rms"):
        rows /= heads
    return (rows.sqrt_() if reduce == "rms" else rows).view(*leading, *shape)


@op(triton="vtc.kernels.triton_attention:attention_push")
def attention_push(
    query: Tensor,
    key: Tensor,
    scaling: float,
    weights: Tensor,
    sight: Sight | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weighted sums of attention rows: what flows to the keys if every query has some weight.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    weights : Tensor (B, H or 1, W, Q), float32
        W sets of weights.
    sight : Sight or BoolTensor broadcastable to (B, H, Q, M), optional
        Which keys a query sees; without it, all. The weight of a query that sees none is lost.
    cu_seqlens : IntTensor (S + 1,), optional
        Cumulative lengths of S sequences that lie one behind the other in the one row of the batch, Q = M; each sees
        itself alone.

    Returns
    -------
    Tensor (B, H, W, M), float32

    Raises
    ------
    InputError
        The shapes contradict each other.
    """
    check_push(query, key, weights, sight, cu_seqlens)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        parts = zip(query.split(lengths, 2), key.split(lengths, 2), weights.split(lengths, 3), strict=True)
        return torch.cat([attention_push(q, k, scaling, w) for q, k, w in parts], dim=-1)
    batch, heads, sets = query.shape[0], query.shape[1], weights.shape[2]
    pushed = query.new_zeros(batch, heads, sets, key.shape[2], dtype=torch.float32)
    weights = weights.expand(batch, heads, -1, -1)
    for row, some, part, seen, tile, sees in _tiles(query, key, scaling, sight):
        weight = weights[row, some, :, part]
        pushed[row, some, :, seen] += (weight if sees is None else weight * sees[:, None]) @ tile
    return pushed


Tile = tuple[int, slice, slice, slice, Tensor, Tensor | None]


def _tiles(query: Tensor, key: Tensor, scaling: float, sight: Sight | Tensor | None) -> Iterator[Tile]:
    """Tiles of the attention of `query` (B, H, Q, d) to `key` (B, Hkv, M, d), as far as any of their queries sees.

    Yields
    ------
    row, heads, queries, keys
        Where the tile is: an index, and three slices.
    Tensor (h, r, m), float32
        Softmax rows; the caller may overwrite them.
    Tensor (1 or h, r), float32, or None
        1 for a query that sees something, 0 for one that does not, whose row means nothing.
    """
    query, key = query.detach(), key.detach()  # nothing that is selected by these has a gradient
    batch, heads, length, width = query.shape
    key_heads, room = key.shape[1], key.shape[2]
    shared = heads // key_heads
    size = _TILE["cpu" if query.device.type == "cpu" else "other"] // (4 * max(1, room))  # rows of a tile
    step = max(1, min(length, min(size, _ROWS) // shared))
    together = max(1, size // (shared * step))  # key heads in one tile
    for row in range(batch):
        keys = key[row].float().transpose(1, 2)
        for start in range(0, length, step):
            part = slice(start, min(start + step, length))
            bias, sees, seen = _bias(sight, row, part, room)
            if seen.start == seen.stop:
                continue
            for first in range(0, key_heads, together):
                last = min(first + together, key_heads)
                some = slice(first * shared, last * shared)
                rows = query[row, some, part].float() * scaling
                logits = rows.reshape(last - first, -1, width) @ keys[first:last, :, seen]
                logits = logits.view(*rows.shape[:2], -1)
                if bias is not None:
                    logits += bias if len(bias) == 1 else bias[some]
                torch.softmax(logits, dim=-1, out=logits)
                yield row, some, part, seen, logits, sees if sees is None or len(sees) == 1 else sees[some]


def _bias(sight: Sight | Tensor | None, row: int, part: slice, room: int) -> tuple[Tensor | None, Tensor | None, slice]:
    """How the sight of the queries of `part` bears on their logits.

    Returns
    -------
    Tensor (1 or H, r, m) or None
        To be added, so that what is not seen gets nothing. A query that sees nothing gets a harmless bias: there is no
        NaN to be cleaned up.
    Tensor (1 or H, r), float32, or None
        1 for queries that see something.
    slice
        The m keys between the first and the last that any of them sees.
    """
    if sight is None:
        return None, None, slice(0, room)
    if isinstance(sight, Sight):
        allowed = sight.row(row)(part, room)
    else:
        allowed = sight[row : row + 1] if sight.shape[0] > 1 else sight
        allowed = allowed if allowed.shape[2] == 1 else allowed[:, :, part]
    allowed = allowed.expand(1, -1, part.stop - part.start, room)[0]
    columns = allowed.flatten(0, 1).any(dim=0).nonzero()
    seen = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)
    allowed = allowed[..., seen]
    sees = allowed.any(dim=-1)
    bias = torch.zeros(allowed.shape, device=allowed.device).masked_fill_(sees[..., None] & ~allowed, -torch.inf)
    return bias, sees.float(), seen


def check_rows(
    query: Tensor, key: Tensor, sight: Sight | Tensor | None, reduce: str, cu_seqlens: Tensor | None
) -> None:
    """Raise unless the arguments of `attention_rows` fit together."""
    if reduce not in REDUCTIONS:
        raise ConfigError(f"attention_rows: reduce is one of {', '.join(REDUCTIONS)}; got {reduce!r}.")
    _check_heads("attention_rows", query, key)
    if cu_seqlens is not None:
        if sight is not None or query.ndim != 4 or key.shape[0] != 1 or len(cu_seqlens) != len(query) + 1:
            raise InputError(
                "attention_rows: with cu_seqlens (S + 1,), query is (S, H, R, d), key (1, Hkv, M, d) and sight None; "
                f"got {len(cu_seqlens)} bounds, {tuple(query.shape)}, {tuple(key.shape)}."
            )
    elif query.shape[:-3] != key.shape[:-3] or (sight is not None and query.ndim != 4):
        raise InputError(
            f"attention_rows: query {tuple(query.shape)} and key {tuple(key.shape)} need the same leading axes, one if "
            "there is a sight."
        )


def check_push(
    query: Tensor, key: Tensor, weights: Tensor, sight: Sight | Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Raise unless the arguments of `attention_push` fit together."""
    _check_heads("attention_push", query, key)
    batch, heads, length = query.shape[:3]
    fits = weights.ndim == 4 and weights.shape[0] in (1, batch) and weights.shape[1] in (1, heads)
    if not fits or weights.shape[3] != length or key.shape[0] != batch:
        raise InputError(
            f"attention_push: query {tuple(query.shape)}, key {tuple(key.shape)} and weights {tuple(weights.shape)} "
            "are not (B, H, Q, d), (B, Hkv, M, d) and (B, H or 1, W, Q)."
        )
    if cu_seqlens is not None and (sight is not None or batch != 1 or key.shape[2] != length):
        raise InputError(
            "attention_push: cu_seqlens goes with one row that attends to itself, without a sight; got query "
            f"{tuple(query.shape)} and key {tuple(key.shape)}."
        )


def _check_heads(name: str, query: Tensor, key: Tensor) -> None:
    if query.ndim < 4 or key.ndim < 4 or query.shape[-1] != key.shape[-1] or query.shape[-3] % key.shape[-3]:
        raise InputError(
            f"{name}: query {tuple(query.shape)} and key {tuple(key.shape)} need the same width, and a number of heads "
            "that is a multiple of the keys'."
        )
