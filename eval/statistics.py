"""Confidence intervals and tests for clustered scores: several questions about one image are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

DRAWS = 4000


def cluster_sums(values: ArrayLike, groups: Sequence[Hashable]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums and sizes of the clusters, in order of appearance."""
    data = np.asarray(values, np.float64)
    if data.ndim != 1 or len(data) != len(groups) or not len(data):
        raise ValueError(f"need one group per value and at least one, got {data.shape} values, {len(groups)} groups")
    numbers: dict[Hashable, int] = {}
    place = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    return np.bincount(place, weights=data), np.bincount(place).astype(np.float64)


def interval(
    values: ArrayLike, groups: Sequence[Hashable], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean, resampling whole clusters; NaN for a single cluster."""
    sums, sizes = cluster_sums(values, groups)
    if len(sums) == 1:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    a: ArrayLike, b: ArrayLike, groups: Sequence[Hashable], *, seed: int = 0
) -> tuple[float, tuple[float, float], float]:
    """Return the mean of `b` - `a`, its interval, and the two-sided p of no difference.

    The test flips the signs of whole clusters; with at most 12 clusters it enumerates all flips, so p is exact.
    """
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    sums, sizes = cluster_sums(difference, groups)
    observed = abs(sums.sum())
    if len(sums) <= 12:
        signs = 1 - 2 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        p = float(np.mean(np.abs(signs @ sums) >= observed - 1e-12))
    else:
        rng = np.random.default_rng(seed)
        signs = rng.choice((-1.0, 1.0), size=(DRAWS, len(sums)))
        p = float((1 + np.sum(np.abs(signs @ sums) >= observed - 1e-12)) / (DRAWS + 1))
    return float(sums.sum() / sizes.sum()), interval(difference, groups, seed=seed), p


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Return the exact two-sided p of McNemar's test on binary scores; 1 where no answer changed."""
    right_a, right_b = np.asarray(a, bool), np.asarray(b, bool)
    lost, won = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down correction for multiple comparisons."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted
