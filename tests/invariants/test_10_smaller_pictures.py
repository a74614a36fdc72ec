"""Invariant 10: a picture that becomes smaller at the pixels is as if the untouched model were given the smaller one.

Pictures are made here and cut into patches by transformers' own processors, at both sizes, so that the two sides share
the resampling function of PyTorch and nothing else. The untouched model gets a prompt with K placeholders, told the
positions of the placeholders of the full prompt that the smaller picture's tokens take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import vtc
from tests import reference, tiny
from tests.invariants.matrix import HYBRID_TOLERANCE, build, sharp
from vtc.engine.cache import CACHE
from vtc.errors import ConfigError, UnsupportedMethodError
from vtc.selectors.resize import smaller_grid

FAMILIES = tuple(family for family in tiny.FAMILIES if family.any_size and family.like is None)
FIXED = tuple(family for family in tiny.FAMILIES if not family.any_size)
EDGE, MERGE, JOINED = 4, 2, 2  # of the tiny towers
CELL = EDGE * MERGE
GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def names(modality: str) -> tuple[str, str]:
    return ("pixel_values" if modality == "image" else "pixel_values_videos"), f"{modality}_grid_thw"


def patches(frames: Tensor, modality: str) -> Tensor:
    """Patches of an image (3, H, W), or of a video (F, 3, H, W), as the processors make them."""
    if modality == "image":
        return Qwen2VLImageProcessor().patchify(frames[None], EDGE, MERGE, JOINED)[0][0]
    return Qwen2VLVideoProcessor().patchify(frames[None], EDGE, MERGE, JOINED)[0][0]


def resampled(frames: Tensor, rows: int, columns: int) -> Tensor:
    stack = frames if frames.dim() == 4 else frames[None]
    out = functional.interpolate(stack, size=(rows * CELL, columns * CELL), mode="bicubic", antialias=True)
    return out if frames.dim() == 4 else out[0]


def pictured(case: tiny.TinyCase, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """`inputs` with new pixels, and the pictures that these are of."""
    modality = case.family.modality
    pixels, grids = names(modality)
    generator = torch.Generator().manual_seed(5)
    pictures = []
    for t, h, w in inputs[grids].tolist():
        shape = (3, h * EDGE, w * EDGE) if modality == "image" else (t * JOINED, 3, h * EDGE, w * EDGE)
        pictures.append(torch.randn(shape, generator=generator, dtype=inputs[pixels].dtype))
    return {**inputs, pixels: torch.cat([patches(each, modality) for each in pictures])}, pictures


def smaller(case: tiny.TinyCase, inputs: dict[str, Any], pictures: Sequence[Tensor], report: Any) -> dict[str, Any]:
    """What the untouched model is given for a prompt of one row: smaller pictures, and fewer placeholders."""
    modality = case.family.modality
    pixels, grids = names(modality)
    merge, parts, table = MERGE, [], []
    for picture, (t, h, w), segment in zip(pictures, inputs[grids].tolist(), report.segments, strict=True):
        place = segment.kept
        frames = (place // (h * w // merge**2)).unique()
        rows, columns = (place // (w // merge) % (h // merge)).unique(), (place % (w // merge)).unique()
        if modality == "video":
            picture = picture.unflatten(0, (t, JOINED))[frames].flatten(0, 1)
        parts.append(patches(resampled(picture, len(rows), len(columns)), modality))
        table.append((len(frames), len(rows) * merge, len(columns) * merge))
    (keep,) = reference.keep_masks(case.model, inputs, report)[reference.BEFORE_LM]
    positions = case.model.model.get_rope_index(**reference._rope_arguments(inputs))[0]
    return {
        "input_ids": inputs["input_ids"][:, keep],
        "attention_mask": inputs["attention_mask"][:, keep],
        "mm_token_type_ids": inputs["mm_token_type_ids"][:, keep],
        "position_ids": positions[..., keep],
        pixels: torch.cat(parts),
        grids: torch.tensor(table),
    }


def frames_kept(report: Any) -> bool:
    """Whether all steps of time of all videos are there."""
    grids = [(segment.grids[0], segment.kept) for segment in report.segments]
    return all(len((kept // (h * w)).unique()) == t for (t, h, w), kept in grids)


@pytest.mark.parametrize("keep_ratio", [0.4, 0.3])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_compact_positions_are_those_of_the_smaller_prompt(family: tiny.Family, keep_ratio: float) -> None:
    """The untouched model numbers the smaller prompt by itself."""
    case = sharp(family)
    for kind in ("single", "two_images"):
        for row in case.rows(kind):
            inputs, pictures = pictured(case, row)
            with vtc.compressed(case.model, config(keep_ratio, positions="compact")) as model:
                ours = model(**inputs).logits
                report = vtc.report(model)
                said = model.generate(**inputs, **GREEDY)
            assert frames_kept(report)
            (keep,) = reference.keep_masks(case.model, inputs, report)[reference.BEFORE_LM]
            given = smaller(case, inputs, pictures, report)
            told = case.model(**given).logits
            given.pop("position_ids")
            theirs = case.model(**given).logits
            assert reference.max_error(ours[:, keep], theirs) <= bound(family), kind
            assert reference.max_error(told, theirs) > 1e-2, "these are other positions"
            answer = case.model.generate(**given, **GREEDY)
            error = reference.max_error(reference.stacked_logits(said), reference.stacked_logits(answer))
            assert error <= bound(family), kind


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_video", "glm4v"])
@torch.no_grad()
def test_compact_positions_in_batches_and_conversations(family: str) -> None:
    case = sharp(tiny.family(family))
    said = {**GREEDY, "max_new_tokens": 3}
    with vtc.compressed(case.model, config(positions="compact")) as model:
        together = reference.stacked_logits(model.generate(**case.batch("two_images"), **said))
        static = model.generate(**case.batch("two_images"), **said, cache_implementation="static")
        alone = [reference.stacked_logits(model.generate(**row, **said)) for row in case.rows("two_images")]
        # The next turn on the same cache is the whole conversation read at once.
        (row,) = case.rows("single")
        first = model.generate(**row, **said)
        asked = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        grown = asked.shape[1] - row["input_ids"].shape[1]
        turn = {
            "input_ids": asked,
            "attention_mask": functional.pad(row["attention_mask"], (0, grown), value=1),
            "mm_token_type_ids": functional.pad(row["mm_token_type_ids"], (0, grown), value=0),
        }
        second = model.generate(**turn, **{CACHE: first[CACHE]}, **said)
        whole = model.generate(**{**row, **turn}, **said)
    assert reference.max_error(together, torch.cat(alone)) <= 1e-6
    assert reference.max_error(together, reference.stacked_logits(static)) <= 1e-6
    assert reference.max_error(reference.stacked_logits(second), reference.stacked_logits(whole)) <= 1e-6


@pytest.mark.parametrize("site", ["decoder", "vision:1"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.modality == "image"], ids=str)
@torch.no_grad()
def test_compact_positions_with_later_stages_are_those_of_the_smaller_prompt(family: tiny.Family, site: str) -> None:
    """A model that is given the smaller prompt, compressed by the later stage alone, says the same."""
    case = sharp(family)
    alone = vtc.CompressionConfig("uniform", keep_ratio=0.5, at=site)
    later = dataclasses.replace(alone, positions="compact")
    for kind in ("single", "two_images"):
        for row in case.rows(kind):
            inputs, pictures = pictured(case, row)
            with vtc.compressed(case.model, config(0.6, positions="compact")) as model:
                model(**inputs)
                given = smaller(case, inputs, pictures, vtc.report(model))
            given.pop("position_ids")
            with vtc.compressed(case.model, [config(0.6, positions="compact"), later]) as model:
                ours = reference.stacked_logits(model.generate(**inputs, **GREEDY))
                left = [segment.tokens_after for segment in vtc.report(model).segments]
            with vtc.compressed(case.model, alone) as model:
                theirs = reference.stacked_logits(model.generate(**given, **GREEDY))
                assert [segment.tokens_after for segment in vtc.report(model).segments] == left
            assert reference.max_error(ours, theirs) <= bound(family), kind


def test_compact_positions_need_pictures_that_become_smaller() -> None:
    case = build(tiny.family("qwen2_vl"))
    for site in ("decoder", "vision:1"):
        lonely = vtc.CompressionConfig("random", keep_ratio=0.5, positions="compact", at=site)
        with pytest.raises(ConfigError, match=r"positions='compact' has no meaning for the \(t, h, w\) positions"):
            vtc.compress(case.model, lonely)
    inside = vtc.CompressionConfig("fastv", keep_ratio=0.5, positions="compact")
    with vtc.compressed(case.model, [config(positions="compact"), inside]) as model:
        model(**case.batch("ragged"))


def config(keep_ratio: float = 0.4, **more: Any) -> vtc.CompressionConfig:
    return vtc.CompressionConfig("resize", keep_ratio=keep_ratio, **more)


def bound(family: tiny.Family) -> float:
    return HYBRID_TOLERANCE if family.hybrid else 1e-6


@pytest.mark.parametrize("keep_ratio", [0.4, 0.1])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_the_model_sees_the_smaller_picture(family: tiny.Family, keep_ratio: float) -> None:
    case = sharp(family)
    for kind in ("single", "two_images"):
        for row in case.rows(kind):
            inputs, pictures = pictured(case, row)
            with vtc.compressed(case.model, config(keep_ratio)) as model:
                ours = model(**inputs).logits
                report = vtc.report(model)
            assert all(segment.tokens_after < segment.tokens_before for segment in report.segments)
            (keep,) = reference.keep_masks(case.model, inputs, report)[reference.BEFORE_LM]
            theirs = case.model(**smaller(case, inputs, pictures, report)).logits
            assert reference.max_error(ours[:, keep], theirs) <= bound(family), kind
            assert not ours[:, ~keep].any()


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.hybrid], ids=str)
@torch.no_grad()
def test_answers_are_those_to_the_smaller_picture(family: tiny.Family) -> None:
    case = sharp(family)
    (row,) = case.rows("single")
    inputs, pictures = pictured(case, row)
    with vtc.compressed(case.model, config()) as model:
        ours = model.generate(**inputs, **GREEDY)
        report = vtc.report(model)
    answer = reference.answers(ours, inputs)[:, :-1]
    given = smaller(case, inputs, pictures, report)
    following = given["position_ids"][..., -1:] + 1 + torch.arange(answer.shape[1])
    length = given["input_ids"].shape[1]
    given["position_ids"] = torch.cat([given["position_ids"], following], dim=-1)
    given["input_ids"] = torch.cat([given["input_ids"], answer], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        given[name] = functional.pad(given[name], (0, answer.shape[1]), value=value)
    theirs = case.model(**given, use_cache=False).logits[:, length - 1 :]
    assert reference.max_error(reference.stacked_logits(ours), theirs) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_keeping_all_changes_no_bit(family: tiny.Family) -> None:
    case = build(family)
    inputs = case.batch("ragged")
    plain = case.model(**inputs).logits
    with vtc.compressed(case.model, config(1.0)) as model:
        assert torch.equal(model(**inputs).logits, plain)
    with vtc.compressed(case.model, "resize", keep_tokens=9999) as model:
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_stage_in_the_tower_sees_the_smaller_picture(name: str) -> None:
    """Resampling, and then dropping half of the patches that are left, is dropping half of a smaller picture's."""
    case = sharp(tiny.family(name))
    (row,) = case.rows("single")
    inputs, pictures = pictured(case, row)
    inside = vtc.CompressionConfig("divprune", keep_ratio=0.5, at="vision:1")
    with vtc.compressed(case.model, config()) as model:
        model(**inputs)
        given = smaller(case, inputs, pictures, vtc.report(model))
    with vtc.compressed(case.model, [config(), inside]) as model:
        ours = model(**inputs).logits
        report = vtc.report(model)
    with vtc.compressed(case.model, inside) as model:
        theirs = model(**given).logits
        (segment,) = vtc.report(model).segments
    assert [str(site) for site, _, _ in report.sites] == ["pixels", "vision:1"]
    assert torch.equal(report.segments[0].selections[1][1].keep, segment.selections[0][1].keep)
    kept = (ours != 0).any(dim=-1)
    assert reference.max_error(ours[kept], theirs[(theirs != 0).any(dim=-1)]) <= 1e-6


