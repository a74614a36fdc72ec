"""Every operation as a Triton kernel, in PyTorch, as its baseline, and as `torch.compile` makes the baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc import kernels
from vtc.bench._gpu_machine import copy_bandwidth
from vtc.bench._ops import OPS, Draw
from vtc.bench.timing import CLOCKS, Case, interleave, repeated

__all__ = ["measure"]

_DTYPE = torch.bfloat16
_REPEATS = {True: 1, False: 7}


@torch.no_grad()
def measure(case: str, device: str, small: bool) -> dict[str, Any]:
    """Return the median seconds of each implementation of "operation, kernel", or of "operation, compiled"."""
    name, what = case.split(", ")
    op = OPS[name].small() if small else OPS[name]
    problem = op.at(Draw(torch.Generator().manual_seed(0), _DTYPE, device))
    works: dict[str, Callable[[], Any]]
    if what == "compiled":
        # Without a GPU it is traced only: no compiler is asked for.
        works = {"compiled": torch.compile(problem.baseline, backend="eager" if small else "inductor")}
        works["compiled"]()
    else:
        works = {
            "triton": partial(_with, "triton", problem.ours),
            "torch": partial(_with, "torch", problem.ours),
            "baseline": problem.baseline,
        }
    timings = interleave(
        {label: Case(repeated(work, device, CLOCKS["wall"])) for label, work in works.items()},
        repeats=_REPEATS[small],
        warmup=1,
    )
    found: dict[str, Any] = {"times": {label: timing["run"].median for label, timing in timings.items()}}
    if what == "kernel":
        passed = sum(x.nbytes for x in (*problem.inputs, *_tensors(problem.baseline())))
        found |= {"bytes": passed, "limit": passed / copy_bandwidth(device, small)}
    return found


def _with(choice: str, work: Callable[[], Any]) -> Any:
    with kernels.use(choice):
        return work()


def _tensors(result: Any) -> Iterator[Tensor]:
    yield from (result,) if isinstance(result, Tensor) else result
