"""Triton kernels for top-k selection per segment and for packing a batch.

`_best` is a radix select: four histograms, of eight bits each, determine the k-th largest score; another pass marks the
larger scores and the first ones that equal it. `_slots` converts the marks of a row to the columns of its slots, and
`_gather` copies these columns of all planes. One program per segment or row makes the result deterministic.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .dispatch import NoKernelError
from .pack import Packed, check_scores

_BLOCK = 1024  # scores or tokens per step
_WIDTH = 1024  # elements of a row of a plane per step


@triton.jit
def _sortable(score):
    """Map scores to unsigned integers of the same order; NaN is lowest, and both zeros are equal."""
    score = score.to(tl.float32)
    score = tl.where(score == score, score, -float("inf")) + 0.0
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _best(scores, offsets, counts, places, marks, BLOCK: tl.constexpr):
    """Mark the best `counts` scores of a segment at their places."""
    segment = tl.program_id(0)
    start, stop = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    count = tl.minimum(tl.load(counts + segment), stop - start).to(tl.int32)
    known = tl.zeros([], dtype=tl.uint32)
    missing = count
    digits = tl.arange(0, 256)
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        found = tl.zeros([256], dtype=tl.int32)
        for first in range(start, stop, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = _sortable(tl.load(scores + at, mask=at < stop, other=0.0))
            agrees = at < stop
            if digit > 0:
                agrees &= (key >> (shift + 8)) == (known >> (shift + 8))
            found += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=agrees)
        at_or_above = tl.cumsum(found, axis=0, reverse=True)
        # The largest digit with enough scores at or above it; 0 for a count of 0 or an empty segment.
        last = tl.maximum(tl.sum((at_or_above >= tl.maximum(missing, 1)).to(tl.int32), axis=0) - 1, 0)
        missing -= tl.sum(tl.where(digits > last, found, 0), axis=0)
        known |= last.to(tl.uint32) << shift
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < stop
        key = _sortable(tl.load(scores + at, mask=here, other=0.0))
        equal = here & (key == known)
        rank = tl.cumsum(equal.to(tl.int32), axis=0)
        stays = (count > 0) & ((here & (key > known)) | (equal & (rank <= missing)))
        missing -= tl.sum(equal.to(tl.int32), axis=0)
        place = tl.load(places + at, mask=here, other=0)
        tl.store(marks + place, stays.to(tl.int8), mask=here)


@triton.jit
def _slots(keep, lengths, index, mask, length, width, LEFT: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the columns of the slots of one row and the mask of the slots that are not padding."""
    row = tl.program_id(0).to(tl.int64)
    real = tl.load(lengths + row).to(tl.int32)
    kept_before = 0
    for first in range(0, length, BLOCK):
        column = first + tl.arange(0, BLOCK)
        here = column < length
        stays = tl.load(keep + row * length + column, mask=here, other=0).to(tl.int32)
        kept = kept_before + tl.cumsum(stays, axis=0)
        dropped = column + 1 - kept
        if LEFT:
            slot = tl.where(stays != 0, width - real + kept, dropped - (length - width)) - 1
        else:
            slot = tl.where(stays != 0, kept, real + dropped) - 1
        there = here & (slot >= 0) & (slot < width)
        tl.store(index + row * width + slot, column.to(tl.int64), mask=there)
        tl.store(mask + row * width + slot, stays.to(tl.int8), mask=there)
        kept_before += tl.sum(stays, axis=0)


