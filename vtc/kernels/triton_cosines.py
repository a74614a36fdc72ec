"""Triton kernels that compare rows with rows, and reduce what they find before any of it is written."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .dispatch import interpreting

_ROWS, _COLUMNS = 64, 64  # of a tile
_SPLITS = 512  # programs that a launch should have, roughly: several per multiprocessor

NEAREST = tl.constexpr(0)
GAIN = tl.constexpr(1)


@triton.jit
def _inverse_norms(x, out, n, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One over the norm of every row, which is at least 1e-12."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        here = (row < n)[:, None] & (lane < width)[None, :]
        part = tl.load(x + row[:, None].to(tl.int64) * width + lane[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(part * part, axis=1)
    tl.store(out + row, 1 / tl.maximum(tl.sqrt(total), 1e-12), mask=row < n)


@triton.jit
def _compare(
    x, inverse, chosen, covered, value, place, count, length, width, step, offset, stripe,
    CHOSEN: tl.constexpr, REDUCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compare a block of rows with one stripe of the columns.

    Row i is row ``i * step`` of a batch entry, or ``chosen[i]``; column j is row ``j * step + offset``. NEAREST: the
    largest cosine and the first place where it is, a row's with itself left out. GAIN: the sum of what the cosines are
    above `covered`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows_here = row < count
    batch = tl.program_id(2).to(tl.int64)
    rows_at = row * step
    if CHOSEN:
        rows_at = tl.load(chosen + row, mask=rows_here, other=0).to(tl.int32)
    rows_at = tl.where(rows_here, rows_at, 0)
    rows_inverse = tl.load(inverse + batch * length + rows_at, mask=rows_here, other=0.0)
    best = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    found = tl.zeros([ROWS], dtype=tl.int32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    columns = (length - offset + step - 1) // step
    first = tl.program_id(1) * stripe
    for start in range(first, tl.minimum(first + stripe, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        columns_here = column < columns
        columns_at = tl.where(columns_here, column * step + offset, 0)
        product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for inner in range(0, width, WIDTH):
            lane = inner + tl.arange(0, WIDTH)
            inside = lane < width
            left = tl.load(
                x + (batch * length + rows_at[:, None]) * width + lane[None, :],
                mask=rows_here[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                x + (batch * length + columns_at[None, :]) * width + lane[:, None],
                mask=columns_here[None, :] & inside[:, None], other=0.0,
            )  # fmt: skip
            if WIDE:
                product = tl.dot(left.to(tl.float32), right.to(tl.float32), product, input_precision="ieee")
            else:
                product = tl.dot(left, right, product)
        columns_inverse = tl.load(inverse + batch * length + columns_at, mask=columns_here, other=0.0)
        cosine = product * rows_inverse[:, None] * columns_inverse[None, :]
        if REDUCE == NEAREST:
            other = columns_here[None, :] & (rows_at[:, None] != columns_at[None, :])
            cosine = tl.where(other, cosine, -float("inf"))
            largest = tl.max(cosine, axis=1)
            where = tl.min(tl.where(cosine == largest[:, None], column[None, :], 2147483647), axis=1)
            found = tl.where(largest > best, where, found)
            best = tl.maximum(best, largest)
        else:
            known = tl.load(covered + columns_at, mask=columns_here, other=0.0)
            added = tl.maximum(cosine - known[None, :], 0.0)
            total += tl.sum(tl.where(columns_here[None, :], added, 0.0), axis=1)
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * count + row
    if REDUCE == NEAREST:
        tl.store(value + at, best, mask=rows_here)
        tl.store(place + at, found, mask=rows_here)
    else:
        tl.store(value + at, total, mask=rows_here)


def inverse_norms(x: Tensor) -> Tensor:
    """(N,) float32 of contiguous rows `x` (N, D)."""
    out = torch.empty(len(x), device=x.device)
    if len(x):
        _inverse_norms[(triton.cdiv(len(x), 8),)](x, out, len(x), x.shape[1], ROWS=8, WIDTH=_power(x.shape[1], 512))
    return out


def nearest(x: Tensor, inverse: Tensor, step: int = 1, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(B, R) largest cosine of every `step`-th row of `x` (B, N, D) to the other rows from `offset` on, and its place.

    The first place where several are equal. A row that there is nothing to compare with has minus infinity.
    """
    batch, length, width = x.shape
    count = triton.cdiv(length, step)
    splits, stripe = _stripes(count * batch, triton.cdiv(length - offset, step))
    value = torch.empty(splits, batch, count, device=x.device)
    place = torch.empty(splits, batch, count, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(count, _ROWS), splits, batch)
    sizes = (count, length, width, step, offset, stripe)
    _compare[grid](
        x, inverse, None, None, value, place, *sizes, CHOSEN=False, REDUCE=NEAREST.value, **_tile(x)
    )  # fmt: skip
    best = value.amax(dim=0)
    first = torch.where(value == best, place, 2**31 - 1).amin(dim=0)
    return best, first.long()


