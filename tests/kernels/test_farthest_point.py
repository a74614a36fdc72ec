"""The two ways of picking farthest points agree."""

import pytest
import torch

from vtc.kernels import farthest_point, pick


@pytest.mark.parametrize("first", [None, 7])
@pytest.mark.parametrize(("n", "width", "k"), [(5, 3, 5), (100, 16, 25), (700, 32, 64)])
def test_table_and_stream_pick_the_same(
    monkeypatch: pytest.MonkeyPatch, n: int, width: int, k: int, first: int | None
) -> None:
    x = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    first = None if first is None else first % n
    table = farthest_point(x, k, first)
    monkeypatch.setattr(pick, "_WORKSPACE", 0)
    assert torch.equal(farthest_point(x, k, first), table)
    assert len(table.unique()) == k


def test_zero_rows_and_duplicates_are_picked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    for workspace in (0, pick._WORKSPACE):
        monkeypatch.setattr(pick, "_WORKSPACE", workspace)
        assert sorted(farthest_point(x, 5).tolist()) == [0, 1, 2, 3, 4]
