"""`crosslmm` and `vision-remember`: pooling, and modules inside the decoder that bring back what it has lost."""

from __future__ import annotations

import copy
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import vtc
from tests import learned, tiny
from tests.invariants.matrix import PREFILLS_IN_CHUNKS
from vtc.engine.install import adapter_for, engine_of
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.selectors.learned import save_modules
from vtc.selectors.learned.crosslmm import CrossAttentions
from vtc.selectors.learned.vision_remember import LocalAttention
from vtc.selectors.pool import PoolSelector

METHODS = tuple(learned.UPDATING)
FAMILIES = ("llava", "internvl", "qwen2_5_vl", "qwen3_vl")

each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> tiny.TinyCase:
    return tiny.build(getattr(request, "param", "llava"))


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def answers(model: Any, inputs: dict[str, Any], **given: Any) -> torch.Tensor:
    """What is generated, and the scores of every step as text would show them."""
    made = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, **given
    )
    return torch.stack(made.logits, dim=1)


@each_method
@pytest.mark.parametrize("family", tiny.FAMILIES, ids=str)
def test_in_every_family_it_begins_as_pooling_and_a_batch_equals_its_rows(
    family: tiny.Family, method: str, tmp_path: Path
) -> None:
    case = tiny.build(family.name)
    model, inputs = case.model, case.batch("ragged")
    with vtc.compressed(model, "pool", keep_tokens=3):
        pooled = logits(model, inputs)
    begun = learned.updating(model, method, tmp_path / "begun", noise=0.0)
    with vtc.compressed(model, method, modules=begun, keep_tokens=3):
        assert torch.equal(logits(model, inputs), pooled)
    vtc.compress(model, method, modules=learned.updating(model, method, tmp_path / "trained"), keep_tokens=3)
    out = logits(model, inputs)
    assert not torch.allclose(out, pooled, atol=0.1)
    for row, alone in enumerate(case.rows("ragged")):
        torch.testing.assert_close(logits(model, alone)[0, -1], out[row, -1], rtol=1e-4, atol=1e-4)


