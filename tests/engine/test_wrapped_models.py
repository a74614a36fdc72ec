"""Models that other libraries have changed, copied or saved: they work, before and after compress()."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn

import vtc
from tests import reference, tiny
from tests.invariants.matrix import REPRESENTATIVES, Method, method, over_representatives, sharp, tolerance

SAY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return reference.stacked_logits(model.generate(**inputs, **SAY))


def error_to_masking(model: Any, untouched: Any, inputs: dict[str, Any]) -> float:
    """Difference of a compressed model's answer to the masked reference on `untouched`, which has the same weights."""
    ours = model.generate(**inputs, **SAY)
    expected = reference.Reference.of(untouched, inputs, vtc.report(model))
    assert expected.visible.sum() < inputs["attention_mask"].sum()
    theirs = expected.logits_along(reference.answers(ours, inputs))
    return reference.max_error(reference.stacked_logits(ours), theirs)


# -------------------------------------------------------------------------------------------------------- copies


@over_representatives("vtc-cls", "divprune", "divprune+fastv")
def test_a_copy_of_a_compressed_model_lives_its_own_life(family: tiny.Family, method: Method) -> None:
    case = sharp(family)
    inputs = case.batch("ragged")
    plain = answer(case.model, inputs)
    method.compress(case.model)
    packed = answer(case.model, inputs)

    copied = copy.deepcopy(case.model)
    assert vtc.is_compressed(copied)
    assert torch.equal(answer(copied, inputs), packed)
    vtc.restore(copied)
    assert torch.equal(answer(copied, inputs), plain)
    assert torch.equal(answer(case.model, inputs), packed)

    other = copy.deepcopy(case.model)
    vtc.restore(case.model)
    assert torch.equal(answer(case.model, inputs), plain)
    assert torch.equal(answer(other, inputs), packed)
    case.model.get_decoder().layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(answer(other, inputs), packed)


def test_a_copy_outlives_its_original() -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    original = copy.deepcopy(case.model)
    method("divprune+fastv").compress(original)
    packed = answer(original, inputs)
    copied = copy.deepcopy(original)
    del original
    gc.collect()
    assert torch.equal(answer(copied, inputs), packed)
    vtc.restore(copied)
    assert torch.equal(answer(copied, inputs), answer(case.model, inputs))


def test_a_forgotten_compressed_model_leaves_no_trace() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    gc.collect()
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    case = sharp(tiny.family("llava"))
    method("divprune+fastv").compress(case.model)
    answer(case.model, case.batch("ragged"))
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) != before
    del case
    gc.collect()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_saving_a_compressed_model_saves_the_untouched_one(name: str, tmp_path: Path) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    plain = answer(case.model, inputs)
    case.model.save_pretrained(tmp_path / "before")
    with method("divprune+fastv").on(case.model) as model:
        model(**inputs)
        model.save_pretrained(tmp_path / "while")
    for file in ("config.json", "generation_config.json"):
        before, now = ((tmp_path / folder / file).read_text() for folder in ("before", "while"))
        assert json.loads(before) == json.loads(now)
    assert {path.name for path in (tmp_path / "while").iterdir()} == {p.name for p in (tmp_path / "before").iterdir()}

    loaded = type(case.model).from_pretrained(tmp_path / "while", dtype=case.model.dtype).eval()
    assert not vtc.is_compressed(loaded)
    assert torch.equal(answer(loaded, inputs), plain)
    with method("divprune+fastv").on(loaded), method("divprune+fastv").on(case.model):
        assert torch.equal(answer(loaded, inputs), answer(case.model, inputs))


# ---------------------------------------------------------------------------------------------------------- PEFT


def adapters() -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, target_modules=r".*(layers|blocks|layer)\.\d+\..*(q_proj|v_proj|qkv)", init_lora_weights=False
    )


@pytest.mark.parametrize("order", ["lora-first", "compress-first"])
@over_representatives("vtc-cls", "divprune", "divprune+fastv")
def test_lora(family: tiny.Family, method: Method, order: str) -> None:
    case, untouched = sharp(family), sharp(family)
    inputs = case.batch("ragged")
    torch.manual_seed(3)
    if order == "lora-first":
        wrapped = peft.get_peft_model(case.model, adapters())
        assert method.compress(wrapped) is wrapped
    else:
        method.compress(case.model)
        wrapped = peft.get_peft_model(case.model, adapters())
    torch.manual_seed(3)
    expected = peft.get_peft_model(untouched.model, adapters())
    wrapped.eval()
    expected.eval()
    assert vtc.is_compressed(wrapped)
    assert error_to_masking(wrapped, expected.get_base_model(), inputs) <= tolerance(case)
    with wrapped.disable_adapter(), expected.disable_adapter():
        assert error_to_masking(wrapped, expected.get_base_model(), inputs) <= tolerance(case)
    vtc.restore(wrapped)
    assert torch.equal(answer(wrapped, inputs), answer(expected, inputs))


def test_lora_is_trained_through_a_compressed_model() -> None:
    case = sharp(tiny.family("qwen2_5_vl"))
    inputs = case.batch("ragged")
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    wrapped = peft.get_peft_model(case.model, adapters())
    with method("divprune+fastv").on(wrapped):
        wrapped.train()
        wrapped(**inputs, labels=labels, use_cache=False).loss.backward()
    moved = [p for name, p in wrapped.named_parameters() if "lora_" in name and p.grad is not None and p.grad.any()]
    assert len(moved) >= 4


# ---------------------------------------------------------------------------------------- replaced Linear layers


class Int8Linear(nn.Module):
    """A Linear as weight-only quantisation replaces it: other class, int8 buffers, no `weight` parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, Int8Linear(child))


@pytest.mark.parametrize("when", ["before", "after"])
@over_representatives("vtc-cls", "divprune", "divprune+fastv")
def test_replaced_linear_layers(family: tiny.Family, method: Method, when: str) -> None:
    case, untouched = sharp(family), sharp(family)
    quantise(untouched.model)
    if when == "before":
        quantise(case.model)
    method.compress(case.model)
    if when == "after":
        quantise(case.model)
    assert any(isinstance(module, Int8Linear) for module in case.model.get_decoder().modules())
    assert error_to_masking(case.model, untouched.model, case.batch("ragged")) <= tolerance(case)
    vtc.restore(case.model)
    assert torch.equal(answer(case.model, case.batch("ragged")), answer(untouched.model, case.batch("ragged")))


# ----------------------------------------------------------------------------------------- accelerate's dispatch


def one_device(model: Any) -> None:
    accelerate.dispatch_model(model, device_map={"": "cpu"}, main_device="cpu", force_hooks=True)


def weights_brought_in_when_needed(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=False)


@pytest.mark.parametrize("dispatch", [one_device, weights_brought_in_when_needed])
@pytest.mark.parametrize("when", ["before", "after"])
@over_representatives("vtc-cls", "divprune+fastv")
def test_accelerate_hooks(family: tiny.Family, method: Method, dispatch: Callable[[Any], None], when: str) -> None:
    case, untouched = sharp(family), sharp(family)
    if when == "before":
        dispatch(case.model)
    method.compress(case.model)
    if when == "after":
        dispatch(case.model)
    assert any(hasattr(module, "_hf_hook") for module in case.model.modules())
    assert error_to_masking(case.model, untouched.model, case.batch("ragged")) <= tolerance(case)
    vtc.restore(case.model)
    assert torch.equal(answer(case.model, case.batch("ragged")), answer(untouched.model, case.batch("ragged")))
