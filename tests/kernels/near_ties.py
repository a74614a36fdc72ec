"""Whether greedy picks are those of the definition, where two rows may be equal but for rounding."""

from __future__ import annotations

import torch

from vtc.kernels.near_ties import (
    ROUNDING,
    Objective,
    cosines,
    coverage,
    distance_to_all,
    isolation,
    relevance,
    shortfall,
    volume,
)

__all__ = ["assert_greedy", "cosines", "coverage", "distance_to_all", "isolation", "relevance", "volume"]


def assert_greedy(
    picks: torch.Tensor, x: torch.Tensor, k: int, objective: Objective, rounding: float = ROUNDING
) -> None:
    """Every pick is new and, after the picks before it, worth as much as any other row, to rounding."""
    assert shortfall(picks, x, k, objective) <= rounding
