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
    """Return the median seconds of each implementation of "operation, kernel", "..., graph" or "..., compiled"."""
    name, what = case.split(", ")
    op = OPS[name].small() if small else OPS[name]
    problem = op.at(Draw(torch.Generator().manual_seed(0), _DTYPE, device))
    works: dict[str, Callable[[], Any]]
    if what == "compiled":
        # Without a GPU it is traced only: no compiler is asked for.
        works = {"compiled": torch.compile(problem.baseline, backend="eager" if small else "inductor")}
        works["compiled"]()
    elif what == "graph":
        # One launch for all picks is what the other cases time; here each comes from the host.
        works = {"launches": partial(_launched, problem.ours)}
        if kernels.dispatch.OPS[name.partition("/")[0]].triton is None:
            works["torch"] = problem.ours
        if not all(torch.equal(problem.ours(), _launched(problem.ours)) for _ in range(3)):
            raise RuntimeError("picks that are replayed differ from those that the host launches")
    else:
        works = {
            "triton": partial(_with, "triton", problem.ours),
            "torch": partial(_with, "torch", problem.ours),
            "baseline": problem.baseline,
        }
        works["triton"]()  # its second call, before those that are timed, records its launches
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


def _launched(work: Callable[[], Any]) -> Any:
    with kernels.graphs.off():
        return work()


def _tensors(result: Any) -> Iterator[Tensor]:
    yield from (result,) if isinstance(result, Tensor) else result
