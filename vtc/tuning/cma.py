"""CMA-ES: evolution of a few numbers by a normal distribution that learns where good ones lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CmaEs"]


class CmaEs:
    """Covariance matrix adaptation, with the weights and rates of Hansen's tutorial (arXiv 1604.00772, table 1).

    Ask for candidates, tell how good they are, repeat. Everything is drawn from one generator and computed in float64.

    Parameters
    ----------
    start
        (D,) numbers at which the search begins.
    spread
        Standard deviation of the first candidates.
    seed
    """

    def __init__(self, start: Sequence[float], spread: float, seed: int = 0) -> None:
        self.mean = torch.tensor(start, dtype=torch.float64)
        self.spread = spread
        self._generator = torch.Generator().manual_seed(seed)
        size = len(self.mean)
        self.population = 4 + int(3 * math.log(size)) if size > 1 else 4
        parents = self.population // 2
        weights = math.log((self.population + 1) / 2) - torch.arange(1, parents + 1, dtype=torch.float64).log()
        self._weights = weights / weights.sum()
        self._mass = mass = 1 / float((self._weights**2).sum())
        self._damping_rate = (mass + 2) / (size + mass + 5)
        self._path_rate = (4 + mass / size) / (size + 4 + 2 * mass / size)
        self._one_rate = 2 / ((size + 1.3) ** 2 + mass)
        self._many_rate = min(1 - self._one_rate, 2 * (mass - 1.75 + 1 / mass) / ((size + 2) ** 2 + mass))
        self._damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (size + 1)) - 1) + self._damping_rate
        self._expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
        self._covariance = torch.eye(size, dtype=torch.float64)
        self._path, self._spread_path = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self._generation = 0

    def ask(self) -> Tensor:
        """(population, D): candidates of the next generation."""
        values, vectors = torch.linalg.eigh(self._covariance)
        drawn = torch.randn(self.population, len(self.mean), generator=self._generator, dtype=torch.float64)
        return self.mean + self.spread * (drawn * values.clamp(min=1e-20).sqrt()) @ vectors.T

    def tell(self, candidates: Tensor, losses: Sequence[float]) -> None:
        """Learn from the losses of candidates that `ask` returned; smaller is better."""
        size = len(self.mean)
        order = torch.tensor(losses, dtype=torch.float64).sort(stable=True).indices
        steps = (candidates[order[: len(self._weights)]] - self.mean) / self.spread
        step = self._weights @ steps
        values, vectors = torch.linalg.eigh(self._covariance)
        white = vectors @ ((vectors.T @ step) / values.clamp(min=1e-20).sqrt())
        self._generation += 1
        self.mean = self.mean + self.spread * step

        rate = self._damping_rate
        self._spread_path = (1 - rate) * self._spread_path + math.sqrt(rate * (2 - rate) * self._mass) * white
        length = float(self._spread_path.norm())
        settled = length / math.sqrt(1 - (1 - rate) ** (2 * self._generation)) < (1.4 + 2 / (size + 1)) * self._expected
        self.spread *= math.exp(min(1.0, rate / self._damping * (length / self._expected - 1)))

        rate = self._path_rate
        self._path = (1 - rate) * self._path + settled * math.sqrt(rate * (2 - rate) * self._mass) * step
        kept = 1 - self._one_rate - self._many_rate + (not settled) * self._one_rate * rate * (2 - rate)
        self._covariance = (
            kept * self._covariance
            + self._one_rate * torch.outer(self._path, self._path)
            + self._many_rate * (steps.T * self._weights) @ steps
        )
