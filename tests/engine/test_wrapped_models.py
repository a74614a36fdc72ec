"""Models that other libraries have changed, copied or saved: they work, before and after compress()."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed.fsdp
from torch import nn

import vtc
from tests import reference, tiny
from tests.invariants.matrix import REPRESENTATIVES, Method, build, method, over_representatives, sharp, tolerance

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


# -------------------------------------------------------------------------------- wrappers around the whole model


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _sharded(model: Any) -> Any:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.language_model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


def _flat(model: Any) -> Any:
    return torch.distributed.fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "data parallel on one device": nn.DataParallel,
    "fsdp": _flat,
    "fully_shard": _sharded,
    "peft": lambda model: peft.get_peft_model(model, adapters()),
    "accelerate": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["divprune", "divprune+fastv"])
@pytest.mark.usefixtures("process_group")
@torch.no_grad()
def test_verbs_act_through_wrappers(wrapper: str, name: str) -> None:
    torch.manual_seed(3)
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    wrapped = WRAPPERS[wrapper](case.model).eval()
    plain = wrapped(**inputs).logits
    method(name).compress(wrapped)
    packed = wrapped(**inputs).logits
    assert torch.equal(packed, case.model(**inputs).logits)
    assert not torch.equal(packed, plain)
    for model in (wrapped, case.model):
        assert vtc.is_compressed(model)
        assert len(vtc.report(model).segments) == 3
    with vtc.disabled(wrapped):
        assert torch.equal(wrapped(**inputs).logits, plain)
    vtc.restore(wrapped)
    assert not vtc.is_compressed(case.model)
    assert torch.equal(wrapped(**inputs).logits, plain)


@pytest.mark.usefixtures("process_group")
@torch.no_grad()
def test_verbs_act_through_compiled_models() -> None:
    # Compiled code does not look at hooks again: it has to be dropped when they change.
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    wrapped = torch.compile(case.model, backend="eager")
    plain = wrapped(**inputs).logits
    around = nn.parallel.DistributedDataParallel(wrapped)
    method("divprune+fastv").compress(around)
    assert torch.equal(wrapped(**inputs).logits, case.model(**inputs).logits)
    for model in (around, wrapped, case.model):
        assert vtc.is_compressed(model)
        assert len(vtc.report(model).segments) == 1
    vtc.restore(around)
    assert not vtc.is_compressed(case.model)
    torch.testing.assert_close(wrapped(**inputs).logits, plain)


@pytest.mark.parametrize(("compiled", "name"), [("model", "vtc-cls"), ("layers", "divprune+fastv")])
@torch.no_grad()
def test_compiled_in_place(compiled: str, name: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    with method(name).on(case.model) as model:
        packed = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    torch.compiler.reset()
    for module in [case.model] if compiled == "model" else case.model.model.language_model.layers:
        module.compile(backend="eager")
    plain = case.model(**inputs).logits
    with method(name).on(case.model) as model:  # compiled code exists, and knows nothing of the hooks
        torch.testing.assert_close(model(**inputs).logits, packed)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    torch.testing.assert_close(case.model(**inputs).logits, plain)


@torch.no_grad()
def test_a_tower_compiled_by_itself_hides_its_attention() -> None:
    case = build(tiny.family("llava"))
    case.model.model.vision_tower.compile(backend="eager")
    with method("vtc-cls").on(case.model) as model, pytest.raises(vtc.StateError, match="compiled by itself"):
        model(**case.batch("single"))


def _compiled_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def _compiled_decoder(model: Any) -> None:
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")


@pytest.mark.parametrize("compile_part", [_compiled_forward, _compiled_decoder])
@torch.no_grad()
def test_parts_that_compiled_ones_replace(compile_part: Callable[[Any], None]) -> None:
    case, untouched = build(tiny.family("llava")), build(tiny.family("llava"))
    inputs = case.batch("single")
    with method("divprune+fastv").on(untouched.model) as model:
        packed = model(**inputs).logits
    torch.compiler.reset()
    compile_part(case.model)
    plain = case.model(**inputs).logits
    method("divprune+fastv").compress(case.model)
    torch.testing.assert_close(case.model(**inputs).logits, packed)
    assert vtc.is_compressed(case.model)
    assert vtc.report(case.model).visual_tokens_after < 16
    vtc.restore(case.model)
    assert not vtc.is_compressed(case.model)
    torch.testing.assert_close(case.model(**inputs).logits, plain)


def test_what_compiling_makes_unreachable_is_refused_by_every_verb() -> None:
    inner, twice = build(tiny.family("llava")).model, build(tiny.family("llava")).model
    inner.model = torch.compile(inner.model, backend="eager")
    twice = torch.compile(torch.compile(twice, backend="eager"), backend="eager")  # a function, no model
    verbs = (functools.partial(vtc.compress, keep_ratio=0.5), vtc.restore, vtc.report, vtc.is_compressed)
    for model, said in ((inner, "LlavaModel inside .* compiled by itself"), (twice, "function is not a transformers")):
        for verb in verbs:
            with pytest.raises(vtc.UnsupportedModelError, match=said):
                verb(model)


@pytest.mark.filterwarnings("ignore")  # transformers' own, for what its models do with shapes
@pytest.mark.parametrize("way", ["trace", "export"])
def test_a_graph_of_what_one_picture_keeps_is_not_made(way: str) -> None:
    class Logits(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> Any:
            return self.model(input_ids=ids, pixel_values=pixels, use_cache=False).logits

    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    given = inputs["input_ids"], inputs["pixel_values"]
    logits = Logits(case.model).eval()

    def record() -> Any:
        if way == "trace":
            return torch.jit.trace(logits, given, check_trace=False)
        return torch.export.export(logits, given, strict=False).module()

    method("divprune").compress(case.model)
    with pytest.raises(vtc.StateError, match="cannot be traced or exported"):
        record()
    other = given[0], given[1].flip(-1)
    with vtc.disabled(case.model), torch.no_grad():
        torch.testing.assert_close(record()(*other), logits(*other))


def test_a_wrapper_that_copies_the_model_is_refused() -> None:
    wrapped = nn.DataParallel(build(tiny.family("llava")).model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(vtc.UnsupportedModelError, match="DataParallel copies"):
        vtc.compress(wrapped, "random", keep_ratio=0.5)


@pytest.mark.parametrize("part", ["model", "model.language_model"])
def test_a_part_of_a_compressed_model(part: str) -> None:
    case = build(tiny.family("llava"))
    inner = case.model.get_submodule(part)
    inputs = case.batch("single")
    method("divprune").compress(case.model)
    packed = answer(case.model, inputs)
    with pytest.raises((vtc.StateError, vtc.UnsupportedModelError)):
        vtc.compress(inner, "random", keep_ratio=0.5)
    assert torch.equal(answer(case.model, inputs), packed)
    vtc.restore(case.model)
    if part == "model":
        method("divprune").compress(inner)
        with pytest.raises(vtc.StateError, match="LlavaModel is compressed already"):
            vtc.compress(case.model, "random", keep_ratio=0.5)
        assert torch.equal(answer(case.model, inputs), packed)
        assert vtc.is_compressed(case.model)
        vtc.restore(case.model)
        assert not vtc.is_compressed(inner)


# ------------------------------------------------------------------------------------------- pickles and wrappers


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3"])  # transformers' own hooks on others cannot be
def test_a_pickled_model_stays_compressed(name: str, ran: bool) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    method("divprune+fastv").compress(case.model)
    file = io.BytesIO()
    if ran:
        answer(case.model, inputs)
    torch.save(case.model, file)
    packed = answer(case.model, inputs)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(answer(loaded, inputs), packed)
    vtc.restore(loaded)
    assert vtc.is_compressed(case.model)
    with vtc.disabled(case.model):
        assert torch.equal(answer(loaded, inputs), answer(case.model, inputs))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["generate", "prepare_inputs_for_generation", "model.get_image_features", "model.forward"]
)
def test_what_others_put_before_a_method_survives(name: str, when: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    with method("divprune").on(case.model) as model:
        packed = answer(model, inputs)
    plain = answer(case.model, inputs)
    *path, attribute = name.split(".")
    owner = case.model.get_submodule(".".join(path))
    calls = []

    def put() -> Callable[..., Any]:
        inner = getattr(owner, attribute)

        @functools.wraps(inner)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(attribute)
            return inner(*args, **kwargs)

        setattr(owner, attribute, theirs)
        return theirs

    theirs = put() if when == "before" else None
    method("random").compress(case.model)
    method("divprune").compress(case.model)
    theirs = theirs or put()
    assert torch.equal(answer(case.model, inputs), packed)
    method("fastv").compress(case.model)
    method("divprune").compress(case.model)
    assert torch.equal(answer(case.model, inputs), packed)
    vtc.restore(case.model)
    assert owner.__dict__[attribute] is theirs
    assert calls
    calls.clear()
    assert torch.equal(answer(case.model, inputs), plain)
    assert calls
