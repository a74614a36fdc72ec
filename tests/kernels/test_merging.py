"""Merging against its definition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.near_ties import cosines
from vtc import kernels
from vtc.kernels import merge, reference

quick = settings(max_examples=60, deadline=None)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@quick
@given(
    st.integers(0, 30), st.integers(0, 8), st.sampled_from([(), (1,), (7,), (2, 3)]), st.booleans(), st.integers(0, 99)
)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_slots_hold_weighted_sums(
    dtype: torch.dtype, n: int, count: int, shape: tuple[int, ...], weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator).to(dtype)
    slot = torch.randint(-1, count, (n,), generator=generator) if count else torch.full((n,), -1)
    weight = torch.rand(n, generator=generator) if weighted else None
    merged = kernels.segment_merge(x, slot, count, weight)
    assert merged.shape == (count, *shape)
    assert merged.dtype == dtype
    expected = reference.segment_merge(x, slot, count, weight)
    torch.testing.assert_close(merged, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rows_are_added_in_their_order() -> None:
    """So that the rounding is the same each time and everywhere: 2^24 + 1 + 1 is 2^24 in float32, 1 + 1 + 2^24 not."""
    x = torch.tensor([[2.0**24], [1.0], [1.0], [1.0], [1.0], [2.0**24]])
    merged = kernels.segment_merge(x, torch.tensor([1, 1, 0, 1, 0, 0]), 2)
    assert merged.tolist() == [[2.0**24 + 2], [2.0**24]]


def test_gradients_of_a_merge() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.5, 0.25, 2.0, 3.0], dtype=torch.float64)
    slot = torch.tensor([1, 0, -1, 1, 0])
    assert torch.autograd.gradcheck(lambda rows: kernels.segment_merge(rows, slot, 2, weight), (x,))


@quick
@given(st.integers(0, 25), st.integers(1, 9), st.integers(-1, 14), st.booleans(), st.integers(0, 99))
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("order", ["original", "author"])
def test_bipartite_merge(order: str, first: int, n: int, width: int, r: int, exact: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, n, width, generator=generator)
    if exact:  # cosines of -1, 0 and 1 alone: nothing but ties
        metric = torch.eye(width)[torch.randint(width, (2, n), generator=generator)]
        metric *= torch.randint(-1, 2, (2, n, 1), generator=generator)
    anchors, assign = kernels.bipartite_merge(metric, r, order, first)
    expected = reference.bipartite_merge(metric, r, order, first)
    if torch.equal(anchors, expected[0]) and torch.equal(assign, expected[1]):
        return
    assert not exact
    for row in range(2):  # to rounding the same similarity was merged
        similarity = cosines(metric[row])
        mine, theirs = (
            similarity[torch.arange(n), into[0][row][into[1][row]]].sum() for into in ((anchors, assign), expected)
        )
        assert abs(mine - theirs) < 1e-5 * n


def test_sources_without_direction_merge_last() -> None:
    metric = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    anchors, assign = kernels.bipartite_merge(metric, 1)
    assert anchors.tolist() == [[0, 1, 3]]
    assert assign.tolist() == [[0, 1, 1, 2]]


@quick
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 9), st.booleans(), st.booleans(), st.integers(0, 99))
def test_nearest_slots(n: int, k: int, targets: int, exact: bool, queued: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(n, 5, generator=generator)
    if exact:
        metric = torch.eye(5)[torch.randint(5, (n,), generator=generator)]
        metric[0] = 0
    keep = torch.randperm(n, generator=generator)[:k].sort().values
    into = keep[torch.randperm(len(keep), generator=generator)[:targets]]
    for named in (None, into):
        with mock.patch.object(merge, "queues", return_value=queued):  # as on a GPU
            found = kernels.nearest_slots(metric, keep, named)
        assert torch.equal(found, reference.nearest_slots(metric, keep, named))
