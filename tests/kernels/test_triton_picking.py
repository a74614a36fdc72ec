"""The kernels that pick, merge and pack against the definitions: in the interpreter on a CPU, as compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import near_ties
from tests.kernels.interpreted import DEVICE, DTYPES, few, needs_triton
from tests.kernels.test_packing import batches
from vtc import kernels
from vtc.kernels import reference

pytestmark = needs_triton


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Few rows, or two blocks of them; some are zero, some duplicates."""
    n, width = draw(st.sampled_from([1, 2, 7, 21])), draw(st.sampled_from([1, 5, 33]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(n, width, generator=generator)[torch.randint(n, (n,), generator=generator)]
    x[torch.rand(n, generator=generator) < 0.1] = 0
    return x.to(draw(st.sampled_from(DTYPES)))


@few
@given(rows(), st.sampled_from([0, 1, 3, 30]))
def test_picks(x: torch.Tensor, k: int) -> None:
    first, weight = len(x) // 2, torch.linspace(1, 0.2, len(x))
    k = min(k, 4) if len(x) > 7 else k
    places = torch.linspace(-1, 2, 3 * len(x)).view(-1, 3)
    there = x.to(DEVICE)
    with kernels.use("triton"):
        farthest, from_first = kernels.farthest_point(there, k), kernels.farthest_point(there, k, first)
        distant = kernels.max_sum(there, k, first)
        relevant = kernels.relevant_farthest_point(there, k, weight.to(DEVICE))
        spanning = kernels.dpp_greedy(there, k, weight.to(DEVICE))
        apart = kernels.dpp_greedy(there, k, weight.to(DEVICE), places.to(DEVICE), 1e-3)
    near_ties.assert_greedy(farthest.cpu(), x, k, near_ties.isolation(None))
    near_ties.assert_greedy(from_first.cpu(), x, k, near_ties.isolation(first))
    near_ties.assert_greedy(distant.cpu(), x, k, near_ties.distance_to_all(first), 2e-6 * len(x))
    near_ties.assert_greedy(relevant.cpu(), x, k, near_ties.relevance(weight))
    near_ties.assert_greedy(spanning.cpu(), x, k, near_ties.volume(weight), 4e-5)
    near_ties.assert_greedy(apart.cpu(), x, k, near_ties.volume(weight, places, 1e-3), 4e-5)


@needs_triton
def test_ties_and_exhausted_ranks() -> None:
    axes = torch.eye(6, device=DEVICE)[[0, 1, 0, 2, 1, 2]]
    plane = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]], device=DEVICE)
    relevance = torch.tensor([1.0, 0.3, 0.9, 0.5, 0.6], device=DEVICE)
    with kernels.use("triton"):
        assert kernels.farthest_point(axes, 6).tolist() == [0, 1, 3, 2, 4, 5]
        assert kernels.max_sum(axes, 6, 2).tolist() == [2, 1, 3, 0, 4, 5]
        assert kernels.dpp_greedy(axes, 6).tolist() == [0, 1, 3, 2, 4, 5]
        assert kernels.relevant_farthest_point(axes, 6, torch.zeros(6, device=DEVICE)).tolist() == [0, 1, 3, 2, 4, 5]
        assert kernels.dpp_greedy(plane, 5, relevance).tolist() == [0, 2, 4, 3, 1]


@few
@given(
    st.integers(0, 9), st.integers(0, 4), st.sampled_from([(), (1,), (3, 11)]), st.sampled_from(DTYPES), st.booleans()
)
def test_segment_merge(n: int, count: int, shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)).to(dtype)
    slot = torch.arange(n) * 7 % (count + 1) - 1
    weight = torch.linspace(0.1, 1, n) if weighted else None
    with kernels.use("triton"):
        there = None if weight is None else weight.to(DEVICE)
        merged = kernels.segment_merge(x.to(DEVICE), slot.to(DEVICE), count, there).cpu()
    assert merged.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    expected = reference.segment_merge(x, slot, count, weight)
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("order", ["original", "author"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bipartite_merge(dtype: torch.dtype, order: str, first: int) -> None:
    metric = torch.randn(2, 15, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    metric[0, 4] = 0
    with kernels.use("triton"):
        anchors, assign = kernels.bipartite_merge(metric.to(DEVICE), 5, order, first)
    expected = reference.bipartite_merge(metric, 5, order, first)
    assert torch.equal(anchors.cpu(), expected[0])
    assert torch.equal(assign.cpu(), expected[1])


def moved(value: Any) -> Any:
    if isinstance(value, list):
        return [moved(item) for item in value]
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@few
@given(batches())
def test_packing(batch: dict[str, Any]) -> None:
    with kernels.use("triton"):
        packed = kernels.select_gather(**{name: moved(value) for name, value in batch.items()})
    index, mask, lengths, planes, marked = reference.select_gather(**batch)
    assert torch.equal(packed.index.cpu(), index)
    assert torch.equal(packed.mask.cpu(), mask)
    assert torch.equal(packed.lengths.cpu(), lengths)
    for mine, theirs in zip([*packed.planes, *packed.marked], [*planes, *marked], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_of_many(dtype: torch.dtype) -> None:
    """Over two blocks, with ties, both zeros, infinities and NaN."""
    values = torch.randint(-9, 9, (1500,), generator=torch.Generator().manual_seed(2)) / 4
    values[::97], values[5::89], values[7::101], values[9::83] = torch.inf, -torch.inf, torch.nan, -0.0
    scores = values.to(dtype)
    for k in (0, 1, 40, 700, 1490, 2000):
        with kernels.use("triton"):
            best = kernels.topk_indices(scores.to(DEVICE), k).cpu()
        assert torch.equal(best, reference.topk_indices(scores, k)), k
