from __future__ import annotations

import pytest
import torch

from vtc.core.context import Need, Stage, VisualContext, VisualSegment
from vtc.errors import ConfigError, InputError


def context(n: int = 6, **fields: object) -> VisualContext:
    grids = fields.pop("grids", ((1, 2, 3),))
    return VisualContext(torch.randn(n, 4), 2, torch.Generator(), grids, **fields)  # type: ignore[arg-type]


def test_needs_are_fields() -> None:
    for need in Need:
        assert getattr(context(), need.value) is None
        with pytest.raises(InputError, match=f"needs {need.value}, which was not supplied"):
            context().need(need)
    keys = torch.randn(6, 2)
    assert context(keys=keys).need(Need.KEYS) is keys


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
    ("name", "shape"),
    [
        ("cls_attention", (2, 2, 5)),
        ("received_attention", (2, 6)),
        ("attention", (6, 5)),
        ("attention", (5, 6)),
        ("keys", (5, 2)),
        ("text_attention", (6, 2)),
        ("clip_relevance", (5,)),
        ("hidden_states", (6, 2, 2)),
        ("context_relevance", (1, 6)),
        ("entropy", (5,)),
        ("modality_attention", (2, 5)),
        ("pagerank", (6, 1)),
        ("origin", (5, 6)),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"{name} must have"):
        context(**{name: torch.rand(shape)}).check()


@pytest.mark.parametrize("name", ["features", *(need.value for need in Need)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_are_named(name: str, value: float, dtype: torch.dtype) -> None:
    shapes = {"cls_attention": (1, 1, 6), "received_attention": (1, 1, 6), "text_attention": (1, 1, 6)}
    per_token = ("clip_relevance", "context_relevance", "entropy", "pagerank")
    broken = torch.zeros(shapes.get(name, (6,) if name in per_token else (6, 6)), dtype=dtype)
    broken.view(-1)[3] = value
    it = context(group=torch.arange(6))
    it.check()
    setattr(it, name, broken)
    with pytest.raises(InputError, match=f"^{name}: NaN or infinite"):
        it.check()


def test_contradictions() -> None:
    with pytest.raises(InputError, match="hold 4 tokens, but features have 6 rows"):
        context(grids=((1, 2, 2),)).check()
    with pytest.raises(InputError, match="empty"):
        context(0, grids=()).check()
    with pytest.raises(InputError, match=r"needs group \(M,\), got None"):
        context(pre_projector=torch.randn(24, 3)).check()


def test_segment_counts_structural_tokens() -> None:
    structural = torch.tensor([False, False, True, False, False, True])
    segment = VisualSegment(0, 1, "image", torch.arange(3, 9), ((1, 2, 2),), structural)
    assert (segment.n_tokens, segment.n_scored, segment.grid_thw) == (6, 4, (1, 2, 2))
    tiles = VisualSegment(0, 0, "video", torch.arange(5), ((1, 2, 2), (1, 1, 1)), torch.zeros(5, dtype=torch.bool))
    assert tiles.grid_thw == (1, 1, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "audio"}, "modality must be one of"),
        ({"span": torch.arange(4.0)}, "span must be"),
        ({"structural": torch.zeros(3, dtype=torch.bool)}, "structural must be"),
        ({"structural": torch.zeros(4)}, "structural must be"),
        ({"grids": ((1, 1, 3),)}, "hold 3 tokens, but 4 are non-structural"),
    ],
)
def test_segment_is_validated(changes: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {
        "modality": "image",
        "span": torch.arange(4),
        "grids": ((1, 2, 2),),
        "structural": torch.zeros(4, dtype=torch.bool),
    }
    with pytest.raises(InputError, match=f"Visual segment 2 of row 1: .*{message}"):
        VisualSegment(1, 2, **{**parts, **changes})  # type: ignore[arg-type]


def test_stage_layer() -> None:
    assert Stage().layer is None
    with pytest.raises(ConfigError, match="got -1"):
        Stage(layer=-1)
