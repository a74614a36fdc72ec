"""Triton kernels for greedy selection, with one pass over the rows per pick.

In a launch of `_pick` every program first reduces the per-program results of the previous launch to the next pick, all
to the same one. Then it compares its rows with the pick and writes the best of them. Without atomics, the picks do not
depend on the order of the programs, and without synchronisation the host does not wait. The launches of all picks are
recorded as one, see `vtc.kernels.graphs`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .cosines import squared_norms
from .graphs import replayed
from .triton_cosines import inverse_norms, nearest

_MAX_PROGRAMS = 2048  # each reads the results of all others

NEAREST = tl.constexpr(0)
SUM = tl.constexpr(1)
VOLUME = tl.constexpr(2)


@triton.jit
def _smallest(value, index):
    """Return the smallest value and its lowest index."""
    least = tl.min(value, axis=0)
    return least, tl.min(tl.where(value == least, index, 2147483647), axis=0)


@triton.jit(do_not_specialize=["step", "read_at", "write_at"])  # one binary for all picks
def _pick(
    x, scale, state, reserve, floor, factor, places, values, indices, reserves, reserve_indices, picks,
    step, n, width, programs, read_at, write_at,
    OBJECTIVE: tl.constexpr, BONUS: tl.constexpr, AXES: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Determine pick number `step`, then update `state` (N,), whose minimum is picked next; picks have infinity.

    The state is, for NEAREST, the cosine to the nearest pick; for SUM, the sum of the cosines to all picks; for VOLUME,
    the negative residual of the diagonal entry. With BONUS the first of these is raised by `reserve` of each row. For
    VOLUME, if no residual exceeds `floor`, the minimum of `reserve` is picked; there products are multiplied by a
    Gaussian of the distance between `places` (AXES, N), if AXES is not 0.
    """
    programs_at = tl.arange(0, PROGRAMS)
    there = programs_at < programs
    found = tl.load(indices + read_at + programs_at, mask=there, other=2147483647)
    best, pick = _smallest(tl.load(values + read_at + programs_at, mask=there, other=float("inf")), found)
    exhausted = False
    if OBJECTIVE == VOLUME:
        exhausted = -best <= tl.load(floor)
        spare = tl.load(reserves + read_at + programs_at, mask=there, other=float("inf"))
        found = tl.load(reserve_indices + read_at + programs_at, mask=there, other=2147483647)
        _, other = _smallest(spare, found)
        pick = tl.where(exhausted, other, pick)
    if tl.program_id(0) == 0:
        tl.store(picks + step, pick.to(tl.int64))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < n
    product = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        inside = lane < width
        pivot = tl.load(x + pick.to(tl.int64) * width + lane, mask=inside, other=0.0).to(tl.float32)
        part = tl.load(
            x + row[:, None].to(tl.int64) * width + lane[None, :], mask=here[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        product += tl.sum(part * pivot[None, :], axis=1)
    product *= tl.load(scale + row, mask=here, other=0.0) * tl.load(scale + pick)
    old = tl.load(state + row, mask=here, other=float("inf"))
    if OBJECTIVE == NEAREST:
        if BONUS:
            product += tl.load(reserve + row, mask=here, other=0.0)
        new = tl.maximum(old, product)
    elif OBJECTIVE == SUM:
        new = old + product
    else:
        distance = tl.zeros([ROWS], dtype=tl.float32)
        for axis in tl.static_range(AXES):
            lies = places + tl.cast(axis, tl.int64) * n
            apart = tl.load(lies + row, mask=here, other=0.0) - tl.load(lies + pick)
            distance += apart * apart
        product *= tl.exp(-0.5 * distance)
        for start in range(0, step, STEPS):
            earlier = start + tl.arange(0, STEPS)
            known = earlier < step
            theirs = tl.load(factor + earlier.to(tl.int64) * n + pick, mask=known, other=0.0)
            at = factor + earlier[:, None].to(tl.int64) * n + row[None, :]
            ours = tl.load(at, mask=known[:, None] & here[None, :], other=0.0)
            product -= tl.sum(theirs[:, None] * ours, axis=0)
        entry = tl.where(exhausted, 0.0, product / tl.sqrt(tl.where(exhausted, 1.0, -best)))
        tl.store(factor + tl.cast(step, tl.int64) * n + row, entry, mask=here)
        new = old + entry * entry
    new = tl.where(row == pick, float("inf"), new)
    tl.store(state + row, new, mask=here)
    best, pick = _smallest(new, row)
    tl.store(values + write_at + tl.program_id(0), best)
    tl.store(indices + write_at + tl.program_id(0), pick)
    if OBJECTIVE == VOLUME:
        spare = tl.where(new == float("inf"), float("inf"), tl.load(reserve + row, mask=here, other=float("inf")))
        best, pick = _smallest(spare, row)
        tl.store(reserves + write_at + tl.program_id(0), best)
        tl.store(reserve_indices + write_at + tl.program_id(0), pick)


@replayed()
def farthest_point(x: Tensor, k: int, first: int | Tensor | None = None) -> Tensor:
    """Implement `vtc.kernels.farthest_point`."""
    x = x.contiguous()
    inverse = inverse_norms(x)
    start: Tensor | int | None = first
    if first is None and len(x):
        start = nearest(x[None], inverse[None])[0][0].argmin()
    return _run(x, inverse, torch.full_like(inverse, -torch.inf), k, start, NEAREST)


@replayed()
def relevant_farthest_point(x: Tensor, k: int, bonus: Tensor) -> Tensor:
    """Implement `vtc.kernels.relevant_farthest_point`."""
    x, bonus = x.contiguous(), bonus.float()
    inverse = inverse_norms(x)
    first = bonus.argmax() if len(x) else None
    return _run(x, inverse, torch.full_like(inverse, -torch.inf), k, first, NEAREST, bonus)


@replayed()
def max_sum(x: Tensor, k: int, first: int | Tensor) -> Tensor:
    """Implement `vtc.kernels.max_sum`."""
    x = x.contiguous()
    inverse = inverse_norms(x)
    return _run(x, inverse, torch.zeros_like(inverse), k, first, SUM)


@replayed()
def dpp_greedy(
    x: Tensor, k: int, relevance: Tensor | None = None, places: Tensor | None = None, ridge: float = 0.0
) -> Tensor:
    """Implement `vtc.kernels.dpp_greedy`."""
    x = x.contiguous()
    inverse = inverse_norms(x)
    weight = torch.ones_like(inverse) if relevance is None else relevance.float()
    left = squared_norms(inverse, weight) + ridge * weight.square()
    axes = None if places is None else places.float().T.contiguous()
    return _run(x, inverse * weight, -left, k, None, VOLUME, weight, axes)


def _run(
    x: Tensor,
    scale: Tensor,
    state: Tensor,
    k: int,
    first: Tensor | int | None,
    objective,
    weight: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Launch the kernel once per pick; without `first` the minimum of `state` is the first pick.

    `weight` (N,), where given, is the bonus of NEAREST, or the relevance of VOLUME.
    """
    n, width = x.shape
    k = min(k, n)
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    if k == 0:
        return picks
    rows = max(16, triton.next_power_of_2(triton.cdiv(n, _MAX_PROGRAMS)))
    programs = triton.cdiv(n, rows)
    # Double-buffered results of the programs, one set to read and one to write; the first holds the first pick.
    values = torch.full((2, programs), torch.inf, device=x.device)
    indices = torch.zeros(2, programs, dtype=torch.int32, device=x.device)
    reserves, reserve_indices = torch.full_like(values, torch.inf), torch.zeros_like(indices)
    if first is None:
        begin = state.argmin()
    elif isinstance(first, Tensor):
        begin = first % n
    else:
        begin = torch.full((), first % n, device=x.device)  # written by the device: a copy from the host would wait
    values[0, 0], indices[0, 0] = state.index_select(0, begin.view(1))[0], begin
    volume = objective is VOLUME
    floor = factor = None
    reserve = None if weight is None else -weight
    if volume and reserve is not None:
        floor = -1e-5 * state.amin()
        reserves[0, 0] = reserve.amin()
        reserve_indices[0, 0] = reserve.argmin()
        factor = torch.empty(k, n, device=x.device)
    for step in range(k):
        _pick[(programs,)](
            x, scale, state, reserve, floor, factor, places, values, indices, reserves, reserve_indices, picks,
            step, n, width, programs, step % 2 * programs, (step + 1) % 2 * programs,
            OBJECTIVE=objective.value, BONUS=reserve is not None and not volume,
            AXES=0 if places is None else len(places), ROWS=rows, WIDTH=_WIDTH, STEPS=_STEPS,
            PROGRAMS=triton.next_power_of_2(programs),
        )  # fmt: skip
    return picks


_WIDTH, _STEPS = 256, 16  # columns of the rows and rows of the factor per step


def _specs() -> list[KernelSpec]:
    found = {"values": "*fp32", "indices": "*i32", "picks": "*i64"}
    found |= dict.fromkeys(("step", "n", "width", "programs", "read_at", "write_at"), "i32")
    spare = {"reserve": "*fp32", "floor": "*fp32", "factor": "*fp32", "reserves": "*fp32", "reserve_indices": "*i32"}
    specs = []
    kinds = (
        ("nearest", NEAREST, 0),
        ("nearest with a bonus", NEAREST, 0),
        ("sum", SUM, 0),
        ("volume", VOLUME, 0),
        ("volume with places", VOLUME, 3),
    )
    for kind, objective, axes in kinds:
        for dtype in ("bf16", "fp32"):
            pointers = {"x": f"*{dtype}", "scale": "*fp32", "state": "*fp32"} | found
            bonus = "bonus" in kind
            constants = {
                "OBJECTIVE": objective.value,
                "BONUS": bonus,
                "AXES": axes,
                "ROWS": 16,
                "WIDTH": _WIDTH,
                "STEPS": _STEPS,
                "PROGRAMS": 256,
            }
            present = spare if objective is VOLUME else {"reserve": "*fp32"} if bonus else {}
            pointers |= present
            constants |= dict.fromkeys(name for name in spare if name not in present)
            if axes:
                pointers["places"] = "*fp32"
            else:
                constants["places"] = None
            specs.append(KernelSpec(_pick, pointers, constants, label=f"{kind}, {dtype}"))
    return specs


KERNELS = _specs()
