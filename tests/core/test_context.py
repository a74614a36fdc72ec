from __future__ import annotations

import pytest
import torch

from tests.selectors.inputs import METHOD_SIGNALS, shape_of
from vtc.core.context import VisualContext
from vtc.core.signals import (
    SHARED,
    ClsAttention,
    HiddenStates,
    Origin,
    PreProjector,
    ReceivedAttention,
    Signal,
    TextAttention,
    TextEmbeds,
    VisionKeys,
)
from vtc.errors import InputError
from vtc.selectors.aim import PageRank
from vtc.selectors.learned.atp import ModalityAttention
from vtc.selectors.todre import AttentionExchange
from vtc.selectors.vflowopt import ContextRelevance, PixelEntropy

ALL = (*SHARED, *METHOD_SIGNALS)


def context(n: int = 6, **fields: object) -> VisualContext:
    grids = fields.pop("grids", ((1, 2, 3),))
    return VisualContext(torch.randn(n, 4), 2, torch.Generator(), grids, **fields)  # type: ignore[arg-type]


def test_signals_are_found_by_type_and_by_parameters() -> None:
    keys, one, two = torch.randn(6, 2), torch.rand(1, 2, 6), torch.rand(1, 2, 6)
    it = context(signals={VisionKeys(): keys, ClsAttention((1,)): one, ClsAttention((2,)): two})
    assert it[VisionKeys] is it[VisionKeys()] is keys
    assert it[ClsAttention((1,))] is one
    assert it[ClsAttention((2,))] is two
    with pytest.raises(InputError, match="There are 2 signals cls_attention; name one by its parameters"):
        it[ClsAttention]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_signals_that_were_not_supplied_are_named(kind: type[Signal]) -> None:
    for missing in (kind, kind()):
        with pytest.raises(InputError, match=f"needs {kind.name}, which was not supplied; declare it in `requires`"):
            context()[missing]


def test_coords_run_over_views_frames_rows_columns() -> None:
    several = context(9, grids=((2, 1, 2), (1, 1, 1), (1, 2, 2))).check()
    assert several.coords().tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 1, 0, 0],
        [0, 1, 0, 1],
        [1, 0, 0, 0],
        [2, 0, 0, 0],
        [2, 0, 0, 1],
        [2, 0, 1, 0],
        [2, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (ClsAttention, (2, 2, 5)),
        (ReceivedAttention, (2, 6)),
        (VisionKeys, (5, 2)),
        (PreProjector, (24, 2)),
        (TextAttention, (6, 2)),
        (HiddenStates, (6, 2, 2)),
        (TextEmbeds, (6,)),
        (ContextRelevance, (1, 6)),
        (PixelEntropy, (5,)),
        (ModalityAttention, (2, 5)),
        (AttentionExchange, (1, 2)),
        (PageRank, (6, 1)),
        (Origin, (5, 6)),
    ],
)
def test_wrong_shapes_are_named(kind: type[Signal], shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=rf"{kind.name} must have .* got \({', '.join(map(str, shape))},?\) float32"):
        context(signals={kind(): torch.rand(shape)}).check()


@pytest.mark.parametrize("kind", [None, *ALL], ids=lambda kind: "features" if kind is None else kind.name)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_named(kind: type[Signal] | None, value: float, dtype: torch.dtype) -> None:
    broken = torch.zeros((6, 4) if kind is None else shape_of(kind, 6), dtype=dtype)
    it = context(signals={} if kind is None else {kind(): broken}).check()
    broken.view(-1)[1] = value
    if kind is None:
        it.features = broken
    with pytest.raises(InputError, match=f"^{'features' if kind is None else kind.name}: NaN or infinite"):
        it.check()


def test_contradictions() -> None:
    with pytest.raises(InputError, match="hold 4 tokens, but features have 6 rows"):
        context(grids=((1, 2, 2),)).check()
    with pytest.raises(InputError, match="empty"):
        context(0, grids=()).check()
