"""Rows of a prompt that show the same images: the encoder runs once, and every answer stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from tests.invariants import matrix
from vtc.config import CompressionConfig
from vtc.engine.install import engine_of
from vtc.engine.memory import EncoderMemory
from vtc.selectors.divprune import DivPruneSelector

ROWS = 3
METHODS = tuple(matrix.method(name) for name in ("divprune", "vtc-cls", "divprune at vision:1", "fastv", "evs"))


def questions(case: tiny.TinyCase) -> dict[str, Any]:
    """The first row of a batch three times, with another last token each time."""
    alone = case.rows()[0]
    inputs = {name: torch.cat([value] * ROWS) for name, value in alone.items()}
    inputs["input_ids"][:, -1] = torch.tensor([5, 7, 11])
    return inputs


def generate(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    out = model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=3,
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return list(out.logits)


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, id=f"{f}-{m}") for f in tiny.FAMILIES for m in METHODS if m.applies_to(f)],
)
def test_the_encoder_runs_once_and_nothing_else_changes(family: tiny.Family, method: matrix.Method) -> None:
    case = matrix.sharp(family)
    inputs = questions(case)
    seen: list[int] = []
    with method.on(case.model) as model:
        expected = generate(model, inputs)
        report = vtc.report(model)
        engine = engine_of(model)
        towers = {engine.adapter.tower(modality) for modality in engine.adapter.modalities}
        for tower in towers:
            tower.register_forward_pre_hook(lambda *_: seen.append(1))
        alone = {name: value[: len(value) // ROWS] for name, value in inputs.items()}
        generate(model, alone)
        once, memory = len(seen), EncoderMemory(rows=ROWS)
        for _ in range(2):
            with engine.remember(memory):
                found = generate(model, inputs)
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=matrix.tolerance(case, method), rtol=0)
            shared = vtc.report(model)
            assert [each.kept.tolist() for each in shared.segments] == [each.kept.tolist() for each in report.segments]
    assert len(seen) == once * 2, "the rows share a run, and the second call has it from the memory"


@pytest.mark.parametrize("at", [None, "vision:1", "pixels"])
def test_other_stages_have_results_of_their_own(at: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = matrix.sharp(tiny.family("qwen2_5_vl"))
    inputs, chosen = case.rows()[0], []
    original = DivPruneSelector.select
    monkeypatch.setattr(DivPruneSelector, "select", lambda self, ctx: chosen.append(ctx.budget) or original(self, ctx))

    def run(memory: EncoderMemory, **arguments: Any) -> list[torch.Tensor]:
        stages = [CompressionConfig("divprune", at=at, **arguments), CompressionConfig("fastv", keep_ratio=0.5)]
        with vtc.compressed(case.model, stages) as model, engine_of(model).remember(memory):
            return generate(model, inputs)

    memory = EncoderMemory()
    for arguments in ({"keep_ratio": 0.5}, {"keep_ratio": 0.5}, {"keep_ratio": 0.25}, {"keep_tokens": 3}):
        for mine, theirs in zip(run(memory, **arguments), run(EncoderMemory(), **arguments), strict=True):
            assert torch.equal(mine, theirs)
    pictures = len(chosen) // 7
    assert len(chosen) == 7 * pictures, "four times without, and three with what is remembered"


def test_choices_that_read_the_text_are_made_for_each_question() -> None:
    case = matrix.sharp(tiny.family("qwen2_5_vl"))
    inputs = case.rows()[0]
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -3:] = torch.tensor([5, 7, 11])
    stages = [CompressionConfig(name, keep_ratio=0.5) for name in ("cdpruner", "divprune")]
    with vtc.compressed(case.model, stages) as model:
        expected = generate(model, other)
        with engine_of(model).remember(EncoderMemory()):
            generate(model, inputs)
            found = generate(model, other)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_the_model_with_all_its_tokens_shares_it_too() -> None:
    case = matrix.sharp(tiny.family("qwen3_vl"))
    inputs = questions(case)
    expected = generate(case.model, inputs)
    memory = EncoderMemory(rows=ROWS)
    with vtc.compressed(case.model, CompressionConfig("uniform", keep_ratio=1.0)) as model:
        with engine_of(model).remember(memory):
            whole = generate(model, inputs)
        with vtc.disabled(model), engine_of(model).remember(memory):
            disabled = generate(model, inputs)
    for found in (whole, disabled):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_other_images_are_refused() -> None:
    case = tiny.build("llava")
    inputs = questions(case)
    inputs["pixel_values"][-1] += 1
    vtc.compress(case.model, "divprune", keep_ratio=0.5)
    with engine_of(case.model).remember(EncoderMemory(rows=ROWS)), pytest.raises(vtc.InputError, match="3 rows"):
        generate(case.model, inputs)