@pytest.mark.parametrize("method", ["divprune", "sparsevlm", "pyramiddrop"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_later_stages_are_as_if_given_the_smaller_picture(name: str, method: str) -> None:
    case = sharp(tiny.family(name))
    (row,) = case.rows("single")
    inputs, pictures = pictured(case, row)
    later = vtc.CompressionConfig(method, keep_ratio=0.5)
    with vtc.compressed(case.model, config(0.6)) as model:
        model(**inputs)
        given = smaller(case, inputs, pictures, vtc.report(model))
    with vtc.compressed(case.model, [config(0.6), later]) as model:
        ours = model(**inputs).logits
        (segment,) = vtc.report(model).segments
    with vtc.compressed(case.model, later) as model:
        theirs = model(**given).logits
        (expected,) = vtc.report(model).segments
    chosen = [selection.to_dict()["keep"] for _, selection in segment.selections[1:]]
    assert chosen == [selection.to_dict()["keep"] for _, selection in expected.selections]
    assert reference.max_error(ours[(ours != 0).any(dim=-1)], theirs[(theirs != 0).any(dim=-1)]) <= 1e-6


@pytest.mark.usefixtures("registries_as_found")
@torch.no_grad()
def test_later_stages_see_the_smaller_grid() -> None:
    seen: list[tuple[tuple[int, int, int], ...]] = []

    @vtc.register_selector
    @dataclasses.dataclass(frozen=True)
    class Grids(vtc.Selector):
        name, paper = "grids", "a test"

        def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
            seen.append(ctx.grids)
            return vtc.Selection.full(ctx.n)

    case = build(tiny.family("qwen2_vl"))  # 8 x 8 patches, so 4 x 4 tokens
    with vtc.compressed(case.model, [config(0.3), vtc.CompressionConfig("grids", keep_ratio=0.9)]) as model:
        model(**case.batch("single"))
    assert seen == [((1, 2, 2),)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_video"])
@torch.no_grad()
def test_layers_of_the_tower_get_shorter(family: str) -> None:
    case = build(tiny.family(family))
    lengths: list[int] = []
    for block in case.model.model.visual.blocks:
        block.register_forward_hook(lambda module, args, output: lengths.append(len(output)))
    with vtc.compressed(case.model, config()) as model:
        model(**case.batch("single"))
        report = vtc.report(model)
    assert set(lengths) == {report.visual_tokens_after * MERGE**2}
    share = report.visual_tokens_after / report.visual_tokens_before
    assert 0.8 * share**2 < report.tower_flops_after / report.tower_flops_before <= share
    vtc.restore(case.model)
    lengths.clear()
    case.model(**case.batch("single"))
    assert set(lengths) == {report.visual_tokens_before * MERGE**2}


@pytest.mark.parametrize("grid", [(1, 24, 24), (1, 30, 17), (1, 5, 40), (1, 47, 47), (1, 13, 9)])
def test_the_size_is_the_processors(grid: tuple[int, int, int]) -> None:
    factor, (_, h, w) = 28, grid
    for budget in range(max(h, w), h * w, 3):
        # A hair more room: where the size is a whole number, `smart_resize` may lose a row to the rounding of a root.
        limit = budget * factor**2 * (1 + 1e-12)
        height, width = smart_resize(h * factor, w * factor, factor, min_pixels=1, max_pixels=limit)
        assert smaller_grid(grid, budget) == (1, height // factor, width // factor)


def test_the_budget_is_a_ceiling() -> None:
    for grid in [(1, 7, 5), (1, 1, 40), (1, 40, 1), (3, 4, 5), (5, 1, 1), (1, 60, 3)]:
        n = math.prod(grid)
        for budget in range(1, n + 1):
            selection = vtc.select("resize", grid_thw=grid, keep_tokens=budget)
            assert 1 <= selection.k <= budget
            assert selection.k == math.prod(smaller_grid(grid, budget))
            assert smaller_grid(grid, budget)[0] == min(grid[0], budget)
        assert vtc.select("resize", grid_thw=grid, keep_ratio=1.0).k == n
    assert vtc.select("resize", grid_thw=(1, 4, 6), keep_tokens=6).keep.tolist() == [7, 9, 11, 19, 21, 23]


@pytest.mark.parametrize("family", FIXED, ids=str)
def test_towers_of_one_size_are_refused(family: tiny.Family) -> None:
    case = build(family)
    with pytest.raises(
        UnsupportedMethodError, match=r"(takes pictures of one size|end of every row of a picture); try pool"
    ):
        vtc.compress(case.model, "resize", keep_ratio=0.5)
    assert not vtc.is_compressed(case.model)


@pytest.mark.usefixtures("registries_as_found")
def test_what_cannot_be_is_refused() -> None:
    @vtc.register_selector
    @dataclasses.dataclass(frozen=True)
    class Crooked(vtc.Selector):
        name, paper, reads_features = "crooked", "a test", False

        def stages(self, shape: Any = None, keep_ratio: float | None = None) -> tuple[vtc.Stage, ...]:
            return (vtc.Stage(vtc.Pixels(), action=vtc.Action.RESAMPLE),)

        def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
            return vtc.Selection(ctx.n, torch.tensor([0, 1, 5]))

    case = build(tiny.family("qwen2_vl"))
    inputs = case.batch("single")
    with pytest.raises(ConfigError, match="made smaller once"):
        vtc.compress(case.model, [vtc.CompressionConfig("random", keep_ratio=0.5, at="pixels"), config()])
    with pytest.raises(UnsupportedMethodError, match="cannot work at 'decoder'"):
        vtc.compress(case.model, "resize", keep_ratio=0.5, at="decoder")
    vtc.compress(case.model, "crooked", keep_ratio=0.5)
    with pytest.raises(UnsupportedMethodError, match=r"chose 3 places of a grid of \(1, 4, 4\)"):
        case.model(**inputs)
