"""Triton kernel for merging rows: one program per slot and block of columns adds its rows in order, without atomics."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .merge import slots_of_matching
from .triton_cosines import inverse_norms, nearest

_WIDTH = 512  # columns of a program


@triton.jit
def _merge(x, order, bounds, weight, out, width, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr):
    """Sum the weighted rows ``order[bounds[slot]:bounds[slot + 1]]`` of slot `program_id(0)`."""
    slot = tl.program_id(0)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = lane < width
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for member in range(tl.load(bounds + slot), tl.load(bounds + slot + 1)):
        row = tl.load(order + member)
        part = tl.load(x + row * width + lane, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weight + row)
        total += part
    tl.store(out + slot.to(tl.int64) * width + lane, total.to(out.dtype.element_ty), mask=inside)


def segment_merge(x: Tensor, slot: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Implement `vtc.kernels.segment_merge`."""
    width = x.shape[1:].numel()
    out = x.new_empty(count, *x.shape[1:])
    if not out.numel():
        return out
    ordered, order = slot.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=slot.device))
    share = None if weight is None else weight.float().contiguous()
    tile = min(_WIDTH, max(16, triton.next_power_of_2(width)))
    grid = (count, triton.cdiv(width, tile))
    _merge[grid](x.contiguous(), order, bounds, share, out, width, WEIGHTED=share is not None, WIDTH=tile)
    return out


def bipartite_merge(metric: Tensor, r: int, order: str = "original", first: int = 0) -> tuple[Tensor, Tensor]:
    """Implement `vtc.kernels.bipartite_merge`."""
    batch, n = metric.shape[:2]
    r = max(0, min(r, n // 2))
    if r == 0:
        tokens = torch.arange(n, device=metric.device)
        return tokens.expand(batch, n), tokens.expand(batch, n)
    # Sources are the even rows: one row in front, which is taken off again, shifts them.
    metric = torch.nn.functional.pad(metric, (0, 0, first, 0)).contiguous()
    best, partner = nearest(metric, inverse_norms(metric.flatten(0, 1)).view(batch, -1), step=2, offset=1)
    return slots_of_matching(best[:, first:], partner[:, first:], n, r, order, first)


def _specs() -> list[KernelSpec]:
    specs = []
    for dtype in ("bf16", "fp32"):
        pointers = {"x": f"*{dtype}", "order": "*i64", "bounds": "*i64", "out": f"*{dtype}", "width": "i32"}
        weighted = {"WEIGHTED": True, "WIDTH": _WIDTH}
        specs.append(KernelSpec(_merge, pointers | {"weight": "*fp32"}, weighted, label=f"weighted, {dtype}"))
    return specs


KERNELS = _specs()
