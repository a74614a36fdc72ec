"""Invariant 2: what is dropped is as if masked, at prefill and at every cached decode step.

The two sides share nothing but the report: see `tests.reference`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.invariants.matrix import (
    DROPPING,
    METHODS,
    Method,
    build,
    method,
    over_matrix,
    sharp,
    sharp_borrowed,
    tolerance,
)

DECODE_STEPS = 8
GREEDY = {
    "max_new_tokens": DECODE_STEPS + 1,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
FEW = {**GREEDY, "max_new_tokens": 5}
"""Of every method in every family; where all is at once, all steps are taken."""
EXACT = tuple(family for family in tiny.FAMILIES if not family.hybrid)
HYBRID = tuple(family for family in tiny.FAMILIES if family.hybrid)
# Both kinds of stages at once: what holds for it holds for its parts.
COMPOSED = tuple(m for m in METHODS if m.name == "divprune+fastv")


def prefill_error(case: tiny.TinyCase, method: Method, inputs: dict[str, Any]) -> tuple[float, int]:
    """Largest difference to the masked reference over all tokens that are left, and how many tokens were dropped."""
    with torch.no_grad(), method.on(case.model):
        ours = case.model(**inputs).logits
        report = vtc.report(case.model)
    expected = reference.Reference.of(case.model, inputs, report)
    with torch.no_grad():
        theirs = expected.prefill().logits
    dropped = int(inputs["attention_mask"].sum() - expected.visible.sum())
    return reference.max_error(ours[expected.visible], theirs[expected.visible]), dropped


def decode_error(case: tiny.TinyCase, method: Method, inputs: dict[str, Any], said: dict[str, Any] = GREEDY) -> float:
    """Largest difference over the first token and the cached steps of greedy generate()."""
    with method.on(case.model):
        ours = case.model.generate(**inputs, **said)
        report = vtc.report(case.model)
    expected = reference.Reference.of(case.model, inputs, report)
    theirs = expected.logits_along(reference.answers(ours, inputs))
    return reference.max_error(reference.stacked_logits(ours), theirs)


def hybrid_error(case: tiny.TinyCase, method: Method, inputs: dict[str, Any]) -> float:
    """As `decode_error`, beside rows that never had the dropped tokens."""
    with method.on(case.model):
        ours = case.model.generate(**inputs, **GREEDY)
        report = vtc.report(case.model)
    keep = reference.keep_masks(case.model, inputs, report)[reference.BEFORE_LM]
    theirs = reference.logits_of_packed_rows(case.model, inputs, keep, reference.answers(ours, inputs))
    return reference.max_error(reference.stacked_logits(ours), theirs)


@over_matrix(methods=DROPPING, families=EXACT)
def test_prefill_equals_masking(family: tiny.Family, method: Method, attention: str) -> None:
    case = sharp_borrowed(family, attention)
    errors = {}
    kinds = ("right_padded", "no_image_row", "mixed") if attention == "sdpa" else ("ragged", "right_padded")
    for kind in kinds:  # of "ragged" with sdpa, `test_decoding_equals_masking` compares the whole answer
        if kind in family.kinds:
            errors[kind], dropped = prefill_error(case, method, case.batch(kind))
            assert dropped > 0, kind
    assert max(errors.values()) <= tolerance(case), errors


@pytest.mark.parametrize("family", EXACT, ids=str)
def test_float32_rounding_of_every_family(family: tiny.Family) -> None:
    # What a user runs; the tables of the documentation are measured the same way.
    case = build(family)
    inputs = case.batch("ragged")
    for name in ("divprune", "divprune+fastv"):
        assert prefill_error(case, method(name), inputs)[0] <= tolerance(case)
        assert decode_error(case, method(name), inputs) <= tolerance(case)


@over_matrix(methods=DROPPING, families=EXACT, attentions=("sdpa",))
def test_decoding_equals_masking(family: tiny.Family, method: Method, attention: str) -> None:
    case = sharp_borrowed(family, attention)
    assert decode_error(case, method, case.batch("ragged"), FEW) <= tolerance(case)


@over_matrix(methods=COMPOSED, families=EXACT)
def test_decoding_of_other_batches_equals_masking(family: tiny.Family, method: Method, attention: str) -> None:
    case = sharp_borrowed(family, attention)
    kinds = ("single", "no_image_row") if attention == "sdpa" else ("ragged", "two_images")
    errors = {kind: decode_error(case, method, case.batch(kind)) for kind in kinds}
    assert max(errors.values()) <= tolerance(case), errors


@over_matrix(methods=DROPPING, families=HYBRID)
def test_hybrid_decoders_equal_packed_rows(family: tiny.Family, method: Method, attention: str) -> None:
    # Linear attention: a masked token still decays the state, so the reference is a model that never had the token.
    case = sharp_borrowed(family, attention)
    for kind in ("single", "ragged", "no_image_row", "mixed"):
        error = hybrid_error(case, method, case.batch(kind))
        assert error <= tolerance(case), (kind, error)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma"])
def test_any_decoder_layer(name: str, layer: int) -> None:
    case = sharp(tiny.family(name))
    stage = Method("fastv", (vtc.CompressionConfig("fastv", keep_ratio=0.5, options={"layer": layer}),), decoder=True)
    inputs = case.batch("ragged")
    assert prefill_error(case, stage, inputs)[0] <= tolerance(case)
    assert decode_error(case, stage, inputs) <= tolerance(case)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "paligemma"])
def test_three_stages_compose(name: str) -> None:
    configs = (
        vtc.CompressionConfig("random", keep_ratio=0.8),
        vtc.CompressionConfig("fastv", keep_ratio=0.7, options={"layer": 1}),
        vtc.CompressionConfig("fastv", keep_ratio=0.5, options={"layer": 3}),
    )
    case, stages = sharp(tiny.family(name)), Method("three", configs, decoder=True)
    for kind in ("single", "ragged"):
        inputs = case.batch(kind)
        assert prefill_error(case, stages, inputs)[0] <= tolerance(case), kind
        assert decode_error(case, stages, inputs) <= tolerance(case), kind


@over_matrix(methods=tuple(m for m in METHODS if not m.tower), families=tiny.WINDOWED, attentions=("sdpa",))
def test_sliding_windows_reach_as_far_as_without_compression(
    family: tiny.Family, method: Method, attention: str
) -> None:
    # The reference runs without a cache: what a sliding cache forgets is then only a matter of the mask.
    case = sharp_borrowed(family)
    for kind in ("single", "ragged"):
        inputs = case.batch(kind)
        assert inputs["input_ids"].shape[1] > tiny.WINDOW
        assert prefill_error(case, method, inputs)[0] <= tolerance(case), kind
        with method.on(case.model):
            ours = case.model.generate(**inputs, **GREEDY)
            report = vtc.report(case.model)
        expected = reference.Reference.of(case.model, inputs, report)
        theirs = expected.logits_at_once(reference.answers(ours, inputs))
        error = reference.max_error(reference.stacked_logits(ours), theirs)
        assert error <= tolerance(case), (kind, error)


@pytest.mark.parametrize("kind", ["single", "ragged"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_merged_tokens_are_their_averages(name: str, kind: str) -> None:
    case = sharp(tiny.family(name))
    merging = Method("aim", (vtc.CompressionConfig("aim", keep_ratio=0.5, options={"l1": 1, "l2": 3}),), decoder=True)
    inputs = case.batch(kind)
    assert prefill_error(case, merging, inputs)[0] <= tolerance(case)
    assert decode_error(case, merging, inputs) <= tolerance(case)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "llava_onevision_video", "video_llava"])
def test_structural_tokens_stay_or_go_as_asked(name: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    structural = reference.structural_columns(case.model, inputs)
    assert structural.any()
    for choice in ("keep", "drop"):
        stages = (vtc.CompressionConfig("uniform", keep_ratio=0.5, structural=choice),)
        with torch.no_grad(), vtc.compressed(case.model, stages[0]) as model:
            ours = model(**inputs).logits
            report = vtc.report(model)
        expected = reference.Reference.of(case.model, inputs, report)
        assert bool(expected.visible[structural].all()) == (choice == "keep")
        assert choice == "keep" or not expected.visible[structural].any()
        with torch.no_grad():
            theirs = expected.prefill().logits
        assert reference.max_error(ours[expected.visible], theirs[expected.visible]) <= tolerance(case)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "idefics3", "gemma3"])
def test_compact_positions_equal_masking_with_renumbered_positions(name: str) -> None:
    # Without position ids of its own, generate() numbers the unmasked tokens: exactly what "compact" promises.
    case = sharp(tiny.family(name))
    compact = Method("compact", (vtc.CompressionConfig("divprune", keep_ratio=0.5, positions="compact"),))
    for kind in ("single", "ragged"):
        inputs = case.batch(kind)
        with compact.on(case.model):
            ours = case.model.generate(**inputs, **GREEDY)
            report = vtc.report(case.model)
        expected = reference.Reference.of(case.model, inputs, report)
        theirs = case.model.generate(**{**inputs, "attention_mask": expected.attention_mask}, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences), kind
        error = reference.max_error(reference.stacked_logits(ours), reference.stacked_logits(theirs))
        assert error <= tolerance(case), (kind, error)


def test_original_and_compact_positions_differ() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    logits = []
    for positions in ("original", "compact"):
        with torch.no_grad(), vtc.compressed(case.model, "divprune", keep_ratio=0.5, positions=positions) as model:
            logits.append(model(**inputs).logits[:, -1])
    assert reference.max_error(*logits) > 0.1


def test_the_reference_would_notice_one_token() -> None:
    # A tolerance means nothing unless the error of interest is far above it.
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    with torch.no_grad(), method("divprune").on(case.model) as model:
        ours = model(**inputs).logits
        report = vtc.report(model)
    expected = reference.Reference.of(case.model, inputs, report)
    seen = expected.visible.clone()
    for row in range(len(seen)):
        dropped = (inputs["attention_mask"][row].bool() & ~seen[row]).nonzero().flatten()
        keep = expected.keep[reference.BEFORE_LM].clone()
        keep[row, dropped[-1]] = True
        other = reference.Reference(case.model, inputs, {reference.BEFORE_LM: keep})
        with torch.no_grad():
            assert reference.max_error(ours[row, -1], other.prefill().logits[row, -1]) > 1e-3
