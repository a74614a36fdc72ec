"""What cannot work exactly is refused by name, before anything is changed, and the message says what to do."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers

import vtc
from tests import tiny
from tests.invariants.matrix import PREFILLS_IN_CHUNKS, build, method

NO_CLS = tuple(family for family in tiny.FAMILIES if not family.cls)


@pytest.mark.parametrize("family", NO_CLS, ids=str)
def test_cls_attention_of_a_tower_without_cls(family: tiny.Family) -> None:
    model = build(family).model
    with pytest.raises(vtc.UnsupportedMethodError, match=r"vtc-cls needs cls_attention.*\[CLS\]"):
        vtc.compress(model, "vtc-cls", keep_ratio=0.5)
    assert "not on this model" in vtc.list_methods(model)["vtc-cls"]
    assert not vtc.is_compressed(model)


def test_an_unknown_family() -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(vtc.UnsupportedModelError, match=r"'llama'.*llava"):
        vtc.compress(transformers.LlamaForCausalLM(config), "divprune", keep_ratio=0.5)


def test_a_module_that_is_no_model() -> None:
    with pytest.raises(vtc.UnsupportedModelError, match="Linear"):
        vtc.compress(torch.nn.Linear(2, 2), "divprune", keep_ratio=0.5)


def test_decoder_stages_of_a_hybrid_decoder() -> None:
    model = build(tiny.family("qwen3_5")).model
    with pytest.raises(vtc.UnsupportedMethodError, match=r"fastv.*qwen3_5"):
        vtc.compress(model, "fastv", keep_ratio=0.5)
    assert "not on this model" in vtc.list_methods(model)["fastv"]
    assert "not on this model" not in vtc.list_methods(model)["divprune"]


@pytest.mark.skipif(not PREFILLS_IN_CHUNKS, reason="this release cannot split a prompt with images")
@pytest.mark.parametrize("family_name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ["fastv", "divprune+fastv"])
def test_text_attention_of_a_prompt_in_pieces(family_name: str, name: str) -> None:
    case = build(tiny.family(family_name))
    with (
        method(name).on(case.model) as model,
        pytest.raises(vtc.UnsupportedMethodError, match=r"fastv.*prefill_chunk_size"),
    ):
        model.generate(**case.batch("ragged"), max_new_tokens=2, prefill_chunk_size=7)


def test_compact_positions_of_triples() -> None:
    model = build(tiny.family("qwen2_5_vl")).model
    with pytest.raises(vtc.ConfigError, match="compact"):
        vtc.compress(model, "divprune", keep_ratio=0.5, positions="compact")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "divprun", "keep_ratio": 0.5}, "divprune"),
        ({"method": "divprune"}, "keep_ratio"),
        ({"method": "divprune", "keep_ratio": 0.5, "keep_tokens": 3}, "keep_tokens"),
        ({"method": "divprune", "keep_ratio": 1.5}, "keep_ratio"),
        ({"method": "divprune", "keep_ratio": float("nan")}, "keep_ratio"),
        ({"method": "divprune", "keep_tokens": 0}, "keep_tokens"),
        ({"method": "fastv", "keep_ratio": 0.5, "layer": 0}, "layer"),
        ({"method": "fastv", "keep_ratio": 0.5, "layer": 4}, "4"),
        ({"method": "fastv", "keep_ratio": 0.5, "layers": 2}, "layers"),
        ({"method": "vtc-cls", "keep_ratio": 0.5, "start_layer": 3}, "start_layer"),
        ({"method": "divprune", "keep_ratio": 0.5, "positions": "new"}, "positions"),
        ({"method": "divprune", "keep_ratio": 0.5, "structural": "maybe"}, "structural"),
        ({"method": []}, "CompressionConfig"),
        ({"method": [vtc.CompressionConfig("divprune", keep_ratio=0.5)], "keep_ratio": 0.5}, "keep_ratio"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises(vtc.VtcError, match=match):
        vtc.compress(model, **arguments)
    assert not vtc.is_compressed(model)


def test_stages_out_of_order() -> None:
    model = build(tiny.family("llava")).model
    stages = [
        vtc.CompressionConfig("fastv", keep_ratio=0.5, options={"layer": 2}),
        vtc.CompressionConfig("divprune", keep_ratio=0.5),
    ]
    with pytest.raises(vtc.ConfigError, match="order"):
        vtc.compress(model, stages)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_broken_pixels_are_named(name: str) -> None:
    case = build(tiny.family(name))
    inputs = case.batch("single")
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], torch.nan)
    with method("divprune").on(case.model) as model, torch.no_grad(), pytest.raises(vtc.InputError, match="features"):
        model(**inputs)


@torch.no_grad()
def test_a_ready_made_mask() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with method("divprune").on(case.model) as model:
        with pytest.raises(vtc.InputError, match="mask"):
            model(**inputs)
        with vtc.disabled(model):
            model(**inputs)


@torch.no_grad()
def test_another_feature_layer_than_was_planned_for() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    with vtc.compressed(case.model, "vtc-cls", keep_ratio=0.5, start_layer=1) as model:
        model(**inputs)
        with pytest.raises(vtc.StateError, match=r"tower layer 1, but .* call compress"):
            model(**inputs, vision_feature_layer=-3)
        model.config.vision_feature_layer = -3
        with pytest.raises(vtc.StateError, match=r"tower layer 1, but .* call compress"):
            model(**inputs)
    with vtc.compressed(case.model, "vtc-cls", keep_ratio=0.5, start_layer=1) as model:
        model(**inputs)


def _pictures_alone(case: tiny.TinyCase) -> dict[str, torch.Tensor]:
    inputs = case.collate([tiny.Row(0, 0, ((None, 0),), 0)])
    visual = inputs["input_ids"][0] == tiny.IMAGE
    return {key: value[:, visual] if value.shape[:2] == (1, len(visual)) else value for key, value in inputs.items()}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "paligemma"])
@pytest.mark.parametrize("mode", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_a_prompt_that_ends_with_a_picture(family: str, mode: dict[str, object]) -> None:
    # What is dropped has no hidden state, and so nothing that an answer could be predicted from.
    case = build(tiny.family(family))
    inputs = _pictures_alone(case)
    count = inputs["input_ids"].shape[1]
    for at in ("decoder", "decoder:2"):
        outcomes = set()
        for seed in range(6):
            with vtc.compressed(case.model, "random", keep_ratio=0.5, seed=seed, at=at) as model:
                model(**inputs)  # a prefix of something, for all that a forward pass knows
                kept = count - 1 in vtc.report(model).segments[0].kept
                outcomes.add(kept)
                refused = pytest.raises(vtc.InputError, match="ends with an image or video")
                with contextlib.nullcontext() if kept else refused:
                    model.generate(**inputs, max_new_tokens=3, do_sample=False, **mode)
        assert outcomes == {True, False}


def test_the_last_token_may_leave_the_cache() -> None:
    case = build(tiny.family("llava"))
    with vtc.compressed(case.model, "random", keep_tokens=1, at="cache") as model:
        model.generate(**_pictures_alone(case), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "paligemma"])
def test_aim_leaves_nothing_of_a_prompt_without_text(family: str) -> None:
    case = build(tiny.family(family))
    inputs = _pictures_alone(case)
    plain = case.model(**inputs).logits
    with vtc.compressed(case.model, "aim", keep_ratio=0.4) as model:
        assert not model(**inputs).logits.any()  # as wherever a token was dropped
        with pytest.raises(vtc.InputError, match="ends with an image"):
            model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(case.model(**inputs).logits, plain)