@triton.jit
def _gather(index, sources, targets, shapes, slots, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Copy one slot of one row of every plane; `shapes`: outer size, strides of the three axes, inner size."""
    row = tl.program_id(1)
    slot = tl.program_id(0)  # more of them than the second axis of a grid holds are possible, of rows not
    column = tl.load(index + row.to(tl.int64) * slots + slot)
    zero = column * 0  # int64, because offsets of large batches exceed 32 bits
    for plane in tl.static_range(PLANES):
        outer, outer_stride, row_stride, column_stride, inner = shapes[plane]
        for entry in range(outer):
            source = sources[plane] + (zero + entry) * outer_stride + (zero + row) * row_stride
            line = ((zero + entry) * tl.num_programs(1) + row) * slots + slot
            for first in range(0, inner, WIDTH):
                lane = first + tl.arange(0, WIDTH)
                part = tl.load(source + column * column_stride + lane, mask=lane < inner)
                tl.store(targets[plane] + line * inner + lane, part, mask=lane < inner)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Implement `vtc.kernels.topk_indices`."""
    n = len(scores)
    marks = torch.zeros(n, dtype=torch.int8, device=scores.device)
    # Written by the device: a copy from the host would wait for it, and so would asking how many marks there are.
    offsets = torch.arange(2, device=scores.device) * n
    counts = torch.full((1,), k, device=scores.device)
    places = torch.arange(n, device=scores.device)
    _best[(1,)](scores.contiguous(), offsets, counts, places, marks, BLOCK=_BLOCK)
    return torch.nonzero_static(marks, size=max(0, min(k, n))).squeeze(1)


def select_gather(
    keep: Tensor,
    planes: Sequence[Tensor] = (),
    axes: Sequence[int] = (),
    *,
    scores: Tensor | None = None,
    columns: Tensor | None = None,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    threshold: float | None = None,
    marks: Tensor | None = None,
    marked: Sequence[Tensor] = (),
    side: str = "left",
) -> Packed:
    """Implement `vtc.kernels.select_gather`."""
    _on_one_device([keep, *planes, *marked, *([] if marks is None else [marks])])
    check_scores(scores, columns, offsets, counts, threshold)
    keep = keep.contiguous()
    if scores is not None and columns is not None and offsets is not None and len(scores):
        keep = keep.clone()
        if counts is not None:
            _best[(len(counts),)](scores.contiguous(), offsets, counts, columns, keep.view(torch.int8), BLOCK=_BLOCK)
        else:
            keep.view(-1)[columns] = scores >= threshold  # type: ignore[operator]
    lengths = keep.sum(dim=1)
    batch, length = keep.shape
    width = int(lengths.max()) if batch else 0
    index = torch.empty(batch, width, dtype=torch.long, device=keep.device)
    mask = torch.empty(batch, width, dtype=torch.bool, device=keep.device)
    if index.numel():
        _slots[(batch,)](
            keep.view(torch.int8), lengths, index, mask.view(torch.int8), length, width,
            LEFT=side == "left", BLOCK=_BLOCK,
        )  # fmt: skip
    rows: tuple[Tensor, ...] = ()
    if marks is not None and marked:
        staying = keep[marks].nonzero().view(1, -1)
        rows = tuple(plane[0] for plane in _gathered(staying, [plane[None] for plane in marked], [1] * len(marked)))
    return Packed(index, mask, lengths, _gathered(index, planes, axes), rows)


def gather_planes(index: Tensor, planes: Sequence[Tensor], axes: Sequence[int]) -> tuple[Tensor, ...]:
    """Implement `vtc.kernels.gather_planes`."""
    _on_one_device([index, *planes])
    return _gathered(index, planes, axes)


def _on_one_device(tensors: Sequence[Tensor]) -> None:
    if len({tensor.device for tensor in tensors}) > 1:
        raise NoKernelError("the tensors are on several devices")


def _gathered(index: Tensor, planes: Sequence[Tensor], axes: Sequence[int]) -> tuple[Tensor, ...]:
    """Gather all planes in one launch, whatever their dtypes; booleans are copied as bytes."""
    batch, width = index.shape
    out, sources, targets, shapes = [], [], [], []
    for plane, axis in zip(planes, axes, strict=True):
        shape = (*plane.shape[: axis - 1], batch, width, *plane.shape[axis + 1 :])
        out.append(plane.new_empty(shape))
        if not out[-1].numel():
            continue
        # (outer, batch, columns, *inner) with contiguous inner axes.
        view = plane.flatten(0, axis - 2) if axis > 1 else plane[None]
        inner = view.shape[3:].numel()
        if not view[0, 0, 0].is_contiguous():
            view = view.contiguous()
        row_stride = view.stride(1) if view.shape[1] > 1 else 0
        sources.append(view.view(torch.int8) if view.dtype == torch.bool else view)
        targets.append(out[-1].view(torch.int8) if plane.dtype == torch.bool else out[-1])
        shapes.append((view.shape[0], view.stride(0), row_stride, view.stride(2), inner))
    if sources:
        tile = min(_WIDTH, max(16, triton.next_power_of_2(max(shape[-1] for shape in shapes))))
        _gather[(width, batch)](
            index.contiguous(), tuple(sources), tuple(targets), tuple(shapes), width, WIDTH=tile, PLANES=len(sources)
        )
    return tuple(out)


def _specs() -> list[KernelSpec]:
    best = {"scores": "*fp32", "offsets": "*i64", "counts": "*i64", "places": "*i64", "marks": "*i8"}
    slots = {"keep": "*i8", "lengths": "*i64", "index": "*i64", "mask": "*i8", "length": "i32", "width": "i32"}
    types = ("*bf16", "*i64", "*i64", "*i8")
    gather: dict[str, Any] = {
        "index": "*i64",
        "sources": types,
        "targets": types,
        "shapes": (("i32",) * 5,) * 4,
        "slots": "i32",
    }
    return [
        KernelSpec(_best, best, {"BLOCK": _BLOCK}),
        KernelSpec(_slots, slots, {"LEFT": True, "BLOCK": _BLOCK}),
        KernelSpec(_gather, gather, {"WIDTH": _WIDTH, "PLANES": 4}, aligned=("index",)),
    ]


KERNELS = _specs()
