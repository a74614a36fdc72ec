"""Scores computed from attention tile by tile against the specification, which computes the whole matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.test_attention import heads
from vtc.kernels import (
    VisibilityMask,
    attention,
    attention_column_sums,
    context_relevance,
    pagerank,
    received_from,
    reference,
)

TILES = (4, 1000, 2**20)  # bytes: a row at a time, some rows, several heads


def packed(lengths: tuple[int, ...], width: int) -> torch.Tensor:
    """Columns (B, width) of rows of these lengths, padded on the left."""
    columns = torch.arange(width).expand(len(lengths), -1).clone()
    for row, length in enumerate(lengths):
        columns[row, : width - length] = -1
    return columns


def causal(columns: torch.Tensor) -> torch.Tensor:
    """(B, 1, L, L) bool."""
    n = columns.shape[1]
    real = columns >= 0
    return torch.ones(n, n, dtype=torch.bool).tril() & (real[:, None, :] & real[:, :, None])[:, None]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_push_is_a_product_with_the_matrix(monkeypatch: pytest.MonkeyPatch, tile: int, key_heads: int) -> None:
    monkeypatch.setitem(attention._TILE, "cpu", tile)
    query, key = heads(2, 4, 13, 8), heads(2, key_heads, 13, 8, seed=1)
    columns = packed((13, 9), 13)
    weights = torch.rand(2, 4, 3, 13, generator=torch.Generator().manual_seed(2))
    weights *= (columns >= 0)[:, None, None]
    matrix = reference.attention(query, key, 0.3, causal(columns))
    sums = attention_column_sums(query, key, 0.3, weights, VisibilityMask(columns, columns))
    torch.testing.assert_close(sums, weights @ matrix)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("iterations", "damping", "temperature"), [(5, 0.0, 0.1), (0, 0.0, 0.1), (2, 0.15, 0.5)])
def test_pagerank(
    monkeypatch: pytest.MonkeyPatch, tile: int, iterations: int, damping: float, temperature: float
) -> None:
    monkeypatch.setitem(attention._TILE, "cpu", tile)
    query, key = heads(2, 4, 13, 8), heads(2, 2, 13, 8, seed=1)
    columns = packed((13, 9), 13)
    logits = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)) * 0.3
    logits = logits.masked_fill(~causal(columns), torch.finfo(torch.float32).min)
    walk = {"temperature": temperature, "iterations": iterations, "damping": damping}
    expected = reference.pagerank_of_logits(logits, **walk)
    streamed = pagerank(query, key, 0.3, VisibilityMask(columns, columns), columns >= 0, **walk)
    torch.testing.assert_close(streamed, expected)
    alone = pagerank(
        query[1:, :, 4:],
        key[1:, :, 4:],
        0.3,
        VisibilityMask(columns[1:, 4:], columns[1:, 4:]),
        columns[1:, 4:] >= 0,
        **walk,
    )
    torch.testing.assert_close(streamed[1:, 4:], alone)
    assert not bool(streamed[1, :4].any()), "padding has no importance"


@pytest.mark.parametrize("key_length", [13, 20])
def test_received_from_groups(key_length: int) -> None:
    # Five keys of an earlier turn, eight current tokens and, in a static cache, seven unused slots.
    query, key = heads(2, 4, 8, 8), heads(2, 2, 13, 8, seed=1)
    keys = packed((13, 9), 13)
    mask = VisibilityMask(keys[:, 5:], keys)
    groups = torch.rand(2, 2, 8, generator=torch.Generator().manual_seed(3)) > 0.5
    groups[1, 0] = False
    cache = torch.full((2, 2, key_length, 8), 50.0)
    cache[:, :, :13] = key
    received = received_from(query, cache, 0.3, mask, groups, known=13)
    matrix = reference.attention(query, key, 0.3, causal(keys)[:, :, 5:]).mean(1)
    for row in range(2):
        for group in range(2):
            members = groups[row, group]
            expected = matrix[row, members].mean(0) if bool(members.any()) else torch.zeros(13)
            torch.testing.assert_close(received[row, group], expected[5:])


def test_visibility_mask_has_windows_and_blocks() -> None:
    columns = torch.arange(6)[None]
    rows = partial(VisibilityMask(columns, columns, window=2), slice(0, 6))
    assert torch.equal(rows(6)[0, 0], torch.ones(6, 6).tril().triu(-1).bool())
    block = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    allowed = VisibilityMask(columns, columns, window=2, blocks=block)(slice(0, 6), 6)[0, 0]
    assert bool(allowed[1:4, 1:4].all())
    assert allowed.sum() == torch.ones(6, 6).tril().triu(-1).sum() + 4
    # A sliding-window cache no longer holds the first two keys, a static one has two unused slots.
    assert torch.equal(VisibilityMask(columns, columns)(slice(2, 4), 4)[0, 0], torch.ones(6, 6).tril().bool()[2:4, 2:])
    assert not bool(VisibilityMask(columns, columns)(slice(0, 6), 8)[0, 0, :, 6:].any())


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("t", [0.0, 1.0, 1.4, 1e6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_context_relevance(prefix: int, t: float, reduction: str) -> None:
    query, key = heads(2, 4, 17, 8), 2 * heads(2, 2, 17, 8, seed=1)
    matrix = reference.attention(query, key, 0.5).mean(1)[:, prefix:, prefix:]
    expected = reference.context_relevance_of(matrix, t, reduction)
    streamed = context_relevance(query, key, 0.5, t=t, reduction=reduction, prefix=prefix)
    assert streamed.shape == (2, 17)
    torch.testing.assert_close(streamed[:, prefix:], expected)
    assert not bool(streamed[:, :prefix].any())


@pytest.mark.parametrize("t", [0.5, 1.2, 1e6])
@pytest.mark.parametrize("per_query", [False, True])
def test_context_relevance_leaves_padding_out(t: float, per_query: bool) -> None:
    query, key = heads(2, 4, 17, 8), 2 * heads(2, 2, 17, 8, seed=1)
    allowed = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    allowed[1, ..., 11:] = False
    if per_query:
        allowed = allowed.expand(-1, -1, 17, -1)
    streamed = context_relevance(query, key, 0.5, allowed, t=t)
    alone = context_relevance(query[1:, :, :11], key[1:, :, :11], 0.5, t=t)
    torch.testing.assert_close(streamed[1:, :11], alone)
    assert not bool(streamed[1, 11:].any())
    torch.testing.assert_close(streamed[:1], context_relevance(query[:1], key[:1], 0.5, t=t))


def test_reading_never_makes_a_square() -> None:
    from tests.invariants.test_7_memory import N, SquareWatch

    query, key = heads(1, 4, N + 40, 8), heads(1, 1, N + 40, 8, seed=1)
    columns = torch.arange(N + 40)[None]
    mask, real = VisibilityMask(columns, columns), columns >= 0
    with SquareWatch() as watch:
        pagerank(query, key, 0.3, mask, real)
        received_from(query, key, 0.3, mask, torch.stack([real, real], dim=1))
        context_relevance(query, key.expand(-1, 4, -1, -1), 0.3, t=0.0)
    assert watch.found == []