@each_method
@pytest.mark.parametrize("case", ["llava", "qwen3_vl"], indirect=True)
def test_untrained_it_generates_what_pooling_does(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    folder = learned.updating(case.model, method, tmp_path / "begun", noise=0.0)
    trained = learned.updating(case.model, method, tmp_path / "trained")
    for kind in ("single", "two_images"):
        inputs = case.batch(kind)
        with vtc.compressed(case.model, "pool", keep_tokens=4):
            pooled, steps = logits(case.model, inputs), answers(case.model, inputs)
        with vtc.compressed(case.model, method, modules=folder, keep_tokens=4):
            assert torch.equal(logits(case.model, inputs), pooled)
            assert torch.equal(answers(case.model, inputs), steps)
        with vtc.compressed(case.model, method, modules=trained, keep_tokens=4):
            assert not torch.allclose(logits(case.model, inputs), pooled, atol=0.1)


@each_method
@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_all_ways_of_generating_agree(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    """With a cache, without one, in a batch, in rows, in a static cache, in chunks and with beams."""
    model = case.model
    batch = case.batch("ragged")

    def beams(**given: Any) -> torch.Tensor:
        made = model.generate(**batch, max_new_tokens=5, num_beams=3, num_return_sequences=3, **given)
        return made[:, batch["input_ids"].shape[1] :]

    alike = torch.equal(beams(), beams(use_cache=False))  # not in transformers 5.18, whatever the model
    vtc.compress(model, method, modules=learned.updating(model, method, tmp_path), keep_tokens=4)
    together = answers(model, batch)
    for row, inputs in enumerate(case.rows("ragged")):
        torch.testing.assert_close(answers(model, inputs)[0], together[row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers(model, batch, use_cache=False), together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers(model, batch, cache_implementation="static"), together, rtol=1e-4, atol=1e-4)
    if PREFILLS_IN_CHUNKS:
        torch.testing.assert_close(answers(model, batch, prefill_chunk_size=7), together, rtol=1e-4, atol=1e-4)
    if alike:
        assert torch.equal(beams(), beams(use_cache=False))


@pytest.mark.parametrize("kind", ["visual", "text"])
def test_hidden_states_are_those_of_hooks_on_the_untouched_model(
    case: tiny.TinyCase, kind: str, tmp_path: Path
) -> None:
    """The untouched model, given pooled tokens, masks and hooks on its layers that add the attention, says the same."""
    model, inputs, adapter = case.model, case.batch("single"), adapter_for(case.model)
    folder = learned.updating(model, "crosslmm", tmp_path)
    vtc.compress(model, "crosslmm", modules=folder, keep_tokens=4)
    module: Any = engine_of(model).plan.stages[0].selector.module
    other = module.text if kind == "visual" else module.visual
    for attention in other:
        attention.gate.data.zero_()
    out = logits(model, inputs)
    (segment,) = vtc.report(model).segments
    vtc.restore(model)
    columns = adapter.placeholders(inputs["input_ids"], "image")[0].nonzero()[:, 0]
    kept, first = columns[segment.kept], int(columns[0])
    mask = inputs["attention_mask"].clone()
    mask[0, columns] = 0
    mask[0, kept] = 1
    seen: dict[str, Any] = {}

    def pool(module_: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        context = vtc.VisualContext(embeds[0, columns], 4, torch.Generator(), segment.grids)
        seen.update(module.remember(embeds[0, columns], context.coords()))
        embeds[0, kept] = PoolSelector().select(context).merge(embeds[0, columns])
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask}

    def look(layer: int) -> Any:
        def hook(module_: Any, args: Any, kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            rows = kept if kind == "visual" else torch.arange(int(columns[-1]) + 1, hidden.shape[1])
            hidden[0, rows] += module(kind, layer, hidden[0, rows], seen[f"{kind} {layer}"])
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    handles = [adapter.text_model.register_forward_pre_hook(pool, with_kwargs=True)]
    for layer in module.layers:
        handles.append(adapter.text_model.layers[layer].register_forward_pre_hook(look(layer), with_kwargs=True))
    with torch.no_grad():
        expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    text = torch.ones(mask.shape[1], dtype=torch.bool)
    text[columns] = False
    torch.testing.assert_close(out[0, text], expected[0, text], rtol=1e-4, atol=2e-5)
    assert first > 0, "there is text in front of the picture, which sees nothing of it"


def test_local_attention_is_softmax_within_each_cell() -> None:
    torch.manual_seed(0)
    local = LocalAttention(8, 12, 8, 2)
    local.out.weight.data.normal_()
    hidden, features, codes = torch.randn(3, 8), torch.randn(10, 12), torch.randn(10, 12)
    owner = torch.tensor([0, 1, 2, 1, -1, 0, 0, 2, 2, 1])
    found = local(hidden, local.remember(features, codes), owner)
    for row in range(3):
        mine = owner == row
        query = local.query(local.ln_q(hidden[row])).view(2, 4)
        keys, values = local.key((features + codes)[mine]).view(-1, 2, 4), local.value(features[mine]).view(-1, 2, 4)
        share = (torch.einsum("hd,nhd->nh", query, keys) / math.sqrt(4)).softmax(dim=0)
        expected = local.out(torch.einsum("nh,nhd->hd", share, values).flatten())
        torch.testing.assert_close(found[row], expected)


def test_cross_attention_is_softmax_behind_a_gate() -> None:
    torch.manual_seed(0)
    module = CrossAttentions(8, [1], 8, 2)
    attention: Any = module.text[0]
    attention.gate.data.fill_(0.5)
    hidden, x, coords = torch.randn(3, 8), torch.randn(5, 8), torch.randint(0, 4, (5, 4))
    sees = torch.tensor([[True] * 5, [True, True, False, False, False], [False, False, True, True, True]])
    remembered = module.remember(x, coords)["text 1"]
    found = module("text", 1, hidden, remembered, sees)
    keys, values = (part.view(5, 2, 4) for part in remembered)
    query = attention.query(attention.ln_q(hidden)).view(3, 2, 4)
    scores = torch.einsum("thd,nhd->thn", query, keys) / math.sqrt(4)
    share = scores.masked_fill(~sees[:, None], -torch.inf).softmax(dim=-1)
    expected = math.tanh(0.5) * attention.out(torch.einsum("thn,nhd->thd", share, values).flatten(1))
    torch.testing.assert_close(found, expected)


@each_method
def test_a_token_sees_the_pictures_in_front_of_it(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    """What a later picture shows changes nothing in front of it."""
    model, inputs = case.model, case.rows("two_images")[0]
    vtc.compress(model, method, modules=learned.updating(model, method, tmp_path), keep_tokens=4)
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][-1] = -other["pixel_values"][-1]
    before, after = logits(model, inputs), logits(model, other)
    columns = adapter_for(model).placeholders(inputs["input_ids"], "image")[0].nonzero()[:, 0]
    second = int(columns[len(columns) // 2])
    torch.testing.assert_close(before[0, :second], after[0, :second])
    assert not torch.allclose(before[0, second:], after[0, second:], atol=1e-2)


@each_method
def test_a_second_turn_remembers_the_picture(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    """What was remembered stays with the cache: a second turn equals the whole conversation read at once."""
    model, inputs = case.model, case.batch("single")
    vtc.compress(model, method, modules=learned.updating(model, method, tmp_path), keep_tokens=4)
    more = torch.tensor([[11, 12, 13]])
    both = {**inputs, "input_ids": torch.cat([inputs["input_ids"], more], dim=1)}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    whole = logits(model, both)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for given in (cache, copy.deepcopy(cache)):
            turn = model(input_ids=more, attention_mask=both["attention_mask"], past_key_values=given).logits
            torch.testing.assert_close(turn, whole[:, -3:], rtol=1e-4, atol=1e-4)


def test_steps_on_a_static_cache_are_updated_when_compiled(case: tiny.TinyCase, tmp_path: Path) -> None:
    model, inputs = case.model, case.batch("ragged")
    vtc.compress(model, "crosslmm", modules=learned.updating(model, "crosslmm", tmp_path, lora=2), keep_tokens=4)
    expected = answers(model, inputs)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    compiled = answers(model, inputs, cache_implementation="static")
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


@each_method
def test_threads_remember_their_own_pictures(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    model = case.model
    vtc.compress(model, method, modules=learned.updating(model, method, tmp_path), keep_tokens=4)
    prompts = [*case.rows("ragged"), case.batch("single"), case.batch("two_images")]
    alone = [answers(model, prompt) for prompt in prompts]
    found: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        found[number] = answers(model, prompts[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        torch.testing.assert_close(found[number], expected)


@each_method
def test_later_stages_go_with_it(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    """Tokens that a stage in the decoder drops at the same layer are not updated any more, the others still are."""
    model, inputs = case.model, case.batch("ragged")
    folder = learned.updating(model, method, tmp_path)
    first = vtc.CompressionConfig(method, keep_tokens=6, options={"modules": folder})
    pool = vtc.CompressionConfig("pool", keep_tokens=6)
    fast = vtc.CompressionConfig("fastv", keep_tokens=3, options={"layer": 1})
    layers = engine_of(vtc.compress(model, first)).plan.updates
    assert 1 in layers
    chosen = {}
    for name, stages in (("updated", [first, fast]), ("pooled", [pool, fast])):
        vtc.compress(model, stages)
        chosen[name] = answers(model, inputs)
        assert {segment.tokens_after for segment in vtc.report(model).segments} == {3}
    assert not torch.allclose(chosen["updated"], chosen["pooled"], atol=1e-2)
    vtc.compress(model, [first, fast])
    torch.testing.assert_close(answers(model, inputs, use_cache=False), chosen["updated"], rtol=1e-4, atol=1e-4)


@each_method
def test_gradients_reach_the_modules_and_nothing_else(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    model, inputs = case.model.requires_grad_(False), case.batch("two_images")
    vtc.compress(model, method, modules=learned.updating(model, method, tmp_path), keep_tokens=4)
    module: Any = engine_of(model).plan.stages[0].selector.module.requires_grad_(True)

    def loss() -> torch.Tensor:
        return functional.log_softmax(model(**inputs, use_cache=False).logits[:, -1].double(), dim=-1)[:, 7].sum()

    loss().backward()
    assert all(weight.grad is None for weight in model.parameters())
    first = {name: weight.grad.clone() for name, weight in module.named_parameters()}
    assert all(bool(grad.abs().max() > 0) for grad in first.values())
    module.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    loss().backward()
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.grad, first[name], rtol=1e-3, atol=1e-5)


@each_method
def test_saved_and_loaded_modules_answer_bit_for_bit_and_restore_is_complete(
    case: tiny.TinyCase, method: str, tmp_path: Path
) -> None:
    model, inputs = case.model, case.batch("ragged")
    before, hooks = logits(model, inputs), _hooks(model)
    folder = learned.updating(model, method, tmp_path / "one", lora=2)
    vtc.compress(model, method, modules=folder, keep_tokens=4)
    first = logits(model, inputs)
    with vtc.disabled(model):
        assert torch.equal(logits(model, inputs), before)
    selector: Any = engine_of(model).plan.stages[0].selector
    save_modules(tmp_path / "two", selector.made_for, selector.module)
    learned.save_lora(tmp_path / "two", selector.lora)
    vtc.compress(model, method, modules=str(tmp_path / "two"), keep_tokens=4)
    assert torch.equal(logits(model, inputs), first)
    vtc.restore(model)
    assert torch.equal(logits(model, inputs), before)
    assert _hooks(model) == hooks
    assert not torch.equal(first, before)


def _hooks(model: Any) -> list[int]:
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


@each_method
def test_modules_run_in_float32_beside_a_bfloat16_model(method: str, tmp_path: Path) -> None:
    case = tiny.build("llava", dtype=torch.bfloat16)
    inputs = case.batch("ragged")
    begun = learned.updating(case.model, method, tmp_path / "begun", noise=0.0, lora=2)
    with vtc.compressed(case.model, "pool", keep_tokens=4):
        pooled = logits(case.model, inputs)
    with vtc.compressed(case.model, method, modules=begun, keep_tokens=4):
        assert torch.equal(logits(case.model, inputs), pooled)
    vtc.compress(case.model, method, modules=learned.updating(case.model, method, tmp_path, lora=2), keep_tokens=4)
    out = logits(case.model, inputs)
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out).all())
    selector: Any = engine_of(case.model).plan.stages[0].selector
    assert {weight.dtype for part in (selector.module, selector.lora) for weight in part.parameters()} == {
        torch.float32
    }


@each_method
def test_full_budgets_change_nothing(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    model, inputs = case.model, case.batch("ragged")
    folder, before = learned.updating(model, method, tmp_path), answers(model, inputs)
    for keep in ({"keep_ratio": 1.0}, {"keep_tokens": 4096}):
        with vtc.compressed(model, method, modules=folder, **keep):
            assert torch.equal(answers(model, inputs), before)


@each_method
def test_it_is_refused_what_it_cannot_do(case: tiny.TinyCase, method: str, tmp_path: Path) -> None:
    folder = Path(learned.updating(case.model, method, tmp_path / "made", lora=2))
    with pytest.raises(ConfigError, match="give modules="):
        vtc.compress(case.model, method, keep_tokens=4)
    with pytest.raises(ConfigError, match="trained for the family llava, but this model has internvl"):
        vtc.compress(tiny.build("internvl").model, method, modules=str(folder), keep_tokens=4)
    with pytest.raises(UnsupportedMethodError, match="works at places of its own"):
        vtc.compress(case.model, method, modules=str(folder), keep_tokens=4, at="decoder:2")
    described = json.loads((folder / "modules.json").read_text())
    for changed, match in (({"layers": [2, 1]}, "ascending layers"), ({"inner": 9}, "multiple"), ({"x": 1}, "wrongly")):
        settings = {**described["settings"], **changed}
        (folder / "modules.json").write_text(json.dumps({**described, "settings": settings}))
        with pytest.raises(ConfigError, match=match):
            vtc.compress(case.model, method, modules=str(folder), keep_tokens=4)
    (folder / "modules.json").write_text(json.dumps(described))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ConfigError, match="no plain LoRA"):
        vtc.compress(case.model, method, modules=str(folder), keep_tokens=4)
    assert not vtc.is_compressed(case.model)


def test_an_adapter_of_another_decoder_is_refused(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = learned.updating(case.model, "crosslmm", tmp_path)
    adapter = learned.begin_lora(adapter_for(case.model).text_model, 2)
    adapter.layers["layers/9/self_attn/q_proj"] = copy.deepcopy(adapter.layers["layers/0/self_attn/q_proj"])
    learned.save_lora(folder, adapter)
    with pytest.raises(ConfigError, match=r"does not have: layers[.]9[.]self_attn[.]q_proj"):
        vtc.compress(case.model, "crosslmm", modules=folder, keep_tokens=4)


def test_peft_reads_the_adapter(case: tiny.TinyCase, tmp_path: Path) -> None:
    """An adapter that was trained here gives in PEFT the same language model."""
    peft = pytest.importorskip("peft")
    model, text = case.model, adapter_for(case.model).text_model
    vtc.compress(model, "crosslmm", modules=learned.updating(model, "crosslmm", tmp_path, lora=2), keep_tokens=4)
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = logits(model, {"input_ids": ids})
    vtc.restore(model)
    assert not torch.allclose(logits(model, {"input_ids": ids}), ours, atol=1e-3)
    peft.PeftModel.from_pretrained(text, str(tmp_path))
    torch.testing.assert_close(logits(model, {"input_ids": ids}), ours, rtol=1e-4, atol=1e-5)


def test_another_shape_than_that_of_the_hidden_states_is_refused(
    case: tiny.TinyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vtc.compress(case.model, "crosslmm", modules=learned.updating(case.model, "crosslmm", tmp_path), keep_tokens=4)
    kind = type(engine_of(case.model).plan.stages[0].selector)
    monkeypatch.setattr(kind, "update", lambda self, ctx: ctx.hidden[:1])
    with pytest.raises(InputError, match="for hidden states"):
        logits(case.model, case.batch("single"))
