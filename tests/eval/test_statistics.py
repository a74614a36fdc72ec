"""Intervals and tests for clustered scores, against values worked out by hand and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import stats

from eval import statistics


def test_sums_are_per_cluster() -> None:
    sums, sizes = statistics.cluster_sums([1, 0, 1, 1], ["a", "b", "a", "c"])
    assert sums.tolist() == [2, 0, 1]
    assert sizes.tolist() == [2, 1, 1]


@pytest.mark.parametrize(("values", "groups"), [([], []), ([1.0], []), ([[1.0]], ["a"])])
def test_values_without_groups_are_refused(values: list[float], groups: list[str]) -> None:
    with pytest.raises(ValueError, match="one group per value"):
        statistics.cluster_sums(values, groups)


def test_independent_samples_give_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(400) < 0.7
    low, high = statistics.interval(values, range(400))
    mean, error = values.mean(), values.std() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.006)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.006)


def test_copies_of_a_sample_add_nothing() -> None:
    rng = np.random.default_rng(1)
    values = (rng.random(60) < 0.5).astype(float)
    once = statistics.interval(values, range(60))
    ten_times = statistics.interval(np.repeat(values, 10), np.repeat(np.arange(60), 10).tolist())
    assert ten_times == pytest.approx(once)


def test_the_interval_covers_as_often_as_it_says() -> None:
    # 60 clusters of 5 that share most of their fate; an interval blind to clusters would cover about 60 % here.
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(150):
        fate = rng.random(60) < 0.6
        same = rng.random((60, 5)) < 0.9
        values = np.where(same, fate[:, None], rng.random((60, 5)) < 0.6).astype(float)
        low, high = statistics.interval(values.ravel(), np.repeat(np.arange(60), 5).tolist())
        hits += low <= 0.6 <= high
    assert 0.89 <= hits / 150 <= 0.99


def test_one_cluster_has_no_interval() -> None:
    assert all(math.isnan(bound) for bound in statistics.interval([1.0, 0.0], ["a", "a"]))


def test_paired_differences_by_hand() -> None:
    # Differences of the clusters: a +2, b 0, c -1. Of the 8 ways to flip signs, 6 are at least as far from 0 as |2-1|.
    difference, _, p = statistics.paired([0, 0, 1, 1], [1, 1, 1, 0], ["a", "a", "b", "c"])
    assert difference == pytest.approx(0.25)
    assert p == 1.0  # |+-2 +-1| is never below 1
    _, _, p = statistics.paired([0.0] * 6, [1.0] * 6, range(6))
    assert p == pytest.approx(2 / 64)


def test_paired_agrees_with_the_t_test() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=80)
    b = a + 0.25 + rng.normal(size=80)
    _, _, p = statistics.paired(a, b, range(80))
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.01)


def test_mcnemar_is_the_sign_test() -> None:
    a = [1, 1, 1, 1, 1, 0, 0]
    b = [0, 0, 0, 0, 0, 1, 0]
    assert statistics.mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 64)
    assert statistics.mcnemar(a, a) == 1.0
