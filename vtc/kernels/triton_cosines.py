"""Triton kernels for norms of rows and for the nearest other row; the similarity matrix is never written."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .dispatch import interpreting

_ROWS, _COLUMNS = 64, 64  # of a tile
_PROGRAMS = 512  # approximate number of programs of a launch: several per multiprocessor


@triton.jit
def _inverse_norms(x, out, n, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the inverse norm of every row; norms are at least 1e-12."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        here = (row < n)[:, None] & (lane < width)[None, :]
        part = tl.load(x + row[:, None].to(tl.int64) * width + lane[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(part * part, axis=1)
    tl.store(out + row, 1 / tl.maximum(tl.sqrt(total), 1e-12), mask=row < n)


@triton.jit
def _nearest(
    x, inverse, value, place, count, length, width, step, offset, stripe,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Find the largest cosine of each row of a block to another row in one stripe of the columns, and its first index.

    Row i is row ``i * step`` of a batch entry; column j is row ``j * step + offset``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < count
    batch = tl.program_id(2).to(tl.int64)
    rows_at = tl.where(row_mask, row * step, 0)
    rows_inverse = tl.load(inverse + batch * length + rows_at, mask=row_mask, other=0.0)
    best = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    found = tl.zeros([ROWS], dtype=tl.int32)
    columns = (length - offset + step - 1) // step
    first = tl.program_id(1) * stripe
    for start in range(first, tl.minimum(first + stripe, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < columns
        columns_at = tl.where(column_mask, column * step + offset, 0)
        product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for inner in range(0, width, WIDTH):
            lane = inner + tl.arange(0, WIDTH)
            inside = lane < width
            left = tl.load(
                x + (batch * length + rows_at[:, None]) * width + lane[None, :],
                mask=row_mask[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                x + (batch * length + columns_at[None, :]) * width + lane[:, None],
                mask=column_mask[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            if UPCAST:
                product = tl.dot(left.to(tl.float32), right.to(tl.float32), product, input_precision="ieee")
            else:
                product = tl.dot(left, right, product)
        columns_inverse = tl.load(inverse + batch * length + columns_at, mask=column_mask, other=0.0)
        cosine = product * rows_inverse[:, None] * columns_inverse[None, :]
        other = column_mask[None, :] & (rows_at[:, None] != columns_at[None, :])
        cosine = tl.where(other, cosine, -float("inf"))
        largest = tl.max(cosine, axis=1)
        where = tl.min(tl.where(cosine == largest[:, None], column[None, :], 2147483647), axis=1)
        found = tl.where(largest > best, where, found)
        best = tl.maximum(best, largest)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * count + row
    tl.store(value + at, best, mask=row_mask)
    tl.store(place + at, found, mask=row_mask)


def inverse_norms(x: Tensor) -> Tensor:
    """Return the inverse norms (N,) float32 of contiguous rows `x` (N, D)."""
    out = torch.empty(len(x), device=x.device)
    if len(x):
        _inverse_norms[(triton.cdiv(len(x), 8),)](x, out, len(x), x.shape[1], ROWS=8, WIDTH=_power(x.shape[1], 512))
    return out


def nearest(x: Tensor, inverse: Tensor, step: int = 1, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return the largest cosine (B, R) of every `step`-th row of `x` (B, N, D) to the others from `offset` on.

    Also returns its index (B, R), the first among equals. Without any other row the cosine is minus infinity.
    """
    batch, length, width = x.shape
    count = triton.cdiv(length, step)
    splits, stripe = _stripes(count * batch, triton.cdiv(length - offset, step))
    value = torch.empty(splits, batch, count, device=x.device)
    place = torch.empty(splits, batch, count, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(count, _ROWS), splits, batch)
    _nearest[grid](x, inverse, value, place, count, length, width, step, offset, stripe, **_tile(x))
    best = value.amax(dim=0)
    first = torch.where(value == best, place, 2**31 - 1).amin(dim=0)
    return best, first.long()


def _stripes(rows: int, columns: int) -> tuple[int, int]:
    """Return number and width of the stripes of columns that give enough programs to fill a GPU."""
    blocks = triton.cdiv(columns, _COLUMNS)
    splits = max(1, min(blocks, _PROGRAMS // max(1, triton.cdiv(rows, _ROWS))))
    stripe = max(1, triton.cdiv(blocks, splits)) * _COLUMNS
    return max(1, triton.cdiv(columns, stripe)), stripe


def _tile(x: Tensor) -> dict[str, int]:
    # The interpreter stores bfloat16 as integers and would multiply those.
    upcast = x.dtype == torch.float32 or interpreting()
    return {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "WIDTH": 32, "UPCAST": upcast, "num_warps": 8}


def _power(size: int, most: int) -> int:
    """Return the next power of two, at least 16 and at most `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _specs() -> list[KernelSpec]:
    norms = {"x": "*bf16", "out": "*fp32", "n": "i32", "width": "i32"}
    specs = [KernelSpec(_inverse_norms, norms, {"ROWS": 8, "WIDTH": 512}, label="bf16")]
    sizes = dict.fromkeys(("count", "length", "width", "step", "offset", "stripe"), "i32")
    aligned = ("x", "inverse", "value", "width")  # widths of features are multiples of 16
    for dtype in ("bf16", "fp32"):
        pointers = {"x": f"*{dtype}", "inverse": "*fp32", "value": "*fp32", "place": "*i32"}
        tile = _tile(torch.empty(0, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16))
        launch = (tile.pop("num_warps"), 3, aligned)
        specs.append(KernelSpec(_nearest, pointers | sizes, tile, *launch, label=dtype))
    return specs


KERNELS = _specs()
