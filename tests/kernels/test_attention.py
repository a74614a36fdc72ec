"""Rows and sums of attention against the whole matrix."""

import pytest
import torch

from vtc.kernels import attention, attention_received, attention_rows, reference


def heads(batch: int, count: int, length: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, count, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_rows_equal_those_of_the_matrix(key_heads: int) -> None:
    query, key = heads(2, 6, 17, 8), heads(2, key_heads, 17, 8, seed=1)
    allowed = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(2)) > 0.3
    allowed |= torch.eye(17, dtype=torch.bool)
    expected = reference.attention(query, key, 0.3, allowed)
    torch.testing.assert_close(attention_rows(query[:, :, 4:7], key, 0.3, allowed[:, :, 4:7]), expected[:, :, 4:7])
    torch.testing.assert_close(attention_rows(query, key, 0.3), reference.attention(query, key, 0.3))


def test_a_query_without_any_key_gets_zeros() -> None:
    rows = attention_rows(heads(1, 2, 1, 4), heads(1, 2, 5, 4, seed=1), 0.5, torch.zeros(1, 1, 1, 5, dtype=torch.bool))
    assert torch.equal(rows, torch.zeros(1, 2, 1, 5))


@pytest.mark.parametrize("tile", [4, 5000, 2**20])
@pytest.mark.parametrize("length", [1, 64, 65, 300])
def test_received_is_the_mean_over_queries(monkeypatch: pytest.MonkeyPatch, length: int, tile: int) -> None:
    monkeypatch.setitem(attention._TILE, "cpu", tile)
    query, key = heads(2, 4, length, 8), heads(2, 2, length, 8, seed=1)
    received = attention_received(query, key, 0.4)
    torch.testing.assert_close(received, reference.attention(query, key, 0.4).mean(dim=2))
    torch.testing.assert_close(received.sum(dim=-1), torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    query = torch.full((1, 1, 3, 64), 40.0, dtype=dtype)  # products of 102 400, beyond what float16 holds
    assert torch.isfinite(attention_rows(query, query, 0.125)).all()
    torch.testing.assert_close(attention_received(query, query, 0.125), torch.full((1, 1, 3), 1 / 3))


@pytest.mark.parametrize("per_query", [False, True])
def test_received_leaves_padding_out(monkeypatch: pytest.MonkeyPatch, per_query: bool) -> None:
    monkeypatch.setitem(attention._TILE, "cpu", 4 * 4 * 9)
    query, key = heads(2, 2, 9, 8), heads(2, 2, 9, 8, seed=1)
    real = [9, 6]
    allowed = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    for row, count in enumerate(real):
        allowed[row, ..., :count] = True
    if per_query:
        allowed = allowed.expand(2, 1, 9, 9)
    received = attention_received(query, key, 0.4, allowed)
    for row, count in enumerate(real):
        expected = reference.attention(query[row : row + 1, :, :count], key[row : row + 1, :, :count], 0.4).mean(dim=2)
        torch.testing.assert_close(received[row : row + 1, :, :count], expected)
        assert (received[row, :, count:] == 0).all()
