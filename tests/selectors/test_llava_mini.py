"""`llava-mini`: the module against the authors' own, and new tokens inside unmodified models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn import functional

import vtc
import vtc.reference
from tests import learned, tiny
from tests.selectors.test_golden import load
from vtc.core.grids import evenly_spread
from vtc.engine.install import adapter_for, engine_of
from vtc.engine.plan import shape_of
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.selectors.learned import LlavaMiniSelector, read_modules
from vtc.selectors.learned.llava_mini import Fusion, Resampler, sincos_2d
from vtc.tuning import train as training

FAMILIES = ("llava", "internvl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture
def case(request: pytest.FixtureRequest) -> tiny.TinyCase:
    return tiny.build(getattr(request, "param", "llava"))


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ["llavamini_resampler_01_grid2", "llavamini_resampler_03_grid4"])
def test_the_resampler_is_the_authors(name: str) -> None:
    golden = load(f"{name}.npz")
    n, width = golden["x"].shape[1:]
    resampler = Resampler(width, golden["grid"], golden["heads"])
    weights = {key.replace("__", "."): value for key, value in golden.items()}
    resampler.load_state_dict({key: weights[key] for key in resampler.state_dict()})
    side = round(n**0.5)
    torch.testing.assert_close(sincos_2d(width, golden["grid"]), golden["pos_embed"])
    torch.testing.assert_close(resampler(golden["x"], (side, side)), golden["out"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_layers_of_the_fusion_are_the_decoders(case: tiny.TinyCase) -> None:
    """With copied weights they compute what the language model computes, so packed text and positions are right too."""
    decoder, text = learned.decoder_of(case.model), case.model.model.language_model
    fusion = Fusion(64, layers=2, **decoder.shape)
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    tokens, words = fusion(x[:, :5], x[:, 5:7], x[:, 7:])
    assert torch.equal(torch.cat([tokens, words], dim=1), x[:, 5:]), "nothing is added before training"
    assert fusion.adopt(decoder.layers)
    fusion.out.weight.copy_(torch.eye(64))
    fused = torch.cat(fusion(x[:, :5], x[:, 5:7], x[:, 7:]), dim=1)
    hidden = text(inputs_embeds=x, output_hidden_states=True).hidden_states[2][:, 5:]
    torch.testing.assert_close(fused, x[:, 5:] + fusion.norm(hidden), rtol=1e-4, atol=1e-5)
    assert not Fusion(64, layers=2, **{**decoder.shape, "hidden": 3}).adopt(decoder.layers), "of another shape"
    for wrong in ({"heads": 3, "kv_heads": 2}, {"layers": 0}, {"head_width": 3}):
        with pytest.raises(ConfigError, match="of the fusion"):
            Fusion(64, **{"layers": 1, **decoder.shape, **wrong})


@pytest.mark.parametrize("case", ["llava", "qwen2_5_vl"], indirect=True)
def test_an_untrained_fusion_changes_nothing(case: tiny.TinyCase, tmp_path: Path) -> None:
    answers = []
    for layers in (0, 2):
        folder = learned.llava_mini(case.model, tmp_path / str(layers), fusion=layers, scale=0.0)
        vtc.compress(case.model, "llava-mini", modules=folder, keep_tokens=64)
        answers.append(logits(case.model, case.batch("ragged")))
    assert torch.equal(*answers)


@pytest.mark.parametrize("case", ["llava", "internvl"], indirect=True)
def test_fused_text_is_the_mean_over_the_pictures_of_its_row(case: tiny.TinyCase, tmp_path: Path) -> None:
    """The untouched model, given the new tokens and the new text at their places, says the same."""
    model, inputs = case.model, case.batch("two_images")
    folder = learned.llava_mini(model, tmp_path, fusion=1)
    vtc.compress(model, "llava-mini", modules=folder, keep_tokens=64)
    made: list[Any] = []
    kind = type(engine_of(model).plan.stages[0].selector)
    original = kind.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "select", lambda self, ctx: made.append(original(self, ctx)) or made[-1])
        out = logits(model, inputs)
    segments = vtc.report(model).segments
    assert all(selection.text is None for segment in segments for _, selection in segment.selections)
    vtc.restore(model)
    adapter = adapter_for(model)
    visual = adapter.placeholders(inputs["input_ids"], "image")
    mask, plain = inputs["attention_mask"].clone(), inputs["attention_mask"].bool() & ~visual
    mask[visual] = 0
    new: dict[tuple[int, str], list[Any]] = {}
    starts = [0] * len(mask)
    columns = []
    for segment, selection in zip(segments, made, strict=True):
        own = visual[segment.row].nonzero()[:, 0][starts[segment.row] :][: segment.tokens_before]
        starts[segment.row] += segment.tokens_before
        columns.append(own[segment.kept])
        mask[segment.row, columns[-1]] = 1
        new.setdefault(segment.row, []).append(selection.text)

    def write(module: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        for segment, selection, where in zip(segments, made, columns, strict=True):
            embeds[segment.row, where] = selection.features
        for row, texts in new.items():
            assert not torch.allclose(texts[0], texts[1]), "pictures say different things"
            embeds[row, plain[row]] = torch.stack(texts).mean(dim=0)
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask}

    handle = adapter.text_model.register_forward_pre_hook(write, with_kwargs=True)
    try:
        expected = logits(model, inputs)
    finally:
        handle.remove()
    torch.testing.assert_close(out[plain], expected[plain], rtol=1e-4, atol=2e-5)


def test_fused_rows_stand_alone_and_answers_are_not_fused(case: tiny.TinyCase, tmp_path: Path) -> None:
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path, fusion=1), keep_tokens=4)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = case.model.generate(**case.batch("ragged"), **settings)
    again = case.model.generate(**case.batch("ragged"), use_cache=False, **settings)
    assert torch.equal(again.sequences, together.sequences), "the prompt comes again at every step"
    for row, inputs in enumerate(case.rows("ragged")):
        alone = case.model.generate(**inputs, **settings)
        assert torch.equal(alone.sequences[0, -4:], together.sequences[row, -4:])
        with torch.no_grad():  # what training reads in one pass is what generating says step by step
            said = training._predicted(case.model, inputs, alone.sequences[0, -4:])
        torch.testing.assert_close(said, torch.cat(alone.logits), rtol=1e-4, atol=2e-5)
        with torch.no_grad():
            fused = case.model(**training._with_answer(inputs, alone.sequences[0, -4:])).logits[0, -5:-1]
        assert not torch.allclose(fused[1:], said[1:], atol=1e-3), "a bare pass takes the answer for text of the prompt"


def test_folders_without_a_fusion_stay_readable(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = Path(learned.llava_mini(case.model, tmp_path))
    assert "fusion" not in json.loads((folder / "modules.json").read_text())["settings"]
    assert LlavaMiniSelector(modules=str(folder)).module.fusion is None


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_new_tokens_are_as_if_written_into_the_prompt(case: tiny.TinyCase, tmp_path: Path) -> None:
    """The untouched model, given the new tokens at their places and with the other places masked, says the same."""
    model, inputs = case.model, case.batch("single")
    vtc.compress(model, "llava-mini", modules=learned.llava_mini(model, tmp_path), keep_tokens=64)
    seen: dict[str, Any] = {}
    selector = engine_of(model).plan.stages[0].selector
    kind = type(selector)
    original = kind.select

    def select(self: Any, ctx: Any) -> Any:
        seen["selection"] = original(self, ctx)
        return seen["selection"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "select", select)
        out = logits(model, inputs)
    (segment,) = vtc.report(model).segments
    frames = sum(grid[0] for grid in segment.grids)
    assert segment.tokens_after == seen["selection"].k == 4 * frames < segment.tokens_before
    assert all(selection.features is None for _, selection in segment.selections), "the report is light"
    vtc.restore(model)
    adapter = adapter_for(model)
    columns = adapter.placeholders(inputs["input_ids"], "image")[0].nonzero()[:, 0]
    kept = columns[segment.kept]
    mask = inputs["attention_mask"].clone()
    mask[0, columns] = 0
    mask[0, kept] = 1

    def write(module: Any, args: Any, kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"].clone()
        embeds[0, kept] = seen["selection"].features
        return args, {**kwargs, "inputs_embeds": embeds, "attention_mask": mask}

    handle = adapter.text_model.register_forward_pre_hook(write, with_kwargs=True)
    try:
        expected = logits(model, inputs)
    finally:
        handle.remove()
    text = torch.ones(mask.shape[1], dtype=torch.bool)
    text[columns] = False
    torch.testing.assert_close(out[0, text], expected[0, text], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", ["llava", "internvl"], indirect=True)
def test_a_batch_equals_its_rows_and_generates(case: tiny.TinyCase, tmp_path: Path) -> None:
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path), keep_tokens=64)

    def answers(inputs: dict[str, Any], **given: Any) -> torch.Tensor:
        made = case.model.generate(**inputs, max_new_tokens=4, do_sample=False, **given)
        return made[:, inputs["input_ids"].shape[1] :]

    together = answers(case.batch("ragged"))
    for row, inputs in enumerate(case.rows("ragged")):
        assert torch.equal(answers(inputs)[0], together[row])
    assert torch.equal(answers(case.batch("ragged"), use_cache=False), together), "the prompt comes again at every step"


def test_a_later_stage_chooses_among_new_tokens(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder, inputs = learned.llava_mini(case.model, tmp_path), case.batch("single")
    first = vtc.CompressionConfig("llava-mini", keep_tokens=4, options={"modules": folder})
    vtc.compress(case.model, first)
    alone = logits(case.model, inputs)
    vtc.compress(case.model, [first, vtc.CompressionConfig("divprune", keep_tokens=4)])
    torch.testing.assert_close(logits(case.model, inputs), alone)
    vtc.compress(case.model, [first, vtc.CompressionConfig("pool", keep_tokens=2)])
    logits(case.model, inputs)
    (segment,) = vtc.report(case.model).segments
    assert [selection.k for _, selection in segment.selections] == [4, 2]


def test_places_are_spread_evenly(case: tiny.TinyCase, tmp_path: Path) -> None:
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path), keep_tokens=4)
    logits(case.model, case.batch("two_images"))
    for segment in vtc.report(case.model).segments:
        ((t, h, w),) = segment.grids
        assert torch.equal(segment.kept, evenly_spread((t, h, w), (t, 2, 2)))


def test_saved_and_loaded_modules_answer_bit_for_bit(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder, inputs = learned.llava_mini(case.model, tmp_path / "one"), case.batch("ragged")
    before = logits(case.model, inputs)
    vtc.compress(case.model, "llava-mini", modules=folder, keep_tokens=4)
    first = logits(case.model, inputs)
    selector = engine_of(case.model).plan.stages[0].selector
    vtc.selectors.learned.save_modules(tmp_path / "two", selector.made_for, selector.module)
    vtc.compress(case.model, "llava-mini", modules=str(tmp_path / "two"), keep_tokens=4)
    assert torch.equal(logits(case.model, inputs), first)
    vtc.restore(case.model)
    assert torch.equal(logits(case.model, inputs), before)
    assert not torch.equal(first, before)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["modules.json", "modules.safetensors"]


def test_modules_run_in_float32_beside_a_bfloat16_model(tmp_path: Path) -> None:
    case = tiny.build("llava", dtype=torch.bfloat16)
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path), keep_tokens=4)
    out = logits(case.model, case.batch("ragged"))
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out).all())
    compressor = engine_of(case.model).plan.stages[0].selector.module
    assert {weight.dtype for weight in compressor.parameters()} == {torch.float32}


def test_gradients_reach_the_modules_and_nothing_else(case: tiny.TinyCase, tmp_path: Path) -> None:
    case.model.requires_grad_(False)
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path), keep_tokens=4)
    compressor = engine_of(case.model).plan.stages[0].selector.module.requires_grad_(True)
    inputs = case.batch("two_images")

    def loss() -> torch.Tensor:
        return functional.log_softmax(case.model(**inputs).logits[:, -1].double(), dim=-1)[:, 7].sum()

    loss().backward()
    assert all(weight.grad is None for weight in case.model.parameters())
    for name, weight in compressor.named_parameters():
        assert weight.grad is not None, name
        # The bias of keys shifts all scores of a query alike.
        if not name.endswith("in_proj_bias"):
            assert weight.grad.abs().max() > 0, name
    weight = compressor.projector.linear_2.bias
    step = 1e-2 * torch.sign(weight.grad)
    predicted = float((weight.grad * step).sum())
    with torch.no_grad():
        weight += step
        up = loss()
        weight -= 2 * step
        measured = float(up - loss()) / 2
    assert measured == pytest.approx(predicted, rel=0.1)


def test_keeping_everything_replaces_nothing(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder, inputs = learned.llava_mini(case.model, tmp_path), case.batch("ragged")
    before = logits(case.model, inputs)
    vtc.compress(case.model, "llava-mini", modules=folder, keep_ratio=1.0)
    assert torch.equal(logits(case.model, inputs), before)


def test_a_picture_of_few_tokens_stays_as_it_is(tmp_path: Path) -> None:
    case = tiny.build("qwen2_5_vl")
    inputs = case.batch("single")
    before = logits(case.model, inputs)
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path, side=8), keep_tokens=64)
    torch.testing.assert_close(logits(case.model, inputs), before)


def test_a_budget_below_what_the_modules_give_is_refused(case: tiny.TinyCase, tmp_path: Path) -> None:
    vtc.compress(case.model, "llava-mini", modules=learned.llava_mini(case.model, tmp_path), keep_tokens=3)
    with pytest.raises(InputError, match=r"give 4 tokens per frame.*at most 3 may stay"):
        logits(case.model, case.batch("single"))


def test_modules_of_another_model_are_refused(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = learned.llava_mini(case.model, tmp_path)
    other = tiny.build("internvl").model
    with pytest.raises(ConfigError, match="trained for the family llava, but this model has internvl"):
        vtc.compress(other, "llava-mini", modules=folder, keep_tokens=4)
    made_for = read_modules(folder, "llava-mini")[0]
    for name, value, said in (("width", 128, "embeddings of the width 64"), ("decoder_layers", 2, "decoder layers")):
        shape = dataclasses.replace(shape_of(adapter_for(case.model)), **{name: value})
        with pytest.raises(ConfigError, match=said):
            made_for.check_fit(shape, folder)
    assert not vtc.is_compressed(other)
    assert not vtc.is_compressed(case.model)


def test_broken_folders_are_refused(case: tiny.TinyCase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give modules="):
        vtc.compress(case.model, "llava-mini", keep_tokens=4)
    with pytest.raises(ConfigError, match="holds no trained modules"):
        LlavaMiniSelector(modules=str(tmp_path / "none"))
    folder = Path(learned.llava_mini(case.model, tmp_path / "made"))
    described, weights = (folder / "modules.json").read_text(), (folder / "modules.safetensors").read_bytes()

    def refused(match: str, **changed: Any) -> None:
        (folder / "modules.json").write_text(json.dumps({**json.loads(described), **changed}))
        with pytest.raises(ConfigError, match=match):
            LlavaMiniSelector(modules=str(folder))

    refused("has the format 'other'", format="other")
    refused("modules of the method 'crosslmm'", method="crosslmm")
    refused("no description of modules", colour="red")
    refused("describes its modules wrongly", settings={"breadth": 3})
    refused("are not those of its modules", settings={**json.loads(described)["settings"], "side": 3})
    (folder / "modules.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as trained modules"):
        LlavaMiniSelector(modules=str(folder))
    (folder / "modules.json").write_text(described)
    (folder / "modules.safetensors").write_bytes(weights[:100])
    with pytest.raises(ConfigError, match="cannot be read as trained modules"):
        LlavaMiniSelector(modules=str(folder))
    broken = safetensors.torch.load(weights)
    broken["resampler.query"][0, 0] = torch.nan
    safetensors.torch.save_file(broken, folder / "modules.safetensors")
    with pytest.raises(ConfigError, match=r"NaN or infinite: resampler[.]query"):
        LlavaMiniSelector(modules=str(folder))


def test_it_works_before_the_decoder_only(case: tiny.TinyCase, tmp_path: Path) -> None:
    folder = learned.llava_mini(case.model, tmp_path)
    with pytest.raises(UnsupportedMethodError, match="cannot work at 'decoder:2'"):
        vtc.compress(case.model, "llava-mini", modules=folder, keep_tokens=4, at="decoder:2")


@pytest.mark.skipif(not vtc.reference.available(), reason="needs vtc-reference")
def test_shipped_modules_are_small_and_fit_the_reference_model() -> None:
    folders = vtc.reference.modules("llava")
    assert folders
    model, _ = vtc.reference.load("llava")
    for name, folder in folders.items():
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
        method, _, count = name.rpartition("-")
        if not count.isdecimal():
            continue
        vtc.compress(model, method, modules=str(folder), keep_tokens=int(count))
        module = engine_of(model).plan.stages[0].selector.module
        assert method != "llava-mini" or module.side**2 == int(count)
    assert vtc.reference.modules("internvl") == {}
