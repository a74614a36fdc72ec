"""Every Triton kernel against its specification, in all dtypes, at small and true shapes."""

from __future__ import annotations

import math
from typing import Any

import torch

from vtc import kernels
from vtc.bench._ops import OPS, Draw

__all__ = ["TOLERANCES", "measure"]

TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest difference relative to the largest value, by the dtype of the input: two roundings of a result to it, where
that is its dtype. Picks have a tolerance of their own, see `vtc.bench._ops.PickCheck`."""


@torch.no_grad()
def measure(case: str, device: str, small: bool) -> dict[str, Any]:
    """Return the error of "operation, dtype, size", and whether it is within the tolerance."""
    name, dtype, size = case.split(", ")
    op = OPS[name].small() if size == "small" else OPS[name]
    problem = op.at(Draw(torch.Generator().manual_seed(0), getattr(torch, dtype), device))
    with kernels.use("triton"):
        for _ in range(1 if small or problem.picks is None else 3):  # from the second call on, picks are replayed
            result = problem.ours()
    with kernels.use("torch"):
        error = problem.error(result)
    holds = error <= (1.0 if problem.picks is not None else TOLERANCES[dtype])
    return {"error": error if math.isfinite(error) else None, "holds": holds}
