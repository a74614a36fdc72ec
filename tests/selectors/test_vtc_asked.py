"""`vtc-asked`: `vtc` with a learned quality, which imitates where the model looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.invariants.matrix import sharp
from vtc.engine.install import adapter_for, engine_of
from vtc.engine.plan import shape_of
from vtc.selectors.learned import save_modules, vtc_asked
from vtc.selectors.learned.vtc_asked.method import taught_layers

FAMILIES = ("llava", "qwen2_5_vl", "internvl")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def modules(model: Any, folder: Path, noise: float = 0.3) -> str:
    """Write a scorer for a model, with noise on every weight; return the folder."""
    made, scorer = vtc_asked.begin(shape_of(adapter_for(model)), inner=16, heads=2)
    generator = torch.Generator().manual_seed(3)
    for weight in scorer.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator)
    save_modules(folder, made, scorer)
    return str(folder)


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return reference.stacked_logits(model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_untrained_it_is_vtc_without_cls(family: str, tmp_path: Path) -> None:
    case = sharp(tiny.family(family))
    made, scorer = vtc_asked.begin(shape_of(adapter_for(case.model)), inner=16, heads=2)
    save_modules(tmp_path, made, scorer)
    inputs = case.batch("two_images")
    with vtc.compressed(case.model, "vtc", quality="none", keep_ratio=0.5) as model:
        plain = logits(model, inputs)
    with vtc.compressed(case.model, "vtc-asked", modules=str(tmp_path), keep_ratio=0.5) as model:
        assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_is_its_rows_and_nothing_stays_behind(family: str, tmp_path: Path) -> None:
    case = sharp(tiny.family(family))
    folder, inputs = modules(case.model, tmp_path), case.batch("two_images")
    before = logits(case.model, inputs)
    with vtc.compressed(case.model, "vtc", quality="none", keep_ratio=0.4) as model:
        plain = logits(model, inputs)
    with vtc.compressed(case.model, "vtc-asked", modules=folder, keep_ratio=0.4) as model:
        together = logits(model, inputs)
        alone = torch.cat([logits(model, row) for row in case.rows("two_images")])
    assert reference.max_error(together, alone) <= 1e-6
    assert reference.max_error(together, plain) > 1e-3, "the scores count"
    assert torch.equal(logits(case.model, inputs), before)


@torch.no_grad()
def test_the_question_counts(tmp_path: Path) -> None:
    case = sharp(tiny.family("llava"))
    (inputs,) = case.rows("single")
    folder = modules(case.model, tmp_path, noise=1.0)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -3:] = torch.tensor([5, 6, 7])
    kept = []
    for each in (inputs, other):
        with vtc.compressed(case.model, "vtc-asked", modules=folder, exponent=2.0, keep_ratio=0.4) as model:
            model(**each)
            kept.append(vtc.report(model).segments[0].kept.tolist())
    assert kept[0] != kept[1]


@torch.no_grad()
def test_it_hears_where_the_last_token_of_the_prompt_looks(tmp_path: Path) -> None:
    case = sharp(tiny.family("llava"))
    case.model.set_attn_implementation("eager")
    try:
        (inputs,) = case.rows("two_images")[:1]
        attentions = case.model(**inputs, output_attentions=True, use_cache=False).attentions
        modules(case.model, tmp_path)
        taught = {"modules": str(tmp_path), "imitate": True}
        with vtc.compressed(case.model, "vtc-asked", keep_ratio=0.5, **taught) as model:
            scorer = engine_of(model).plan.stages[0].selector.module
            heard = vtc_asked.study(scorer, lambda: model(**inputs))
            assert all(segment.tokens_after == segment.tokens_before for segment in vtc.report(model).segments)
            visual = [segment.columns for segment in engine_of(model).calls.last().segments]
    finally:
        case.model.set_attn_implementation("sdpa")
    depth = shape_of(adapter_for(case.model)).decoder_layers
    assert len(heard) == len(visual) == 2
    for each, columns in zip(heard, visual, strict=True):
        expected = [attentions[layer - 1][0, :, -1, columns].mean(dim=0) for layer in taught_layers(depth)]
        assert len(each.attention) == len(expected)
        for ours, theirs in zip(each.attention, expected, strict=True):
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-7)


def test_training_imitates_without_answers_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sharp(tiny.family("llava"))
    samples = case.rows("ragged")
    monkeypatch.setattr(type(case.model), "generate", None)  # no answer is asked for
    settings = {"steps": 20, "batch": 2, "rate": 1e-2, "inner": 16, "heads": 2, "progress": False}
    whole = vtc.train(case.model, None, samples, "vtc-asked", tmp_path / "whole", **settings)
    taught = {"keep_ratio": 0.5, "modules": str(whole), "imitate": True}
    with vtc.compressed(case.model, "vtc-asked", **taught) as model:
        trained = engine_of(model).plan.stages[0].selector.module
        found = [vtc_asked.study(trained, lambda row=row: model(**row)) for row in samples]
    _, untrained = vtc_asked.begin(shape_of(adapter_for(case.model)), inner=16, heads=2)
    with torch.no_grad():
        losses = [sum(float(vtc_asked.loss(each, heard)) for heard in found) for each in (trained, untrained)]
    assert losses[0] < 0.9 * losses[1]
    again = vtc.train(case.model, None, samples, "vtc-asked", tmp_path / "again", **settings)
    assert (whole / "modules.safetensors").read_bytes() == (again / "modules.safetensors").read_bytes()


def test_bad_requests_are_named(tmp_path: Path) -> None:
    case = sharp(tiny.family("llava"))
    with pytest.raises(vtc.ConfigError, match="vtc-asked: give modules"):
        vtc.compress(case.model, "vtc-asked", keep_ratio=0.5)
    with pytest.raises(vtc.ConfigError, match="takes no keep_tokens: it is trained with all tokens"):
        vtc.train(case.model, None, case.rows("single"), "vtc-asked", tmp_path / "x", keep_tokens=4)
    with pytest.raises(vtc.ConfigError, match="leave lora out"):
        vtc.train(case.model, None, case.rows("single"), "vtc-asked", tmp_path / "x", lora=4)
    with pytest.raises(vtc.ConfigError, match="multiple of 3 heads"):
        vtc_asked.begin(shape_of(adapter_for(case.model)), heads=3)
    assert not (tmp_path / "x").exists()