def gains(x: Tensor, inverse: Tensor, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
    """(M,) float32: for every row of `x` (N, D), or those `chosen`, the sum of what its cosines are above `covered`."""
    length, width = x.shape
    count = length if chosen is None else len(chosen)
    splits, stripe = _stripes(count, length)
    value = torch.empty(splits, count, device=x.device)
    if not count:
        return value.sum(dim=0)
    grid = (triton.cdiv(count, _ROWS), splits, 1)
    sizes = (count, length, width, 1, 0, stripe)
    _compare[grid](
        x, inverse, chosen, covered, value, None, *sizes,
        CHOSEN=chosen is not None, REDUCE=GAIN.value, **_tile(x),
    )  # fmt: skip
    return value.sum(dim=0)


def _stripes(rows: int, columns: int) -> tuple[int, int]:
    """Into how many stripes the columns are cut, and how wide those are: enough programs to fill a GPU."""
    blocks = triton.cdiv(columns, _COLUMNS)
    splits = max(1, min(blocks, _SPLITS // max(1, triton.cdiv(rows, _ROWS))))
    stripe = max(1, triton.cdiv(blocks, splits)) * _COLUMNS
    return max(1, triton.cdiv(columns, stripe)), stripe


def _tile(x: Tensor) -> dict[str, int]:
    # The interpreter multiplies what it holds bfloat16 in, which are its bits.
    wide = x.dtype == torch.float32 or interpreting()
    return {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "WIDTH": 32, "WIDE": wide, "num_warps": 8}


def _power(size: int, most: int) -> int:
    """The next power of two, 16 at least and `most` at most."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _specs() -> list[KernelSpec]:
    norms = {"x": "*bf16", "out": "*fp32", "n": "i32", "width": "i32"}
    specs = [KernelSpec(_inverse_norms, norms, {"ROWS": 8, "WIDTH": 512}, label="bf16")]
    sizes = dict.fromkeys(("count", "length", "width", "step", "offset", "stripe"), "i32")
    aligned = ("x", "inverse", "value", "width")  # widths of features are multiples of 16
    for dtype in ("bf16", "fp32"):
        rows = {"x": f"*{dtype}", "inverse": "*fp32", "value": "*fp32"} | sizes
        tile = _tile(torch.empty(0, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16))
        launch = (tile.pop("num_warps"), 3, aligned)
        constants = {"chosen": None, "covered": None, "CHOSEN": False, "REDUCE": NEAREST.value, **tile}
        specs.append(KernelSpec(_compare, rows | {"place": "*i32"}, constants, *launch, label=f"nearest, {dtype}"))
        constants = {"place": None, "CHOSEN": True, "REDUCE": GAIN.value, **tile}
        pointers = {"chosen": "*i64", "covered": "*fp32"}
        specs.append(KernelSpec(_compare, rows | pointers, constants, *launch, label=f"gain, {dtype}"))
    return specs


KERNELS = _specs()
