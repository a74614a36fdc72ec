"""Triton kernels for rows and weighted column sums of attention.

Rows: `_row_logits` writes the logits of the chosen queries and, per block of keys, the logarithm of its sum of
exponentials; `_row_finish` normalises them and reduces over the heads. The keys, which are nearly all there is to read,
are read once.

Sums: `_row_sums` finds the logarithm of every row's sum of exponentials with an online softmax, `_push` recomputes the
logits and adds up the columns. Nothing of the size of the matrix is written, and no two programs add to one number, so
results do not depend on the order in which they run. A walk needs `_row_sums` once, `_push` at every step.

All sums are in float32, and products of float32 are not rounded to shorter formats. A row that sees nothing has a sum
of plus infinity, which makes its weights exactly zero.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention as plain
from .aot import KernelSpec
from .dispatch import NoKernelError, interpreting
from .received import current, root_mean_square, starting_weight
from .sight import Sight

WIDEST = 256  # of a head

NOTHING = tl.constexpr(0)
MASK = tl.constexpr(1)
SIGHT = tl.constexpr(2)


@triton.jit
def _seen(
    batch, head, row, rows_here, column, columns_here,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, room,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(rows, columns) of bool: which of the keys `column` the queries `row` see."""
    here = rows_here[:, None] & columns_here[None, :]
    if KIND == MASK:
        at = mask + batch * mask_b + head * mask_h + row[:, None].to(tl.int64) * mask_q + column[None, :] * mask_m
        here &= tl.load(at, mask=here, other=0) != 0
    if KIND == SIGHT:
        query = tl.load(queries + batch * length + row, mask=rows_here, other=-1)
        key = tl.load(keys + batch * room + column, mask=columns_here, other=-1)
        allowed = key[None, :] <= query[:, None]
        if WINDOW:
            allowed &= query[:, None] - key[None, :] < window
        if BLOCKS:
            theirs = tl.load(query_blocks + batch * length + row, mask=rows_here, other=-1)
            block = tl.load(key_blocks + batch * room + column, mask=columns_here, other=-1)
            allowed |= (block[None, :] == theirs[:, None]) & (block >= 0)[None, :]
        here &= allowed & (query >= 0)[:, None] & (key >= 0)[None, :]
    return here


