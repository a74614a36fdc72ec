"""Whether greedy picks are those of the definition, where two rows may be equal but for rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch

Objective = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""What every row (N,) is worth after some picks, from cosines (N, N) in float64; the largest is picked."""


def cosines(x: torch.Tensor) -> torch.Tensor:
    unit = x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit @ unit.T


def assert_greedy(picks: torch.Tensor, x: torch.Tensor, k: int, objective: Objective, rounding: float = 2e-6) -> None:
    """Every pick is new and, after the picks before it, worth as much as any other row, to rounding."""
    order = picks.tolist()
    assert picks.dtype == torch.long
    assert len(order) == len(set(order)) == min(k, len(x))
    similarity = cosines(x)
    for step, pick in enumerate(order):
        worth = objective(similarity, order[:step])
        worth[order[:step]] = -torch.inf
        assert worth[pick] >= worth.max() - rounding, (step, pick, int(worth.argmax()))


def isolation(first: int | None) -> Objective:
    """Of `farthest_point`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        if picks:
            return -similarity[picks].amax(dim=0)
        if first is not None:
            return torch.eye(len(similarity))[first]
        return -similarity.clone().fill_diagonal_(-torch.inf).amax(dim=1)

    return objective


def distance_to_all(first: int) -> Objective:
    """Of `max_sum`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        return -similarity[picks].sum(dim=0) if picks else torch.eye(len(similarity))[first]

    return objective


def volume(relevance: torch.Tensor, places: torch.Tensor | None = None, ridge: float = 0.0) -> Objective:
    """Of `dpp_greedy`: the Schur complement, solved for every pick. Below rounding, relevance decides."""
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
    """Of `coverage_greedy`."""

    def objective(similarity: torch.Tensor, picks: list[int]) -> torch.Tensor:
        covered = similarity[picks].amax(dim=0).clamp(min=0) if picks else torch.zeros(len(similarity)).double()
        gain = (similarity - covered[:, None]).clamp(min=0).sum(dim=0)
        if weight is None:
            return gain
        return gain * weight.double() if combine == "multiply" else gain + weight.double()

    return objective
