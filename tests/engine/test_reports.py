"""The report of a call says what the call did, in numbers that are counted here in another way."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.invariants.matrix import METHODS, Method, borrowed, build, method, over_matrix
from vtc.engine.cache import CACHE


@over_matrix(methods=tuple(m for m in METHODS if not m.cache), attentions=("sdpa",))
@torch.no_grad()
def test_counts_are_those_of_the_tensors(family: tiny.Family, method: Method, attention: str) -> None:
    case = borrowed(family)
    inputs = case.batch("ragged")
    lengths: list[int] = []
    with method.on(case.model) as model, contextlib.ExitStack() as hooks:
        for layer in model.get_decoder().layers:
            # Inside the layer, behind whatever shortens what enters it.
            hook = layer.mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
            hooks.enter_context(hook)
        model(**inputs)
        report = vtc.report(model)

    ids, real = inputs["input_ids"], inputs["attention_mask"]
    visual = (ids == tiny.IMAGE) | (ids == tiny.VIDEO)
    assert report.lengths_before == tuple(real.sum(1).tolist())
    assert report.visual_tokens_before == int(visual.sum())
    lengths = lengths[report.probed_layers :]  # what read the prompt first, to choose by
    assert [max(rows) for rows in report.lengths_per_layer] == lengths[: len(report.lengths_per_layer)]
    assert [(s.row, s.index) for s in report.segments] == [(0, 0), (1, 0), (1, 1)]
    assert all(segment.modality == family.modality for segment in report.segments)
    ratios = [config.keep_ratio for config in method.stages]
    for segment in report.segments:
        scored = segment.tokens_before - segment.structural
        assert sum(t * h * w for t, h, w in segment.grids) == scored
        assert segment.selections
        for place, (site, selection) in enumerate(segment.selections):
            assert selection.n == scored
            if method.by_ratio:
                # In the tower every crop has a budget of its own, and tiles lose patches when they are joined.
                about = 0.15 * scored if method.tower else 0
                assert abs(selection.k - max(1, round(scored * ratios[place]))) <= about
                in_front = vtc.VisionLayer(1) if method.tower else vtc.BeforeDecoder()
                assert (site == in_front) == (not method.decoder or place < len(ratios) - 1)
            scored = selection.k
        left = scored + segment.structural if scored else 0  # separators leave with the last token
        assert segment.tokens_after == left == len(segment.kept)
    dropped = sum(s.tokens_before - s.tokens_after for s in report.segments)
    assert sum(report.lengths_before) - sum(report.lengths_per_layer[-1]) == dropped
    assert report.visual_tokens_after == report.visual_tokens_before - dropped


@pytest.mark.parametrize("method", [m for m in METHODS if not m.any_size], ids=str)
def test_the_cache_is_as_large_as_reported(method: Method) -> None:
    case = borrowed(tiny.family("llava"))
    with torch.no_grad(), method.on(case.model) as model:
        cache = model(**case.batch("single"))[CACHE]
        report = vtc.report(model)
    held = tuple(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert report.kv_bytes_after == held


@torch.no_grad()
def test_the_report_is_of_the_last_prompt() -> None:
    case = build(tiny.family("llava"))
    with method("divprune").on(case.model) as model:
        with pytest.raises(vtc.StateError, match="report"):
            vtc.report(model)
        model.generate(**case.batch("ragged"), max_new_tokens=3, do_sample=False)
        assert [s.row for s in vtc.report(model).segments] == [0, 1, 1]
        model(**case.batch("single"))
        assert [s.row for s in vtc.report(model).segments] == [0]
        model(**case.batch("no_image_row"))
        assert [s.row for s in vtc.report(model).segments] == [1]
        model(**case.batch("text_only"))
        report = vtc.report(model)
        assert report.segments == ()
        assert report.lengths_per_layer[0] == report.lengths_before
    with pytest.raises(vtc.StateError, match="compress"):
        vtc.report(case.model)


@torch.no_grad()
def test_mixed_prompts_are_reported_in_order() -> None:
    for family in (family for family in tiny.FAMILIES if "mixed" in family.kinds):
        case = build(family)
        inputs = case.batch("mixed")
        with method("uniform").on(case.model) as model:
            model(**inputs)
            report = vtc.report(model)
        found = [(s.row, s.index, s.modality) for s in report.segments]
        assert found == [(0, 0, "image"), (0, 1, "video"), (1, 0, "video")], family.name


@torch.no_grad()
def test_a_prompt_with_the_video_first() -> None:
    for family in (family for family in tiny.FAMILIES if "mixed" in family.kinds):
        case = build(family)
        inputs = case.collate((tiny.Row(50, 4, (("video", 0), ("image", 1)), 5),))
        with method("divprune").on(case.model) as model:
            ours = model(**inputs).logits
            report = vtc.report(model)
        assert [(s.index, s.modality) for s in report.segments] == [(0, "video"), (1, "image")], family.name
        if not family.hybrid:
            expected = reference.Reference.of(case.model, inputs, report)
            theirs = expected.prefill().logits
            assert reference.max_error(ours[expected.visible], theirs[expected.visible]) <= 2e-5, family.name


def test_structural_tokens_are_counted() -> None:
    case = build(tiny.family("llava_next"))
    inputs = case.batch("single")
    with torch.no_grad(), vtc.compressed(case.model, "uniform", keep_tokens=10) as model:
        model(**inputs)
        (segment,) = vtc.report(model).segments
    # A square picture in 2 x 2 tiles of 4 x 4 patches and the overview: 8 rows, each with its newline.
    assert segment.structural == 8
    assert segment.tokens_before == 16 + 64 + 8
    assert segment.tokens_after == 10 + 8
    assert segment.grids == ((1, 4, 4), (1, 8, 8))


def test_keep_tokens_is_per_image_and_capped() -> None:
    case = build(tiny.family("qwen2_5_vl"))
    inputs: dict[str, Any] = case.batch("ragged")
    with torch.no_grad(), vtc.compressed(case.model, "uniform", keep_tokens=10) as model:
        model(**inputs)
        assert [s.tokens_after for s in vtc.report(model).segments] == [10, 8, 10]