@triton.jit
def _product(rows, columns, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(rows.to(tl.float32), columns.to(tl.float32), input_precision="ieee")
    return tl.dot(rows, columns)


@triton.jit
def _row_logits(
    q, k, out, sums, bounds, scaling,
    q_b, q_h, q_n, k_b, k_h, k_n,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window,
    heads, shared, length, room, width, blocks,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits of all queries that share a key head over one block of keys, and the logsumexp of each."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // (heads // shared)).to(tl.int64)
    key_head = tl.program_id(1) % (heads // shared)
    start, stop = 0, room
    if RAGGED:
        start, stop = tl.load(bounds + batch), tl.load(bounds + batch + 1)
    column = start + block * COLUMNS + tl.arange(0, COLUMNS)
    columns_here = column < stop
    lane = tl.arange(0, WIDTH)
    key_batch = 0 if RAGGED else batch
    key = tl.load(
        k + key_batch * k_b + key_head * k_h + column[None, :].to(tl.int64) * k_n + lane[:, None],
        mask=columns_here[None, :] & (lane < width)[:, None], other=0.0,
    )  # fmt: skip
    for first in range(0, shared * length, ROWS):
        index = first + tl.arange(0, ROWS)
        rows_here = index < shared * length
        head, row = key_head * shared + index // length, index % length
        query = tl.load(
            q + batch * q_b + head[:, None].to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + lane[None, :],
            mask=rows_here[:, None] & (lane < width)[None, :], other=0.0,
        )  # fmt: skip
        logits = _product(query, key, WIDE) * scaling
        here = _seen(
            batch, head[:, None], row, rows_here, column, columns_here,
            mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, room,
            KIND, WINDOW, BLOCKS,
        )  # fmt: skip
        logits = tl.where(here, logits, -float("inf"))
        line = (key_batch * heads + head).to(tl.int64) * length + row
        tl.store(out + line[:, None] * room + column[None, :], logits, mask=rows_here[:, None] & columns_here[None, :])
        largest = tl.max(logits, axis=1)
        safe = tl.where(largest == -float("inf"), 0.0, largest)
        total = tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        total = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
        tl.store(sums + ((batch * heads + head) * length + row) * blocks + block, total, mask=rows_here)


@triton.jit
def _row_finish(
    logits, sums, out, bounds, heads, length, room,
    REDUCE: tl.constexpr, RAGGED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Probabilities of one block of keys, reduced over the heads; REDUCE as in `REDUCTIONS`."""
    batch = (tl.program_id(1) // length).to(tl.int64)
    row = tl.program_id(1) % length
    start, stop = 0, room
    if RAGGED:
        start, stop = tl.load(bounds + batch), tl.load(bounds + batch + 1)
    column = start + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < stop
    out_batch = 0 if RAGGED else batch
    reduced = tl.zeros((COLUMNS,), tl.float32)
    for head in range(heads):
        total = tl.load(sums + (batch * heads + head) * length + row)
        at = ((out_batch * heads + head) * length + row) * room + column
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
        tl.store(out + (out_batch * length + row) * room + column, reduced, mask=here)


@triton.jit
def _row_sums(
    q, k, sums, bounds, scaling,
    q_b, q_h, q_n, k_b, k_h, k_n,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window,
    heads, shared, length, room, width,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logsumexp of the logits of one block of queries of one head; plus infinity for a query that sees nothing."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    first, last, stop = 0, length, room
    data = batch
    if RAGGED:
        first, last = tl.load(bounds + batch), tl.load(bounds + batch + 1)
        stop, data = last, 0
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows_here = row < last
    lane = tl.arange(0, WIDTH)
    query = tl.load(
        q + data * q_b + head.to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + lane[None, :],
        mask=rows_here[:, None] & (lane < width)[None, :], other=0.0,
    )  # fmt: skip
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first, stop, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        columns_here = column < stop
        key = tl.load(
            k + data * k_b + (head // shared).to(tl.int64) * k_h + column[None, :].to(tl.int64) * k_n + lane[:, None],
            mask=columns_here[None, :] & (lane < width)[:, None], other=0.0,
        )  # fmt: skip
        logits = _product(query, key, WIDE) * scaling
        here = _seen(
            data, head, row, rows_here, column, columns_here,
            mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, room,
            KIND, WINDOW, BLOCKS,
        )  # fmt: skip
        logits = tl.where(here, logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        safe = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - safe) + tl.sum(tl.exp(logits - safe[:, None]), axis=1)
        largest = larger
    result = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(sums + (data * heads + head) * length + row, result, mask=rows_here)


@triton.jit
def _push(
    q, k, sums, weights, out, bounds, scaling,
    q_b, q_h, q_n, k_b, k_h, k_n, w_b, w_h, w_s,
    mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window,
    heads, shared, length, room, width,
    KIND: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one block of keys receives from all queries of one head, under one set of weights."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    chosen = tl.program_id(2)
    first, last, begin, stop = 0, length, 0, room
    data = batch
    if RAGGED:
        first, last = tl.load(bounds + batch), tl.load(bounds + batch + 1)
        begin, stop, data = first, last, 0
    column = begin + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    columns_here = column < stop
    lane = tl.arange(0, WIDTH)
    key = tl.load(
        k + data * k_b + (head // shared).to(tl.int64) * k_h + column[None, :].to(tl.int64) * k_n + lane[:, None],
        mask=columns_here[None, :] & (lane < width)[:, None], other=0.0,
    )  # fmt: skip
    received = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        rows_here = row < last
        query = tl.load(
            q + data * q_b + head.to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + lane[None, :],
            mask=rows_here[:, None] & (lane < width)[None, :], other=0.0,
        )  # fmt: skip
        logits = _product(query, key, WIDE) * scaling
        here = _seen(
            data, head, row, rows_here, column, columns_here,
            mask, mask_b, mask_h, mask_q, mask_m, queries, keys, query_blocks, key_blocks, window, length, room,
            KIND, WINDOW, BLOCKS,
        )  # fmt: skip
        total = tl.load(sums + (data * heads + head) * length + row, mask=rows_here, other=float("inf"))
        weight = tl.load(weights + data * w_b + head * w_h + chosen * w_s + row, mask=rows_here, other=0.0)
        share = tl.exp(tl.where(here, logits, -float("inf")) - total[:, None])
        received += tl.sum(share * weight[:, None], axis=0)
    at = out + ((data * heads + head) * tl.num_programs(2) + chosen) * room + column
    tl.store(at, received, mask=columns_here)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sight: Sight | Tensor | None = None,
    *,
    reduce: str = "none",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As `vtc.kernels.attention_rows`."""
    plain.check_rows(query, key, sight, reduce, cu_seqlens)
    leading, (heads, length, width), room = query.shape[:-3], query.shape[-3:], key.shape[-2]
    query, key = _packed(query.flatten(0, -4)), _packed(key.flatten(0, -4))
    batch, out_batch = len(query), len(key)
    shared = heads // key.shape[1]
    columns = 64
    longest = room if cu_seqlens is None else _longest(cu_seqlens)
    blocks = triton.cdiv(longest, columns)
    logits = query.new_empty(out_batch, heads, length, room, dtype=torch.float32)
    shape = (heads, length, room) if reduce == "none" else (length, room)
    if logits.numel() and blocks:
        sums = query.new_empty(batch, heads, length, blocks, dtype=torch.float32)
        rows = logits if reduce == "none" else query.new_empty(out_batch, *shape, dtype=torch.float32)
        bounds = cu_seqlens if cu_seqlens is None else cu_seqlens.int()
        with torch.cuda.device_of(query):
            _row_logits[(blocks, batch * key.shape[1])](
                query, key, logits, sums, bounds, scaling,
                *query.stride()[:3], *key.stride()[:3], **_sight(sight, query, heads, length, room),
                heads=heads, shared=shared, length=length, room=room, width=width, blocks=blocks,
                RAGGED=bounds is not None, ROWS=_rows_together(shared * length), COLUMNS=columns, WIDTH=_width(width),
                WIDE=_wide(query, key), num_warps=4,
            )  # fmt: skip
            _row_finish[(blocks, batch * length)](
                logits, sums.logsumexp(dim=-1), rows, bounds, heads, length, room,
                REDUCE=plain.REDUCTIONS.index(reduce), RAGGED=bounds is not None, COLUMNS=columns, num_warps=2,
            )  # fmt: skip
    else:
        rows = query.new_zeros(out_batch, *shape, dtype=torch.float32)
    return rows if cu_seqlens is not None else rows.view(*leading, *shape)


def attention_push(
    query: Tensor,
    key: Tensor,
    scaling: float,
    weights: Tensor,
    sight: Sight | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As `vtc.kernels.attention_push`."""
    plain.check_push(query, key, weights, sight, cu_seqlens)
    return _Pusher(query, key, scaling, sight, cu_seqlens)(weights)


def pagerank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sight: Sight | Tensor | None = None,
    exists: Tensor | None = None,
    *,
    known: int | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
) -> Tensor:
    """As `vtc.kernels.pagerank`, with the rows' sums found once for all steps of the walk."""
    start = starting_weight(query, exists)
    weight = start.expand(query.shape[0], query.shape[1], 1, query.shape[2])
    plain.check_push(query, key, weight, sight, None)
    push = _Pusher(query, key, scaling / temperature, sight, None)
    for _ in range(iterations):
        weight = push(weight)[..., current(query, key, known)] * (1 - damping) + damping * start
    return root_mean_square(weight[:, :, 0])


class _Pusher:
    """One attention through which weights can be pushed any number of times."""

    def __init__(
        self, query: Tensor, key: Tensor, scaling: float, sight: Sight | Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        self.query, self.key = _packed(query), _packed(key)
        batch, heads, length, width = query.shape
        room = key.shape[2]
        ragged = cu_seqlens is not None
        self.bounds = None if cu_seqlens is None else cu_seqlens.int()
        self.sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.longest = (length, room) if cu_seqlens is None else (_longest(cu_seqlens),) * 2
        self.scaling = scaling
        self.shape = {
            "heads": heads, "shared": heads // key.shape[1], "length": length, "room": room, "width": width,
            **_sight(sight, query, heads, length, room),
        }  # fmt: skip
        tile = _tile(query.dtype, width)
        self.launch = {
            "RAGGED": ragged,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "WIDTH": _width(width),
            "WIDE": _wide(query, key),
        }
        self.launch |= {"num_warps": tile.warps, "num_stages": tile.stages}
        self.sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        self.empty = not (query.numel() and key.numel() and all(self.longest))
        if not self.empty:
            with torch.cuda.device_of(query):
                _row_sums[(triton.cdiv(self.longest[0], tile.rows), self.sequences * heads)](
                    self.query, self.key, self.sums, self.bounds, scaling,
                    *self.query.stride()[:3], *self.key.stride()[:3], **self.shape, **self.launch,
                )  # fmt: skip

    def __call__(self, weights: Tensor) -> Tensor:
        """(B, H, W, M) of weights (B or 1, H or 1, W, Q)."""
        batch, heads = self.query.shape[:2]
        sets, room = weights.shape[2], self.key.shape[2]
        weights = weights.float().expand(batch, heads, -1, -1)
        weights = weights if weights.stride(3) == 1 else weights.contiguous()
        out = self.query.new_zeros(batch, heads, sets, room, dtype=torch.float32)
        if not self.empty and sets:
            blocks = triton.cdiv(self.longest[1], self.launch["COLUMNS"])
            with torch.cuda.device_of(self.query):
                _push[(blocks, self.sequences * heads, sets)](
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
    """Sizes that fit into the registers: of float32, whose products run without tensor cores, less."""
    if dtype == torch.float32:
        return _Tile(32, 32, 4, 2)
    return _Tile(64, 64, 4, 2) if width > 128 else _Tile(64, 64, 4, 3)


def _rows_together(count: int) -> int:
    """Rows of one product of the few chosen queries."""
    return min(64, max(16, int(triton.next_power_of_2(count))))


def _width(width: int) -> int:
    if width > WIDEST:
        raise NoKernelError(f"heads are at most {WIDEST} wide, these are {width}")
    return max(16, int(triton.next_power_of_2(width)))


def _wide(query: Tensor, key: Tensor) -> bool:
    """Whether products are those of float32 numbers; Triton's interpreter has none of bfloat16."""
    if query.dtype != key.dtype:
        raise NoKernelError(f"query and key have one dtype; these are {query.dtype} and {key.dtype}")
    return query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and interpreting())


def _packed(x: Tensor) -> Tensor:
    """`x` with neighbouring numbers along its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def _sight(sight: Sight | Tensor | None, query: Tensor, heads: int, length: int, room: int) -> dict[str, Any]:
    """The arguments of `_seen`."""
    batch = len(query)
    arguments: dict[str, Any] = dict.fromkeys(("mask", "queries", "keys", "query_blocks", "key_blocks"))
    arguments |= dict.fromkeys(("mask_b", "mask_h", "mask_q", "mask_m", "window"), 0)
    arguments |= {"KIND": NOTHING.value, "WINDOW": False, "BLOCKS": False}
    if isinstance(sight, Sight):
        arguments |= {"KIND": SIGHT.value, "queries": _table(sight.queries, batch)}
        arguments["keys"] = _table(sight.positions(room), batch)
        if sight.window is not None:
            arguments |= {"WINDOW": True, "window": sight.window}
        blocks = sight.key_blocks(room)
        if sight.blocks is not None and blocks is not None:
            arguments |= {"BLOCKS": True, "query_blocks": _table(sight.blocks, batch)}
            arguments["key_blocks"] = _table(blocks, batch)
    elif sight is not None:
        mask = sight.expand(batch, heads, length, room).view(torch.uint8)
        names = ("mask_b", "mask_h", "mask_q", "mask_m")
        arguments |= {"KIND": MASK.value, "mask": mask} | dict(zip(names, mask.stride(), strict=True))
    return arguments


def _table(places: Tensor, batch: int) -> Tensor:
    return places.expand(batch, -1).int().contiguous()


def _specs() -> list[KernelSpec]:
    """What is launched for decoders (heads of 128, causal), towers (of 64 to 80, with a mask) and float32.

    Triton makes numbers that are 1 constants: of a tower, the heads per key head, and the one query of a [CLS] row.
    """
    reading = {"q": "*{t}", "k": "*{t}", "scaling": "fp32"}
    reading |= dict.fromkeys(("q_b", "q_h", "q_n", "k_b", "k_h", "k_n"), "i32")
    sizes = dict.fromkeys(("heads", "shared", "length", "room", "width"), "i32")
    strides = dict.fromkeys(("mask_b", "mask_h", "mask_q", "mask_m", "window"), "i32")
    places = dict.fromkeys(("queries", "keys", "query_blocks", "key_blocks"))
    kinds: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "all": ({}, {"mask": None, **places, "KIND": 0, "WINDOW": False, "BLOCKS": False}),
        "mask": ({"mask": "*u8"}, {**places, "KIND": 1, "WINDOW": False, "BLOCKS": False}),
        "sight": (dict.fromkeys(places, "*i32"), {"mask": None, "KIND": 2, "WINDOW": True, "BLOCKS": True}),
    }
    specs = []
    for kind, dtype, width in (("sight", "bf16", 128), ("mask", "fp16", 80), ("all", "fp32", 64)):
        pointers, constants = kinds[kind]
        ragged = kind == "all"
        constants = constants | {"RAGGED": ragged, "WIDTH": _width(width), "WIDE": dtype == "fp32"}
        bounds: dict[str, str] = {"bounds": "*i32"} if ragged else {}
        constants |= {} if ragged else {"bounds": None}
        common = {name: text.format(t=dtype) for name, text in reading.items()} | sizes | strides | pointers | bounds
        label = f"{kind}, {dtype}, {width}"
        tile = _tile(torch.float32 if dtype == "fp32" else torch.bfloat16, width)
        tiled = constants | {"ROWS": tile.rows, "COLUMNS": tile.columns}
        launch = (tile.warps, tile.stages)
        if kind == "mask":
            common.pop("shared")
            constants, tiled = constants | {"shared": 1}, tiled | {"shared": 1}
        rows = common | {"out": "*fp32", "sums": "*fp32", "blocks": "i32"}
        one = {"length": 1} if kind == "mask" else {}
        chosen = {name: text for name, text in rows.items() if name not in one}
        specs.append(KernelSpec(_row_logits, chosen, constants | one | {"ROWS": 16, "COLUMNS": 64}, label=label))
        specs.append(KernelSpec(_row_sums, common | {"sums": "*fp32"}, tiled, *launch, label=label))
        pushed = {"sums": "*fp32", "weights": "*fp32", "out": "*fp32"} | dict.fromkeys(("w_b", "w_h", "w_s"), "i32")
        specs.append(KernelSpec(_push, common | pushed, tiled, *launch, label=label))
    finish = dict.fromkeys(("logits", "sums", "out"), "*fp32") | dict.fromkeys(("heads", "room"), "i32")
    constants = {"bounds": None, "length": 1, "RAGGED": False, "COLUMNS": 64}
    constants["REDUCE"] = plain.REDUCTIONS.index("rms")
    specs.append(KernelSpec(_row_finish, finish, constants, num_warps=2, label="rms"))
    return specs


KERNELS = _specs()
