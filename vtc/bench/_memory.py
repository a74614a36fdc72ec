"""Peak memory of a piece of work, as bytes above what was there before it.

`tracemalloc` sees only what Python's own allocator hands out, never a tensor. The resident set of the process has a
high-water mark that does not fall again, so it serves one measurement per process (`vtc.bench._video` does that).
Counting the outputs of operators under a `TorchDispatchMode` misses what an operator allocates for itself. Hence
PyTorch's profiler: it logs every allocation and every release of the allocator that tensors live in, workspaces inside
operators included. What a BLAS library allocates behind PyTorch's back it does not see; nor do the other two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors held at any one time during `run`, beyond those that existed before.

    The result of `run` counts, what it was given does not.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it reports every start and stop on stderr otherwise
    with profile(use_cpu=True, profile_memory=True) as log:
        run()
    events: Any = log.kineto_results
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events.events()) if e.name() == "[memory]")
    live = top = 0
    for _, _, change in changes:
        live += change
        top = max(top, live)
    return top
