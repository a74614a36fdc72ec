"""Peak memory of a function call, in bytes above the memory in use before it.

`tracemalloc` only sees Python's own allocator, never a tensor. The peak of the resident set never falls, so it allows
one measurement per process (see `vtc.bench._video`). Counting the outputs of operators under a `TorchDispatchMode`
misses workspaces inside operators. Therefore this module uses PyTorch's profiler, which logs all allocations and
releases of the tensor allocator, workspaces included; it misses only what a BLAS library allocates itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Return the largest number of bytes that tensors held during `run`, beyond those that existed before.

    The result of `run` counts; its arguments do not.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it logs every start and stop to stderr
    with profile(use_cpu=True, profile_memory=True) as log:
        run()
    events: Any = log.kineto_results
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events.events()) if e.name() == "[memory]")
    live = top = 0
    for _, _, change in changes:
        live += change
        top = max(top, live)
    return top
