"""The formulas of what kernels load, store and multiply, against the interpreter's count of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.interpreted import DEVICE, needs_triton
from vtc import kernels
from vtc.kernels import VisibilityMask

pytestmark = [needs_triton, pytest.mark.skipif(DEVICE != "cpu", reason="counted in the interpreter")]


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Bytes loaded and stored by lanes that are not masked off, operations of products."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = {"loaded": 0, "stored": 0, "products": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot = InterpreterBuilder.create_dot

    def size(pointers: Any) -> int:
        return max(8, pointers.get_element_ty().primitive_bitwidth) // 8

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        counted["loaded"] += int(np.count_nonzero(mask.data)) * size(pointers)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted["stored"] += int(np.count_nonzero(mask.data)) * size(pointers)
        return store(self, pointers, value, mask, *rest)

    def counting_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counted["products"] += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        patch.setattr(InterpreterBuilder, "create_dot", counting_dot)
        yield counted


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def causal(n: int, window: int | None = None) -> VisibilityMask:
    places = torch.arange(n).expand(2, n)
    return VisibilityMask(places, places, window, torch.full((2, n), -1))


def _select_gather(side: str) -> Any:
    keep = torch.zeros(2, 40, dtype=torch.bool)
    keep[:, 30:] = True
    columns = torch.cat([torch.arange(30), 40 + torch.arange(30)])
    return kernels.select_gather(
        keep,
        (draw(2, 40, 24, dtype=torch.float16), torch.arange(240).view(3, 2, 40), keep),
        (1, 2, 1),
        scores=draw(60),
        columns=columns,
        offsets=torch.tensor([0, 30, 60]),
        counts=torch.tensor([7, 12]),
        marks=~keep,
        marked=(draw(60, 20),),
        side=side,
    )


CASES: dict[str, Callable[[], Any]] = {
    "rows, several heads": lambda: kernels.attention_rows(draw(3, 1, 4, 1, 20), draw(3, 1, 2, 100, 20), 0.3),
    "rows, reduced": lambda: kernels.attention_rows(
        draw(2, 4, 19, 16, dtype=torch.float16), draw(2, 1, 70, 16, dtype=torch.float16), 0.3, reduce="mean"
    ),
    "rows, seen": lambda: kernels.attention_rows(draw(2, 4, 70, 16), draw(2, 2, 70, 16), 0.3, causal(70)),
    "received": lambda: kernels.attention_received(draw(1, 2, 75, 24), draw(1, 2, 75, 24), 0.3),
    "received, masked": lambda: kernels.attention_received(
        draw(2, 2, 40, 16), draw(2, 1, 40, 16), 0.3, torch.ones(2, 1, 1, 40, dtype=torch.bool)
    ),
    "pagerank": lambda: kernels.pagerank(draw(2, 4, 70, 16), draw(2, 2, 70, 16), 0.3, causal(70, 9), iterations=2),
    "farthest point": lambda: kernels.farthest_point(draw(70, 40), 3),
    "max sum": lambda: kernels.max_sum(draw(70, 40, dtype=torch.float16), 3, 0),
    "dpp": lambda: kernels.dpp_greedy(draw(70, 40), 3, draw(70).sigmoid()),
    "segment merge": lambda: kernels.segment_merge(draw(70, 40), torch.arange(70) % 9, 9, draw(70)),
    "top k": lambda: kernels.topk_indices(draw(1100), 30),
    "select and gather": lambda: _select_gather("left"),
    "to the right": lambda: _select_gather("right"),
    "entropy": lambda: kernels.patch_entropy(draw(5, 3, 49).sigmoid()),
    "entropy, normalised": lambda: kernels.patch_entropy(
        draw(1, 3, 15, 22), torch.full((3,), 0.5), torch.full((3,), 0.3), size=(7, 7)
    ),
    "temporal similarity": lambda: kernels.temporal_similarity(draw(70, 40), torch.arange(70) - 20),
    "bipartite merge": lambda: kernels.bipartite_merge(draw(2, 139, 40), 30),
}


@pytest.mark.parametrize("case", CASES)
def test_formulas_are_what_the_kernels_do(case: str) -> None:
    from vtc.bench._traffic import Traffic, record

    with kernels.use("triton"), counting() as counted:
        CASES[case]()
    with record() as launches:
        CASES[case]()
    found = sum((launch.traffic for launch in launches), Traffic())
    assert counted == {"loaded": found.loaded, "stored": found.stored, "products": found.products}
    assert counted["loaded"] > 0


def test_every_kernel_has_a_formula() -> None:
    from vtc.bench._traffic import FORMULAS
    from vtc.kernels import aot

    assert {spec.kernel.__name__ for spec in aot.kernels()} == set(FORMULAS)


def test_recording_leaves_the_kernels_where_they_were() -> None:
    from vtc.bench._traffic import record
    from vtc.kernels import aot

    before = [spec.kernel for spec in aot.kernels()]
    query = draw(1, 2, 8, 16)
    with record() as launches:
        kernels.attention_received(query, query, 0.3)
    assert [launch.kernel for launch in launches] == ["_row_logsumexp", "_column_sums"]
    assert [spec.kernel for spec in aot.kernels()] == before
    torch.testing.assert_close(kernels.attention_received(query, query, 0.3).sum(-1), torch.ones(1, 2))
