"""Invariant 6: kept really are the best under the method's own score.

The scores are recomputed here from eager attention of an untouched model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests import reference, tiny
from tests.invariants.matrix import METHODS, REPRESENTATIVES, Method, borrowed, build, method, over_matrix

WITH_CLS = tuple(family for family in tiny.FAMILIES if family.cls)
WITH_DECODER_STAGES = tuple(family for family in tiny.FAMILIES if not family.hybrid)


def report_of(model: Any, method: Method, inputs: dict[str, Any]) -> Any:
    with torch.no_grad(), method.on(model):
        model(**inputs)
        return vtc.report(model)


def best(scores: Tensor, k: int) -> list[int]:
    """Indices of the k best, the lower index winning ties, in ascending order."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def scored_columns(case: tiny.TinyCase, inputs: dict[str, Any], report: Any) -> Iterator[tuple[Any, Tensor]]:
    """Every segment with the columns of its scorable tokens."""
    structural = reference.structural_columns(case.model, inputs)
    taken: dict[tuple[int, str], int] = {}
    for segment in sorted(report.segments, key=lambda s: (s.row, s.index)):
        key = segment.row, segment.modality
        start = taken.get(key, 0)
        taken[key] = start + segment.tokens_before
        columns = reference.placeholder_columns(case.model, inputs["input_ids"], *key)[start : taken[key]]
        yield segment, columns[~structural[segment.row, columns]]


# -------------------------------------------------------------------------------------------------- [CLS] scores


def cls_scores(case: tiny.TinyCase, inputs: dict[str, Any], start_layer: int) -> Tensor:
    """(B, L): the method's score in the columns of the tokens that patches become, NaN elsewhere.

    Weights come from eager attention of an untouched model. Which patches a token is made of is asked of autograd: the
    token depends on just these. That holds for tiles, unpadding, pooling and pixel shuffle alike.
    """
    eager = build(case.family, "eager").model
    modality, config = case.family.modality, eager.config
    tower = getattr(eager.model, f"{modality}_tower", None) or eager.model.vision_tower
    attentions = [m for m in tower.modules() if type(m).__name__.endswith("Attention")]
    blocks = list(tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer)
    feature_layer = len(blocks) + config.vision_feature_layer  # -1 is the output of the last block
    weights: dict[int, Tensor] = {}
    features: list[Tensor] = []
    for layer, module in enumerate(attentions):
        module.register_forward_hook(lambda m, a, out, layer=layer: weights.__setitem__(layer, out[1].detach()))
    blocks[feature_layer].register_forward_hook(
        lambda m, a, out: features.append(out[0] if isinstance(out, tuple) else out)
    )
    embeds: list[Tensor] = []
    eager.get_decoder().register_forward_pre_hook(
        lambda m, a, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    eager(**inputs)

    patch_scores = sum(weights[layer][:, :, 0, 1:].mean(1) for layer in range(start_layer, feature_layer + 1))
    columns = (inputs["input_ids"] == getattr(config, f"{modality}_token_id")) & ~reference.structural_columns(
        case.model, inputs
    )
    scores = torch.full(columns.shape, torch.nan)
    for row, column in columns.nonzero().tolist():
        (gradient,) = torch.autograd.grad(embeds[0][row, column].sum(), features[-1], retain_graph=True)
        made_of = (gradient[:, 1:] != 0).any(-1)
        assert made_of.any()
        scores[row, column] = patch_scores[made_of].mean()
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", WITH_CLS, ids=str)
def test_vtc_cls_keeps_what_cls_looks_at(family: tiny.Family, attention: str) -> None:
    case = build(family, attention)
    for kind in ("ragged", "two_images", "no_image_row"):
        inputs = case.batch(kind)
        report = report_of(case.model, method("vtc-cls"), inputs)
        scores = cls_scores(case, inputs, start_layer=1)
        checked = 0
        for segment, columns in scored_columns(case, inputs, report):
            ((_, selection),) = segment.selections
            assert selection.keep.tolist() == best(scores[segment.row, columns], round(0.5 * len(columns))), kind
            checked += 1
        assert checked == sum(len(row.visuals) for row in tiny.ROWS[kind])


@pytest.mark.parametrize("start_layer", [0, 1, 2, -2])
def test_vtc_cls_sums_the_layers_it_says(start_layer: int) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("two_images")
    stage = Method("cls", (vtc.CompressionConfig("vtc-cls", keep_tokens=5, options={"start_layer": start_layer}),))
    report = report_of(case.model, stage, inputs)
    scores = cls_scores(case, inputs, start_layer=start_layer % 4)
    for segment, columns in scored_columns(case, inputs, report):
        assert segment.selections[0][1].keep.tolist() == best(scores[segment.row, columns], 5)


# --------------------------------------------------------------------------------------------- decoder attention


@over_matrix(methods=(method("fastv"), method("divprune+fastv")), families=WITH_DECODER_STAGES)
def test_fastv_keeps_what_the_last_query_looks_at(family: tiny.Family, method: Method, attention: str) -> None:
    case, eager = borrowed(family, attention), build(family, "eager")
    for kind in ("ragged", "right_padded", "no_image_row", "two_images"):
        inputs = case.batch(kind)
        report = report_of(case.model, method, inputs)
        keep = reference.keep_masks(eager.model, inputs, report)
        before = {stage: mask for stage, mask in keep.items() if stage == reference.BEFORE_LM}
        with torch.no_grad():
            out = reference.Reference(eager.model, inputs, before).prefill(output_attentions=True)
        weights = out.attentions[1].mean(1)  # (B, L, L) of the layer before the stage
        real = inputs["attention_mask"].bool()
        for segment, columns in scored_columns(eager, inputs, report):
            row = segment.row
            *earlier, (site, selection) = segment.selections
            assert site == vtc.DecoderLayer(2)
            for _, first in earlier:
                columns = columns[first.keep]
            last = int(real[row].nonzero()[-1])
            assert selection.keep.tolist() == best(weights[row, last, columns], round(0.5 * len(columns))), kind


# --------------------------------------------------------------------------- methods that read features or grids


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=str)
@pytest.mark.parametrize("name", ["divprune", "uniform"])
def test_the_model_chooses_as_the_open_door_does(family: tiny.Family, name: str) -> None:
    # `vtc.select` gets the embeddings that the untouched model hands to its decoder.
    case = borrowed(family)
    for kind in (kind for kind in family.kinds if kind != "text_only"):
        inputs = case.batch(kind)
        report = report_of(case.model, method(name), inputs)
        embeds = reference.merged_embeddings(case.model, inputs)
        for segment, columns in scored_columns(case, inputs, report):
            assert sum(t * h * w for t, h, w in segment.grids) == len(columns)
            if name == "uniform" and len(segment.grids) > 1:
                continue  # `vtc.select` takes one grid
            expected = vtc.select(
                name,
                features=embeds[segment.row, columns],
                grid_thw=segment.grids[0] if len(segment.grids) == 1 else None,
                keep_ratio=method(name).stages[0].keep_ratio,
            )
            assert torch.equal(segment.selections[0][1].keep, expected.keep), kind


