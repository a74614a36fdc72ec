"""Selection and packing against the definition, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtc import kernels
from vtc.errors import InputError
from vtc.kernels import reference

quick = settings(max_examples=60, deadline=None)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Text and a few pictures per row, some of them empty; scores full of ties."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 4, (rows, length), generator=generator)  # 0: text, 1 and 2: pictures, 3: padding
    columns, sizes = [], []
    for row in range(rows):
        for picture in (1, 2):
            here = (kind[row] == picture).nonzero()[:, 0]
            columns.append(row * length + here)
            sizes.append(len(here))
    places = torch.cat(columns)
    scores = torch.randint(-2, 3, (len(places),), generator=generator).float()
    scores[torch.rand(len(places), generator=generator) < 0.1] = -torch.inf
    given: dict[str, Any] = {
        "scores": scores.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))),
        "columns": places,
        "offsets": torch.tensor([0, *sizes]).cumsum(0),
        "side": draw(st.sampled_from(["left", "right"])),
    }
    if draw(st.booleans()):
        given["threshold"] = float(draw(st.integers(-3, 3)))
    else:
        given["counts"] = torch.randint(0, 7, (len(sizes),), generator=generator)
    marks = (kind == 1) | (kind == 2)
    planes = [
        torch.randn(rows, length, 5, generator=generator).to(draw(st.sampled_from([torch.float32, torch.bfloat16]))),
        torch.randint(0, 99, (draw(st.sampled_from([3, 4])), rows, length), generator=generator),
        torch.randint(0, 99, (3, 1, length), generator=generator),
        torch.arange(length)[None],
        marks,
    ]
    marked = [torch.randn(int(marks.sum()), 3, generator=generator) for _ in range(2)]
    return {"keep": kind == 0, "planes": planes, "axes": [1, 2, 2, 1, 1], "marks": marks, "marked": marked, **given}


def check(batch: dict[str, Any]) -> None:
    packed = kernels.select_gather(**batch)
    index, mask, lengths, planes, marked = reference.select_gather(**batch)
    assert torch.equal(packed.index, index)
    assert torch.equal(packed.mask, mask)
    assert torch.equal(packed.lengths, lengths)
    for mine, theirs in zip([*packed.planes, *packed.marked], [*planes, *marked], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(kernels.gather_planes(index, batch["planes"], batch["axes"]), planes, strict=True):
        assert torch.equal(mine, theirs)


@quick
@given(batches())
def test_a_packed_batch_is_its_definition(batch: dict[str, Any]) -> None:
    check(batch)


@quick
@given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.5, float("nan"), float("inf"), -float("inf")]), max_size=20))
def test_the_best_are_the_front_of_the_stable_order(values: list[float]) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scores = torch.tensor(values).to(dtype)
        for k in (0, 1, len(values) // 2, len(values), len(values) + 3):
            best = kernels.topk_indices(scores, k)
            assert best.dtype == torch.long
            assert best.tolist() == reference.topk_indices(scores, k).tolist()


def test_nobody_stays() -> None:
    packed = kernels.select_gather(torch.zeros(2, 3, dtype=torch.bool), [torch.randn(2, 3, 4)], [1])
    assert packed.index.shape == packed.mask.shape == (2, 0)
    assert packed.planes[0].shape == (2, 0, 4)


def test_planes_are_views_of_anything() -> None:
    """Not contiguous, and expanded along the batch."""
    keep = torch.tensor([[True, False, True], [False, True, True]])
    wide = torch.randn(2, 4, 3).transpose(1, 2)
    shared = torch.arange(3).expand(2, 3)
    packed = kernels.select_gather(keep, [wide, shared], [1, 1])
    assert torch.equal(packed.planes[0], torch.stack([wide[0, [0, 2]], wide[1, [1, 2]]]))
    assert packed.planes[1].tolist() == [[0, 2], [1, 2]]


def test_gradients_go_through() -> None:
    keep = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.randn(2, 3, 4, requires_grad=True)
    packed = kernels.select_gather(keep, [x], [1])
    (packed.planes[0] * packed.mask[..., None]).sum().backward()
    assert torch.equal(x.grad, keep[..., None].expand(2, 3, 4).float())


def test_scores_must_be_complete() -> None:
    with pytest.raises(InputError, match="either counts or a threshold"):
        kernels.select_gather(torch.ones(1, 2, dtype=torch.bool), scores=torch.zeros(0), columns=torch.zeros(0).long())
