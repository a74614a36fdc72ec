"""What `vtc bench gpu` runs on: versions, the device, and how fast it copies and multiplies."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from vtc.bench.timing import CLOCKS, Case, check_device, conditions, interleave, repeated

__all__ = ["copy_bandwidth", "measure"]

_COPIED = {True: 2**22, False: 2**30}
"""Bytes of the copy: far more than a cache holds; little where it is only tried."""

_SIDE = {True: 256, False: 8192}
"""Of the square matrices."""


def measure(case: str, device: str, small: bool) -> dict[str, Any]:
    """Return conditions, and bytes per second of a copy and FLOP/s of a bfloat16 product."""
    check_device(device)
    matrix = torch.randn(_SIDE[small], _SIDE[small], device=device).bfloat16()
    stated = conditions(device=device)
    del stated["command"]  # of the process that measures one case
    stated["versions"]["triton"] = _version("triton")
    return {
        "conditions": stated,
        "bytes_per_second": copy_bandwidth(device, small),
        "flops": 2 * _SIDE[small] ** 3 / _seconds(lambda: matrix @ matrix, device),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None,
    }


@functools.cache
def copy_bandwidth(device: str, small: bool) -> float:
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    source = torch.ones(_COPIED[small], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], Any], device: str) -> float:
    case = Case(repeated(work, device, CLOCKS["wall"]))
    return interleave({"one": case}, repeats=5, warmup=1)["one"]["run"].median


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
