"""Triton kernels for rows and weighted column sums of attention.

Rows: `_row_logits` writes the logits of the chosen queries and, per block of keys, their logsumexp; `_row_finish`
normalises them and reduces over the heads. The keys are read once.

Column sums: `_row_logsumexp` computes the logsumexp of every row with an online softmax; `_column_sums` recomputes the
logits and sums the columns. Nothing of the size of the matrix is written. No two programs write to the same element,
so that results do not depend on the order of the programs. PageRank runs `_row_logsumexp` once and `_column_sums` in
every step.

Sums are accumulated in float32, and float32 products are computed without TF32. A row without any key has a logsumexp
of plus infinity, which makes its weights exactly zero.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .attention import REDUCTIONS, check_column_sums, check_rows
from .dispatch import NoKernelError, interpreting
from .received import current_keys, root_mean_square, starting_weight
from .visibility import VisibilityMask

_MAX_WIDTH = 256  # channels of a head
_MAX_LINES = 65535  # sequences times heads: programs on the second axis of a CUDA grid

UNMASKED = tl.constexpr(0)
MASK = tl.constexpr(1)
POSITIONS = tl.constexpr(2)


@triton.jit
def _visible(
    batch, head, row, row_mask, column, column_mask,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, key_length,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Return the mask (rows, columns) of the keys `column` that the queries `row` attend to."""
    here = row_mask[:, None] & column_mask[None, :]
    if KIND == MASK:
        at = mask + batch * mask_b + head * mask_h + row[:, None].to(tl.int64) * mask_q + column[None, :] * mask_m
        here &= tl.load(at, mask=here, other=0) != 0
    if KIND == POSITIONS:
        query = tl.load(queries + batch * length + row, mask=row_mask, other=-1)
        key = tl.load(keys + batch * key_length + column, mask=column_mask, other=-1)
        allowed = key[None, :] <= query[:, None]
        if WINDOW:
            allowed &= query[:, None] - key[None, :] < window
        if BLOCKS:
            own_block = tl.load(query_blocks + batch * length + row, mask=row_mask, other=-1)
            block = tl.load(key_blocks + batch * key_length + column, mask=column_mask, other=-1)
            allowed |= (block[None, :] == own_block[:, None]) & (block >= 0)[None, :]
        here &= allowed & (query >= 0)[:, None] & (key >= 0)[None, :]
    return here


