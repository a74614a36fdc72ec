"""Triton kernels for attention against the specification, which computes the whole matrix."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.interpreted import DEVICE, DTYPES, few, needs_triton
from vtc import kernels
from vtc.errors import ConfigError, InputError, KernelError
from vtc.kernels import VisibilityMask, attention, reference
from vtc.kernels.dispatch import NoKernelError

pytestmark = needs_triton


@dataclass
class Case:
    """Queries and keys of any shape, and the mask of their attention."""

    query: torch.Tensor
    key: torch.Tensor
    mask: VisibilityMask | torch.Tensor | None
    generator: torch.Generator

    def weights(self, sets: int, heads: int) -> torch.Tensor:
        shape = (len(self.query), heads, sets, self.query.shape[2])
        return torch.rand(shape, generator=self.generator).to(DEVICE)


def mask_of(
    kind: str, batch: int, queries: int, key_length: int, generator: torch.Generator
) -> VisibilityMask | torch.Tensor | None:
    """No mask, one per query or for all, or positions with padding, a window and blocks."""
    if kind == "all":
        return None
    if kind in ("mask", "padding"):
        shape = (batch, 1, queries if kind == "mask" else 1, key_length)
        return (torch.rand(shape, generator=generator) > 0.5).to(DEVICE)
    keys = torch.arange(key_length).expand(batch, -1).clone()
    keys[:, : int(torch.randint(0, key_length, (), generator=generator))] = -1
    positions = keys[:, -queries:] if queries <= key_length else torch.arange(queries).expand(batch, -1)
    blocks = torch.randint(-1, 2, (batch, queries), generator=generator).to(DEVICE) if queries <= key_length else None
    window = 3 if kind == "window" else None
    return VisibilityMask(positions.to(DEVICE), keys.to(DEVICE), window, blocks if kind == "blocks" else None)


@st.composite
def cases(draw: st.DrawFn, square: bool = False) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, key_heads, shared = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    width, key_length = draw(st.sampled_from([1, 8, 17, 40])), draw(st.integers(1, 70))
    queries = key_length if square else draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(DTYPES))
    # The memory layout of models: tokens before heads.
    query, key = (
        torch.randn(batch, n, h, width, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for n, h in ((queries, key_heads * shared), (key_length, key_heads))
    )
    query[:, :, 0] *= draw(st.sampled_from([0.0, 1.0, 30.0]))  # a zero vector, and one that is far from the others
    kind = draw(st.sampled_from(["all", "mask", "padding", "causal", "window", "blocks"]))
    return Case(query, key, mask_of(kind, batch, queries, key_length, generator), generator)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("choice", ["torch", "triton"])
@given(cases(), st.sampled_from(attention.REDUCTIONS))
@few
def test_rows(choice: str, case: Case, reduce: str) -> None:
    expected = reference.attention_rows(case.query, case.key, 0.3, case.mask, reduce=reduce)
    with kernels.use(choice):
        close(kernels.attention_rows(case.query, case.key, 0.3, case.mask, reduce=reduce), expected)


@pytest.mark.parametrize("choice", ["torch", "triton"])
@given(cases(), st.integers(1, 2), st.booleans())
@few
def test_column_sums(choice: str, case: Case, sets: int, per_head: bool) -> None:
    weights = case.weights(sets, case.query.shape[1] if per_head else 1)
    expected = reference.attention_column_sums(case.query, case.key, 0.3, weights, case.mask)
    with kernels.use(choice):
        close(kernels.attention_column_sums(case.query, case.key, 0.3, weights, case.mask), expected)


@pytest.mark.parametrize("choice", ["torch", "triton"])
@given(cases(square=True), st.sampled_from([0, 1, 3]), st.sampled_from([0.0, 0.2]))
@few
def test_pagerank(choice: str, case: Case, iterations: int, damping: float) -> None:
    exists = case.mask.query_positions >= 0 if isinstance(case.mask, VisibilityMask) else None
    walk = {"temperature": 0.5, "iterations": iterations, "damping": damping}
    expected = reference.pagerank(case.query, case.key, 0.3, case.mask, exists, **walk)
    with kernels.use(choice):
        close(kernels.pagerank(case.query, case.key, 0.3, case.mask, exists, **walk), expected)


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged(choice: str, dtype: torch.dtype) -> None:
    lengths = [3, 0, 65, 1]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, sum(lengths), 24, generator=generator).to(DEVICE, dtype) for heads in (2, 1))
    first = torch.randn(len(lengths), 2, 2, 24, generator=generator).to(DEVICE, dtype)
    weights = torch.rand(1, 1, 1, sum(lengths), generator=generator).to(DEVICE)
    with kernels.use(choice):
        for reduce in ("none", "max"):
            rows = kernels.attention_rows(first, key, 0.3, reduce=reduce, cu_seqlens=bounds)
            close(rows, reference.attention_rows(first, key, 0.3, reduce=reduce, cu_seqlens=bounds))
        sums = kernels.attention_column_sums(query, key, 0.3, weights, cu_seqlens=bounds)
        close(sums, reference.attention_column_sums(query, key, 0.3, weights, cu_seqlens=bounds))
        received = kernels.attention_received(query, key, 0.3, cu_seqlens=bounds)
    for start, stop in itertools.pairwise(bounds.tolist()):
        alone = reference.attention(query[:, :, start:stop], key[:, :, start:stop], 0.3).mean(dim=2)
        close(received[:, :, start:stop], alone if stop > start else received[:, :, :0])


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_layers_are_a_leading_axis(choice: str) -> None:
    query, key = torch.randn(3, 2, 4, 1, 8, device=DEVICE), torch.randn(3, 2, 2, 19, 8, device=DEVICE)
    with kernels.use(choice):
        rows = kernels.attention_rows(query, key, 0.4, reduce="rms")
    assert rows.shape == (3, 2, 1, 19)
    for layer in range(3):
        close(rows[layer], reference.attention_rows(query[layer], key[layer], 0.4, reduce="rms"))


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_empty_inputs(choice: str) -> None:
    query, key = torch.randn(2, 4, 3, 8, device=DEVICE), torch.randn(2, 2, 0, 8, device=DEVICE)
    with kernels.use(choice):
        assert kernels.attention_rows(query, key, 1.0).shape == (2, 4, 3, 0)
        assert kernels.attention_rows(query, key, 1.0, reduce="sum").shape == (2, 3, 0)
        sums = kernels.attention_column_sums(query, key, 1.0, torch.ones(2, 1, 1, 3, device=DEVICE))
        assert sums.shape == (2, 4, 1, 0)
        sums = kernels.attention_column_sums(query[:, :, :0], query, 1.0, torch.ones(2, 1, 1, 0, device=DEVICE))
    assert torch.equal(sums, torch.zeros(2, 4, 1, 3, device=DEVICE))


def test_context_relevance_runs_the_kernels() -> None:
    query, key = torch.randn(2, 4, 21, 8, device=DEVICE), 2 * torch.randn(2, 2, 21, 8, device=DEVICE)
    allowed = torch.ones(2, 1, 1, 21, dtype=torch.bool, device=DEVICE)
    allowed[1, ..., 15:] = False
    expected = kernels.context_relevance(query, key, 0.5, allowed, t=1.2, prefix=1)
    with kernels.use("triton"):
        close(kernels.context_relevance(query, key, 0.5, allowed, t=1.2, prefix=1), expected)


def test_unsupported_arguments_are_refused() -> None:
    wide = torch.randn(1, 1, 2, 300, device=DEVICE)
    with kernels.use("triton"), pytest.raises(KernelError, match="at most 256 wide, these are 300"):
        kernels.attention_rows(wide, wide, 1.0)
    assert kernels.attention_rows(wide, wide, 1.0).shape == (1, 1, 2, 2)
    with kernels.use("triton"), pytest.raises(KernelError, match="one dtype"):
        kernels.attention_rows(wide[..., :8], wide[..., :8].half(), 1.0)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_mismatched_shapes_are_refused(choice: str) -> None:
    x, three = torch.randn(2, 4, 5, 8, device=DEVICE), torch.randn(2, 3, 5, 8, device=DEVICE)
    bounds = torch.tensor([0, 5], device=DEVICE, dtype=torch.int32)
    with kernels.use(choice):
        with pytest.raises(ConfigError, match="none, mean, max, sum, rms; got 'median'"):
            kernels.attention_rows(x, x, 1.0, reduce="median")
        with pytest.raises(InputError, match="multiple of the keys'"):
            kernels.attention_rows(x, three, 1.0)
        with pytest.raises(InputError, match="same leading axes"):
            kernels.attention_rows(x, x[:1], 1.0)
        with pytest.raises(InputError, match="with cu_seqlens"):
            kernels.attention_rows(x, x, 1.0, cu_seqlens=bounds)
        with pytest.raises(InputError, match="weights"):
            kernels.attention_column_sums(x, x, 1.0, torch.ones(2, 1, 4, device=DEVICE))
        with pytest.raises(InputError, match="one row that attends to itself"):
            kernels.attention_column_sums(x, x, 1.0, torch.ones(2, 1, 1, 5, device=DEVICE), cu_seqlens=bounds)


class Launches:
    """Stands for a kernel and keeps the grids that it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def test_grids_that_cuda_refuses_are_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.kernels import triton_attention, triton_pack  # only where Triton is installed

    many = 70_000  # the second and the third hold 65535 programs
    launches = Launches()
    monkeypatch.setattr(triton_pack, "_gather", launches)
    one = torch.zeros(1, 1, many, 2)
    windows = torch.arange(many + 1)
    for compute in (
        lambda: triton_attention.attention_column_sums(one, one, 1.0, one[..., 0][:, :, None], cu_seqlens=windows),
        lambda: triton_attention.attention_rows(one.view(many, 1, 1, 2), one, 1.0, cu_seqlens=windows),
        lambda: triton_attention.attention_rows(one, one[:, :, :1], 1.0),
    ):
        with pytest.raises(NoKernelError, match="at most 65535"):
            compute()
    triton_pack.gather_planes(torch.zeros(1, many, dtype=torch.long), [torch.zeros(1, many)], [1])
    assert launches.grids == [(many, 1)]