# ------------------------------------------------------------------------------------------- seeds and precision


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=str)
def test_seeds_reproduce_and_matter(family: tiny.Family) -> None:
    case = borrowed(family)
    inputs = case.batch("two_images")

    def kept(seed: int) -> list[list[int]]:
        with torch.no_grad(), vtc.compressed(case.model, "random", keep_ratio=0.5, seed=seed) as model:
            model(**inputs)
            return [segment.kept.tolist() for segment in vtc.report(model).segments]

    torch.manual_seed(1)
    first = kept(0)
    torch.manual_seed(2)
    assert kept(0) == first
    assert kept(1) != first


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_global_random_state_is_left_alone(method: Method) -> None:
    case = borrowed(tiny.family("qwen2_5_vl" if method.any_size else "llava"))
    inputs = case.batch("ragged")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    report_of(case.model, method, inputs)
    assert torch.equal(torch.get_rng_state(), state)


@over_matrix(
    methods=tuple(m for m in METHODS if not m.tower and not m.cache),  # towers: in `test_8_towers.py`
    families=tuple(tiny.family(name) for name in (*REPRESENTATIVES, "llava_next", "gemma3", "paligemma")),
    attentions=("sdpa",),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_stays_finite(family: tiny.Family, method: Method, attention: str, dtype: torch.dtype) -> None:
    case = borrowed(family, attention, dtype)
    model, inputs = case.model, case.batch("ragged")
    with method.on(model):
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        report = vtc.report(model)
    assert all(step.isfinite().all() for step in out.logits)
    assert report.dtype == dtype
    # Selection runs in float32, but on half-precision features: the reference is the masked model in the same
    # precision.
    expected = reference.Reference.of(model, inputs, report)
    theirs = expected.logits_along(reference.answers(out, inputs))
    error = reference.max_error(reference.stacked_logits(out), theirs)
    assert error <= (0.05 if dtype == torch.float16 else 0.5), error
