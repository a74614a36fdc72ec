"""Clustering within groups against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc import kernels
from vtc.bench.memory import peak_bytes
from vtc.errors import ConfigError
from vtc.kernels import cluster, reference

quick = settings(max_examples=60, deadline=None)


def grouped(n: int, groups: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(-1, groups, (n,), generator=generator)
    return torch.randn(n, 5, generator=generator), group


@quick
@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 16, 2**22]), st.integers(0, 99))
def test_density_peaks(n: int, groups: int, neighbours: int, elements: int, seed: int) -> None:
    x, group = grouped(n, groups, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_ELEMENTS", elements)
        scores = kernels.density_peaks(x, group, neighbours)
    # Two tokens that are each other's neighbours tie where there are no others, in blocks of rows up to rounding.
    if neighbours > 2 or elements > 16 or n == 0:
        torch.testing.assert_close(scores, reference.density_peaks(x, group, neighbours), rtol=1e-4, atol=1e-4)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("n", [19, 50])
def test_density_peaks_of_mutual_neighbours(n: int) -> None:
    """Of two that are nearest to each other the first is denser; a row of products may round unlike its column."""
    for seed in range(20):
        x, _ = grouped(n, 1, seed)
        x, together = x.repeat(1, 2)[:, :7], torch.zeros(n, dtype=torch.long)
        scores = kernels.density_peaks(x, together, 2)
        torch.testing.assert_close(scores, reference.density_peaks(x, together, 2), rtol=1e-4, atol=1e-4)


def test_density_peaks_of_equal_tokens() -> None:
    """The first of equals is denser; far from the mean, too, where products lose digits."""
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 2.0], [1.0, 2.0]]) + 1000
    scores = kernels.density_peaks(x, torch.zeros(4, dtype=torch.long), 2)
    assert scores[1] == scores[3] == -torch.inf
    assert scores[0] > scores[2] > -torch.inf
    assert bool((kernels.density_peaks(torch.ones(3, 2), torch.tensor([0, 0, 1]), 4) == -torch.inf).all())


@quick
@given(st.integers(0, 40), st.integers(1, 6), st.sampled_from([1, 16, 2**22]), st.integers(0, 99))
def test_density_clusters(n: int, groups: int, elements: int, seed: int) -> None:
    x, group = grouped(n, groups, seed)
    size = torch.bincount(group + 1, minlength=groups + 1)[1:]
    counts = (size * torch.rand(groups, generator=torch.Generator().manual_seed(seed)) + 0.5).long()
    expected = reference.density_clusters(x, group, counts, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_ELEMENTS", elements)
        assert torch.equal(kernels.density_clusters(x, group, counts, 4), expected)
        # What a GPU does: groups are as long as they can be, and what is there is masked.
        patch.setattr(cluster, "queues", lambda _: True)
        most = [int(count) + seed % 3 for count in size]
        assert torch.equal(kernels.density_clusters(x, group, counts, 4, most), expected)


def test_equal_tokens_join_the_first_centre() -> None:
    x = torch.tensor([[1.0], [1.0], [3.0], [1.0]])
    group = torch.tensor([0, 0, 0, -1])
    assert kernels.density_clusters(x, group, torch.tensor([1]), 2).tolist() == [0, 0, 0, -1]
    assert kernels.density_clusters(x, group, torch.tensor([2]), 2).tolist() == [0, 0, 2, -1]
    assert kernels.density_clusters(x, group, torch.tensor([3]), 2).tolist() == [0, 1, 2, -1]
    assert kernels.density_clusters(x, group, torch.tensor([0]), 2).tolist() == [-1] * 4


def test_density_peaks_of_many_tokens_need_no_matrix() -> None:
    x, group = torch.randn(6000, 4), torch.zeros(6000, dtype=torch.long)
    assert peak_bytes(lambda: kernels.density_peaks(x, group, 5)) < 4 * 6000**2


@quick
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 12), st.sampled_from([1, 7, 512]), st.integers(0, 99))
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest_in_group(metric: str, n: int, groups: int, targets: int, block: int, seed: int) -> None:
    x, group = grouped(n, groups, seed)
    named = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:targets]
    named = named[group[named] >= 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_BLOCK", block)  # which may also be smaller than the least block
        found = kernels.nearest_in_group(x, group, named, metric)
    assert torch.equal(found, reference.nearest_in_group(x, group, named, metric))


def test_nearest_in_group_ties_and_metrics() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [4.0, 3.0], [0.0, 0.0]])
    group = torch.tensor([0, 0, 0, 1])
    assert kernels.nearest_in_group(x, group, torch.tensor([1, 0])).tolist() == [0, 0, 0, -1]
    assert kernels.nearest_in_group(x, group, torch.tensor([2, 0]), "euclidean").tolist() == [1, 1, 0, -1]
    nobody = torch.full((4,), -1)
    assert kernels.nearest_in_group(x, nobody, torch.tensor([1])).tolist() == [-1] * 4
    assert bool((kernels.density_peaks(x, nobody, 3) == -torch.inf).all())
    with pytest.raises(ConfigError, match="metric is one of"):
        kernels.nearest_in_group(x, group, group, "manhattan")