@triton.jit
def _product(rows, columns, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(rows.to(tl.float32), columns.to(tl.float32), input_precision="ieee")
    return tl.dot(rows, columns)


@triton.jit
def _row_logits(
    q, k, out, sums, bounds, scaling,
    q_b, q_h, q_n, k_b, k_h, k_n,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window,
    heads, group, length, key_length, width, blocks,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write logits and logsumexp of all queries that share a key head, for one block of keys."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // (heads // group)).to(tl.int64)
    key_head = tl.program_id(1) % (heads // group)
    start, stop = 0, key_length
    if RAGGED:
        start, stop = tl.load(bounds + batch), tl.load(bounds + batch + 1)
    column = start + block * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < stop
    lane = tl.arange(0, WIDTH)
    key_batch = 0 if RAGGED else batch
    key = tl.load(
        k + key_batch * k_b + key_head * k_h + column[None, :].to(tl.int64) * k_n + lane[:, None],
        mask=column_mask[None, :] & (lane < width)[:, None], other=0.0,
    )  # fmt: skip
    for first in range(0, group * length, ROWS):
        index = first + tl.arange(0, ROWS)
        row_mask = index < group * length
        head, row = key_head * group + index // length, index % length
        query = tl.load(
            q + batch * q_b + head[:, None].to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + lane[None, :],
            mask=row_mask[:, None] & (lane < width)[None, :], other=0.0,
        )  # fmt: skip
        logits = _product(query, key, UPCAST) * scaling
        here = _visible(
            batch, head[:, None], row, row_mask, column, column_mask,
            mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, key_length,
            KIND, WINDOW, BLOCKS,
        )  # fmt: skip
        logits = tl.where(here, logits, -float("inf"))
        line = (key_batch * heads + head).to(tl.int64) * length + row
        tl.store(
            out + line[:, None] * key_length + column[None, :], logits, mask=row_mask[:, None] & column_mask[None, :]
        )
        largest = tl.max(logits, axis=1)
        safe = tl.where(largest == -float("inf"), 0.0, largest)
        total = tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        total = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
        tl.store(sums + ((batch * heads + head) * length + row) * blocks + block, total, mask=row_mask)


@triton.jit
def _row_finish(
    logits, sums, out, bounds, heads, length, key_length,
    REDUCE: tl.constexpr, RAGGED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the probabilities of one block of keys, reduced over the heads; REDUCE indexes `REDUCTIONS`."""
    batch = (tl.program_id(1) // length).to(tl.int64)
    row = tl.program_id(1) % length
    start, stop = 0, key_length
    if RAGGED:
        start, stop = tl.load(bounds + batch), tl.load(bounds + batch + 1)
    column = start + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < stop
    out_batch = 0 if RAGGED else batch
    reduced = tl.zeros((COLUMNS,), tl.float32)
    for head in range(heads):
        total = tl.load(sums + (batch * heads + head) * length + row)
        at = ((out_batch * heads + head) * length + row) * key_length + column
        logit = tl.load(logits + at, mask=here, other=-float("inf"))
        share = tl.exp(logit - tl.where(total == -float("inf"), 0.0, total))
        if REDUCE == 0:
            tl.store(out + at, share, mask=here)
        elif REDUCE == 2:
            reduced = tl.maximum(reduced, share)
        elif REDUCE == 4:
            reduced += share * share
        else:
            reduced += share
    if REDUCE == 1:
        reduced = reduced / heads
    if REDUCE == 4:
        reduced = tl.sqrt(reduced / heads)
    if REDUCE != 0:
        tl.store(out + (out_batch * length + row) * key_length + column, reduced, mask=here)


@triton.jit
def _row_logsumexp(
    q, k, sums, bounds, scaling,
    q_b, q_h, q_n, k_b, k_h, k_n,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window,
    heads, group, length, key_length, width,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the logsumexp of one block of queries of one head; plus infinity for a query without any key."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    first, last, stop = 0, length, key_length
    data = batch
    if RAGGED:
        first, last = tl.load(bounds + batch), tl.load(bounds + batch + 1)
        stop, data = last, 0
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < last
    lane = tl.arange(0, WIDTH)
    query = tl.load(
        q + data * q_b + head.to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + lane[None, :],
        mask=row_mask[:, None] & (lane < width)[None, :], other=0.0,
    )  # fmt: skip
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first, stop, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < stop
        key = tl.load(
            k + data * k_b + (head // group).to(tl.int64) * k_h + column[None, :].to(tl.int64) * k_n + lane[:, None],
            mask=column_mask[None, :] & (lane < width)[:, None], other=0.0,
        )  # fmt: skip
        logits = _product(query, key, UPCAST) * scaling
        here = _visible(
            data, head, row, row_mask, column, column_mask,
            mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, key_length,
            KIND, WINDOW, BLOCKS,
        )  # fmt: skip
        logits = tl.where(here, logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        safe = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        largest = larger
    result = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(sums + (data * heads + head) * length + row, result, mask=row_mask)


@triton.jit
def _column_sums(
    q, k, sums, weights, out, bounds, scaling,
    q_b, q_h, q_n, k_b, k_h, k_n, w_b, w_h, w_s,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window,
    heads, group, length, key_length, width,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the weighted column sums of one block of keys over all queries of one head, for one set of weights."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    chosen = tl.program_id(2)
    first, last, begin, stop = 0, length, 0, key_length
    data = batch
    if RAGGED:
        first, last = tl.load(bounds + batch), tl.load(bounds + batch + 1)
        begin, stop, data = first, last, 0
    column = begin + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < stop
    lane = tl.arange(0, WIDTH)
    key = tl.load(
        k + data * k_b + (head // group).to(tl.int64) * k_h + column[None, :].to(tl.int64) * k_n + lane[:, None],
        mask=column_mask[None, :] & (lane < width)[:, None], other=0.0,
    )  # fmt: skip
    received = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        row_mask = row < last
        query = tl.load(
            q + data * q_b + head.to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + lane[None, :],
            mask=row_mask[:, None] & (lane < width)[None, :], other=0.0,
        )  # fmt: skip
        logits = _product(query, key, UPCAST) * scaling
        here = _visible(
            data, head, row, row_mask, column, column_mask,
            mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, key_length,
            KIND, WINDOW, BLOCKS,
        )  # fmt: skip
        total = tl.load(sums + (data * heads + head) * length + row, mask=row_mask, other=float("inf"))
        weight = tl.load(weights + data * w_b + head * w_h + chosen * w_s + row, mask=row_mask, other=0.0)
        share = tl.exp(tl.where(here, logits, -float("inf")) - total[:, None])
        received += tl.sum(share * weight[:, None], axis=0)
    at = out + ((data * heads + head) * tl.num_programs(2) + chosen) * key_length + column
    tl.store(at, received, mask=column_mask)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: VisibilityMask | Tensor | None = None,
    *,
    reduce: str = "none",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Implement `vtc.kernels.attention_rows`."""
    check_rows(query, key, mask, reduce, cu_seqlens)
    leading, (heads, length, width), key_length = query.shape[:-3], query.shape[-3:], key.shape[-2]
    query, key = _unit_stride(query.flatten(0, -4)), _unit_stride(key.flatten(0, -4))
    batch, out_batch = len(query), len(key)
    group = heads // key.shape[1]
    columns = 64
    longest = key_length if cu_seqlens is None else _longest(cu_seqlens)
    blocks = triton.cdiv(longest, columns)
    _check_lines(batch * max(key.shape[1], length))
    logits = query.new_empty(out_batch, heads, length, key_length, dtype=torch.float32)
    shape = (heads, length, key_length) if reduce == "none" else (length, key_length)
    if logits.numel() and blocks:
        sums = query.new_empty(batch, heads, length, blocks, dtype=torch.float32)
        rows = logits if reduce == "none" else query.new_empty(out_batch, *shape, dtype=torch.float32)
        bounds = cu_seqlens if cu_seqlens is None else cu_seqlens.int()
        _row_logits[(blocks, batch * key.shape[1])](
            query, key, logits, sums, bounds, scaling,
            *query.stride()[:3], *key.stride()[:3], **_mask_arguments(mask, query, heads, length, key_length),
            heads=heads, group=group, length=length, key_length=key_length, width=width, blocks=blocks,
            RAGGED=bounds is not None, ROWS=_row_tile(group * length), COLUMNS=columns, WIDTH=_width(width),
            UPCAST=_upcast(query, key), num_warps=4,
        )  # fmt: skip
        _row_finish[(blocks, batch * length)](
            logits, sums.logsumexp(dim=-1), rows, bounds, heads, length, key_length,
            REDUCE=REDUCTIONS.index(reduce), RAGGED=bounds is not None, COLUMNS=columns, num_warps=2,
        )  # fmt: skip
    else:
        rows = query.new_zeros(out_batch, *shape, dtype=torch.float32)
    return rows if cu_seqlens is not None else rows.view(*leading, *shape)


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    weights: Tensor,
    mask: VisibilityMask | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Implement `vtc.kernels.attention_column_sums`."""
    check_column_sums(query, key, weights, mask, cu_seqlens)
    return _ColumnSums(query, key, scaling, mask, cu_seqlens)(weights)


def pagerank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: VisibilityMask | Tensor | None = None,
    exists: Tensor | None = None,
    *,
    known: int | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
) -> Tensor:
    """Implement `vtc.kernels.pagerank`; the logsumexp of the rows is computed once for all steps."""
    start = starting_weight(query, exists)
    weight = start.expand(query.shape[0], query.shape[1], 1, query.shape[2])
    check_column_sums(query, key, weight, mask, None)
    column_sums = _ColumnSums(query, key, scaling / temperature, mask, None)
    for _ in range(iterations):
        weight = column_sums(weight)[..., current_keys(query, key, known)] * (1 - damping) + damping * start
    return root_mean_square(weight[:, :, 0])


class _ColumnSums:
    """Weighted column sums of one attention matrix, for any number of calls after one pass over its rows."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scaling: float,
        mask: VisibilityMask | Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.query, self.key = _unit_stride(query), _unit_stride(key)
        (batch, heads, length, width), key_length = query.shape, key.shape[2]
        self.bounds = None if cu_seqlens is None else cu_seqlens.int()
        self.sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.longest = (length, key_length) if cu_seqlens is None else (_longest(cu_seqlens),) * 2
        _check_lines(self.sequences * heads)
        self.scaling = scaling
        self.shape = {
            "heads": heads, "group": heads // key.shape[1], "length": length, "key_length": key_length, "width": width,
            **_mask_arguments(mask, query, heads, length, key_length),
        }  # fmt: skip
        tile = _tile(query.dtype, width)
        self.launch = {
            "RAGGED": cu_seqlens is not None,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "WIDTH": _width(width),
            "UPCAST": _upcast(query, key),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        self.sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        self.empty = not (query.numel() and key.numel() and all(self.longest))
        if not self.empty:
            _row_logsumexp[(triton.cdiv(self.longest[0], tile.rows), self.sequences * heads)](
                self.query, self.key, self.sums, self.bounds, scaling,
                *self.query.stride()[:3], *self.key.stride()[:3], **self.shape, **self.launch,
            )  # fmt: skip

    def __call__(self, weights: Tensor) -> Tensor:
        """Return the sums (B, H, W, M) for weights (B or 1, H or 1, W, Q)."""
        (batch, heads), sets, key_length = self.query.shape[:2], weights.shape[2], self.key.shape[2]
        weights = weights.float().expand(batch, heads, -1, -1)
        weights = weights if weights.stride(3) == 1 else weights.contiguous()
        out = self.query.new_zeros(batch, heads, sets, key_length, dtype=torch.float32)
        if not self.empty and sets:
            blocks = triton.cdiv(self.longest[1], self.launch["COLUMNS"])
            _column_sums[(blocks, self.sequences * heads, sets)](
                self.query, self.key, self.sums, weights, out, self.bounds, self.scaling,
                *self.query.stride()[:3], *self.key.stride()[:3], *weights.stride()[:3],
                **self.shape, **self.launch,
            )  # fmt: skip
        return out


class _Tile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int


def _tile(dtype: torch.dtype, width: int) -> _Tile:
    """Return tile sizes that fit into the registers; smaller ones for float32, which runs without tensor cores."""
    if dtype == torch.float32:
        return _Tile(32, 32, 4, 2)
    return _Tile(64, 64, 4, 2) if width > 128 else _Tile(64, 64, 4, 3)


def _row_tile(count: int) -> int:
    """Return the number of rows of a product of a few chosen queries."""
    return min(64, max(16, int(triton.next_power_of_2(count))))


def _check_lines(lines: int) -> None:
    if lines > _MAX_LINES:
        raise NoKernelError(f"a grid has at most {_MAX_LINES} sequences times heads, or times rows, not {lines}")


def _width(width: int) -> int:
    if width > _MAX_WIDTH:
        raise NoKernelError(f"heads are at most {_MAX_WIDTH} wide, these are {width}")
    return max(16, int(triton.next_power_of_2(width)))


def _upcast(query: Tensor, key: Tensor) -> bool:
    """Return whether products run in float32; the interpreter of Triton does not multiply bfloat16."""
    if query.dtype != key.dtype:
        raise NoKernelError(f"query and key have one dtype; these are {query.dtype} and {key.dtype}")
    return query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and interpreting())


def _unit_stride(x: Tensor) -> Tensor:
    """Return `x` with stride 1 along its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def _mask_arguments(
    mask: VisibilityMask | Tensor | None, query: Tensor, heads: int, length: int, key_length: int
) -> dict[str, Any]:
    """Return the arguments of `_visible`."""
    batch = len(query)
    arguments: dict[str, Any] = dict.fromkeys(("mask", "queries", "keys", "query_blocks", "key_blocks"))
    arguments |= dict.fromkeys(("mask_b", "mask_h", "mask_q", "mask_m", "window"), 0)
    arguments |= {"KIND": UNMASKED.value, "WINDOW": False, "BLOCKS": False}
    if isinstance(mask, VisibilityMask):
        arguments |= {"KIND": POSITIONS.value, "queries": _table(mask.query_positions, batch)}
        arguments["keys"] = _table(mask.keys_for(key_length), batch)
        if mask.window is not None:
            arguments |= {"WINDOW": True, "window": mask.window}
        blocks = mask.key_blocks_for(key_length)
        if mask.blocks is not None and blocks is not None:
            arguments |= {"BLOCKS": True, "query_blocks": _table(mask.blocks, batch)}
            arguments["key_blocks"] = _table(blocks, batch)
    elif mask is not None:
        expanded = mask.expand(batch, heads, length, key_length).view(torch.uint8)
        names = ("mask_b", "mask_h", "mask_q", "mask_m")
        arguments |= {"KIND": MASK.value, "mask": expanded} | dict(zip(names, expanded.stride(), strict=True))
    return arguments


def _table(positions: Tensor, batch: int) -> Tensor:
    return positions.expand(batch, -1).int().contiguous()


def _specs() -> list[KernelSpec]:
    """List specialisations for decoders (heads of 128, causal), towers (64 to 80, with a mask) and float32.

    Triton specialises on arguments equal to 1: in a tower the heads per key head and the single query of a [CLS] row.
    """
    reading = {"q": "*{t}", "k": "*{t}", "scaling": "fp32"}
    reading |= dict.fromkeys(("q_b", "q_h", "q_n", "k_b", "k_h", "k_n"), "i32")
    sizes = dict.fromkeys(("heads", "group", "length", "key_length", "width"), "i32")
    strides = dict.fromkeys(("mask_b", "mask_h", "mask_q", "mask_m", "window"), "i32")
    tables = dict.fromkeys(("queries", "keys", "query_blocks", "key_blocks"))
    kinds: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "all": ({}, {"mask": None, **tables, "KIND": 0, "WINDOW": False, "BLOCKS": False}),
        "mask": ({"mask": "*u8"}, {**tables, "KIND": 1, "WINDOW": False, "BLOCKS": False}),
        "positions": (dict.fromkeys(tables, "*i32"), {"mask": None, "KIND": 2, "WINDOW": True, "BLOCKS": True}),
    }
    specs = []
    for kind, dtype, width in (("positions", "bf16", 128), ("mask", "fp16", 80), ("all", "fp32", 64)):
        pointers, constants = kinds[kind]
        ragged = kind == "all"
        constants = constants | {"RAGGED": ragged, "WIDTH": _width(width), "UPCAST": dtype == "fp32"}
        bounds: dict[str, str] = {"bounds": "*i32"} if ragged else {}
        constants |= {} if ragged else {"bounds": None}
        common = {name: text.format(t=dtype) for name, text in reading.items()} | sizes | strides | pointers | bounds
        label = f"{kind}, {dtype}, {width}"
        tile = _tile(torch.float32 if dtype == "fp32" else torch.bfloat16, width)
        tiled = constants | {"ROWS": tile.rows, "COLUMNS": tile.columns}
        launch = (tile.warps, tile.stages)
        if kind == "mask":
            common.pop("group")
            constants, tiled = constants | {"group": 1}, tiled | {"group": 1}
        rows = common | {"out": "*fp32", "sums": "*fp32", "blocks": "i32"}
        one = {"length": 1} if kind == "mask" else {}
        chosen = {name: text for name, text in rows.items() if name not in one}
        specs.append(KernelSpec(_row_logits, chosen, constants | one | {"ROWS": 16, "COLUMNS": 64}, label=label))
        specs.append(KernelSpec(_row_logsumexp, common | {"sums": "*fp32"}, tiled, *launch, label=label))
        summed = {"sums": "*fp32", "weights": "*fp32", "out": "*fp32"} | dict.fromkeys(("w_b", "w_h", "w_s"), "i32")
        specs.append(KernelSpec(_column_sums, common | summed, tiled, *launch, label=label))
    finish = dict.fromkeys(("logits", "sums", "out"), "*fp32") | dict.fromkeys(("heads", "key_length"), "i32")
    constants = {"bounds": None, "length": 1, "RAGGED": False, "COLUMNS": 64}
    constants["REDUCE"] = REDUCTIONS.index("rms")
    specs.append(KernelSpec(_row_finish, finish, constants, num_warps=2, label="rms"))
    return specs


KERNELS = _specs()
