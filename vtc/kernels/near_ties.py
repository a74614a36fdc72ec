"""Whether greedy picks are those of the definition, where two rows may be equal but for rounding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = [
    "ROUNDING",
    "ROUNDING_OF_COVERAGE",
    "ROUNDING_OF_VOLUME",
    "Objective",
    "cosines",
    "coverage",
    "distance_to_all",
    "isolation",
    "relevance",
    "shortfall",
    "volume",
]

Objective = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""What every row (N,) is worth after some picks, from cosines (N, N) in float64; the largest is picked."""

ROUNDING = 2e-6
"""By how much a pick may be worth less than the best: of one cosine in float32. Sums of N cosines have N times that."""

ROUNDING_OF_COVERAGE = 1e-5
"""Per row, of a sum of increases."""

ROUNDING_OF_VOLUME = 4e-5
"""Of a Schur complement that is updated pick by pick."""


def cosines(x: torch.Tensor) -> torch.Tensor:
    """Return the cosines (N, N) between the rows of `x` (N, D) in float64."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.T


def shortfall(picks: torch.Tensor, x: torch.Tensor, k: int, objective: Objective) -> float:
    """Return the largest difference between the best row and the pick that was taken after the picks before it.

    Infinite if the picks are not min(k, N) distinct rows, as int64.
    """
    order = picks.tolist()
    if picks.dtype != torch.long or not len(order) == len(set(order)) == min(k, len(x)):
        return math.inf
    similarity = cosines(x)
    largest = 0.0
    for step, pick in enumerate(order):
        worth = objective(similarity, order[:step])
        worth[order[:step]] = -torch.inf
        best = worth.max()
        if not bool(worth[pick] >= best):  # of a single row both may be infinite
            gap = float(best - worth[pick])
            largest = max(largest, math.inf if math.isnan(gap) else gap)
    return largest


def isolation(first: int | None) -> Objective:
    """Return the objective of `farthest_point`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        if picks:
            return -similarity[picks].amax(dim=0)
        if first is not None:
            return torch.eye(len(similarity))[first]
        return -similarity.clone().fill_diagonal_(-torch.inf).amax(dim=1)

    return objective


def relevance(bonus: torch.Tensor) -> Objective:
    """Return the objective of `relevant_farthest_point`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        distance = 1 - similarity[picks].amax(dim=0) if picks else torch.zeros(len(similarity)).double()
        return distance + bonus.double()

    return objective


def distance_to_all(first: int) -> Objective:
    """Return the objective of `max_sum`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        return -similarity[picks].sum(dim=0) if picks else torch.eye(len(similarity))[first]

    return objective


def volume(relevance: torch.Tensor, places: torch.Tensor | None = None, ridge: float = 0.0) -> Objective:
    """Return the objective of `dpp_greedy`: the Schur complement, solved for every pick.

    Below rounding, relevance decides.
    """
    near = 1.0 if places is None else (-torch.cdist(places.double(), places.double()).square() / 2).exp()

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        weight = relevance.double()
        kernel = weight[:, None] * (similarity * near + ridge * torch.eye(len(similarity))) * weight
        cross = kernel[picks]
        explained = torch.linalg.lstsq(kernel[picks][:, picks], cross, driver="gelsd").solution if picks else cross
        left = kernel.diagonal() - (cross * explained).sum(dim=0)
        left[picks] = -torch.inf
        return left

    return objective


def coverage(weight: torch.Tensor | None, combine: str) -> Objective:
    """Return the objective of `coverage_greedy`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        covered = similarity[picks].amax(dim=0).clamp(min=0) if picks else torch.zeros(len(similarity)).double()
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=0)
        if weight is None:
            return gain
        return gain * weight.double() if combine == "multiply" else gain + weight.double()

    return objective
