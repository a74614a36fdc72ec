"""Conversations: the next turn on the same cache, with and without a new image, and loops of bare forwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import StaticCache

import vtc
from tests import reference, tiny
from tests.invariants.matrix import (
    PREFILLS_IN_CHUNKS,
    REPRESENTATIVES,
    Method,
    method,
    over_representatives,
    sharp,
    tolerance,
)
from vtc.engine.cache import CACHE, record_of

STEPS = 5
SAY = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "suppress_tokens": [tiny.IMAGE, tiny.VIDEO],
    "return_dict_in_generate": True,
    "output_logits": True,
}
PIXELS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes")


@dataclass
class Turn:
    """A finished turn, on either side."""

    inputs: dict[str, Any]
    output: Any

    def then(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Inputs of the next turn: everything said so far and `tokens`, on the same cache."""
        said = self.output.sequences
        mask = self.inputs["attention_mask"]
        grown = said.shape[1] + tokens.shape[1] - mask.shape[1]
        inputs = {
            "input_ids": torch.cat([said, tokens], dim=1),
            "attention_mask": torch.nn.functional.pad(mask, (0, grown), value=1),
            CACHE: self.output[CACHE],
        }
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.inputs:
                inputs[name] = torch.nn.functional.pad(self.inputs[name], (0, grown), value=0)
        return inputs


def question(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 290, (rows, length), generator=torch.Generator().manual_seed(33))


@pytest.mark.parametrize("kind", ["single", "ragged"])
@over_representatives("divprune", "fastv", "divprune+fastv")
def test_a_second_turn_on_the_same_cache(family: tiny.Family, method: Method, kind: str) -> None:
    case = sharp(family)
    inputs = case.batch(kind)
    asked = question(len(inputs["input_ids"]))
    with method.on(case.model) as model:
        first = Turn(inputs, model.generate(**inputs, **SAY))
        report = vtc.report(model)
        ours = [model.generate(**first.then(asked), **SAY)]
        second = Turn(first.then(asked), ours[0])
        ours.append(model.generate(**second.then(asked), **SAY))

    expected = reference.Reference.of(case.model, inputs, report)
    turn = Turn(inputs, expected.generate(**SAY))
    assert torch.equal(turn.output.sequences, first.output.sequences)
    for answer in ours:
        following = turn.then(asked)
        output = generate_masked(case.model, following, expected)
        assert torch.equal(answer.sequences, output.sequences)
        error = reference.max_error(reference.stacked_logits(answer), reference.stacked_logits(output))
        assert error <= tolerance(case)
        turn = Turn(following, output)


def generate_masked(model: Any, following: dict[str, Any], first: reference.Reference, **extra: Any) -> Any:
    """The next turn of the untouched model, with what the first turn dropped still hidden."""
    positions = model._prepare_position_ids_for_generation(following["input_ids"], dict(following))
    hidden = following["attention_mask"].clone()
    hidden[:, : first.attention_mask.shape[1]] *= first.attention_mask
    with torch.no_grad(), first.masked():
        return model.generate(**{**following, "attention_mask": hidden, "position_ids": positions, **extra}, **SAY)


# --------------------------------------------------------------------------------------------------- a new image


def with_new_image(case: tiny.TinyCase, turn: Turn) -> dict[str, Any]:
    """The next turn brings an image of its own to every row."""
    rows = tuple(tiny.Row(40, 3, ((None, 1),), 6) for _ in turn.inputs["input_ids"])
    image = case.collate(rows)
    following = turn.then(image["input_ids"])
    if "mm_token_type_ids" in following:
        following |= case.architecture.extras(following["input_ids"])
    if "token_type_ids" in following:
        following |= case.architecture.extras(following["input_ids"])
    return following | {name: image[name] for name in PIXELS if name in image}


@pytest.mark.parametrize("kind", ["single", "ragged"])
@pytest.mark.parametrize("name", ["divprune", "fastv", "divprune+fastv"])
@pytest.mark.parametrize("family_name", ["llava", "internvl", "idefics3", "llava_onevision_video", "gemma3"])
def test_a_second_turn_with_a_new_image(family_name: str, name: str, kind: str) -> None:
    if family_name == "gemma3" and not PREFILLS_IN_CHUNKS:
        pytest.skip("this release reads the token types of a later turn at the wrong places")
    case = sharp(tiny.family(family_name))
    inputs = case.batch(kind)
    with method(name).on(case.model) as model:
        first = Turn(inputs, model.generate(**inputs, **SAY))
        reports = [vtc.report(model)]
        following = with_new_image(case, first)
        ours = model.generate(**following, **SAY)
        reports.append(vtc.report(model))

    expected = reference.Reference.of(case.model, inputs, reports[0])
    turn = Turn(inputs, expected.generate(**SAY))
    assert torch.equal(turn.output.sequences, first.output.sequences)
    both = keep_of_both_turns(case.model, expected, following, reports[1])
    whole = {**with_new_image(case, turn)}
    later = reference.Reference(case.model, whole, both)
    theirs = later.generate(**SAY)
    assert torch.equal(ours.sequences, theirs.sequences)
    error = reference.max_error(reference.stacked_logits(ours), reference.stacked_logits(theirs))
    assert error <= tolerance(case)


def keep_of_both_turns(
    model: Any, first: reference.Reference, following: dict[str, Any], report: Any
) -> dict[int, torch.Tensor]:
    """Columns left from each stage on, over both turns; the second report speaks of the second turn only."""
    old = first.inputs["input_ids"].shape[1]
    new_part = {
        key: value[:, old:] if key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids") else value
        for key, value in following.items()
        if key != CACHE
    }
    second = reference.keep_masks(model, new_part, report)
    assert second.keys() == first.keep.keys()
    return {stage: torch.cat([first.keep[stage], second[stage]], dim=1) for stage in second}


@pytest.mark.parametrize("name", ["divprune", "fastv"])
@pytest.mark.parametrize("family_name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_second_turn_with_a_new_image_and_given_positions(family_name: str, name: str) -> None:
    # transformers computes M-RoPE positions from the grids of all images but wants the pixels of the new one alone,
    # so the caller gives the positions.
    case = sharp(tiny.family(family_name))
    inputs = case.batch("single")

    def positions(following: dict[str, Any]) -> torch.Tensor:
        grids = torch.cat([inputs["image_grid_thw"], following["image_grid_thw"]])
        everything = {**following, "image_grid_thw": grids, CACHE: None}
        return case.model._prepare_position_ids_for_generation(following["input_ids"], everything)

    with method(name).on(case.model) as model:
        first = Turn(inputs, model.generate(**inputs, **SAY))
        reports = [vtc.report(model)]
        following = with_new_image(case, first)
        ours = model.generate(**following, position_ids=positions(following), **SAY)
        reports.append(vtc.report(model))
    expected = reference.Reference.of(case.model, inputs, reports[0])
    turn = Turn(inputs, expected.generate(**SAY))
    both = keep_of_both_turns(case.model, expected, following, reports[1])
    whole = with_new_image(case, turn)
    later = reference.Reference(case.model, whole, both)
    with torch.no_grad(), later.masked():
        masked = {**whole, "attention_mask": later.attention_mask, "position_ids": positions(whole)}
        theirs = case.model.generate(**masked, **SAY)
    assert torch.equal(ours.sequences, theirs.sequences)
    error = reference.max_error(reference.stacked_logits(ours), reference.stacked_logits(theirs))
    assert error <= tolerance(case)


# ---------------------------------------------------------------------------------------- loops of bare forwards


def bare_loop(model: Any, inputs: dict[str, Any], steps: int, *, mask: bool, together: int = 1) -> torch.Tensor:
    """Logits (B, steps, V) of a loop as users write it: no position ids, the cache passed on."""
    logits, attention_mask = [], inputs["attention_mask"]
    tokens = question(len(inputs["input_ids"]), steps * together)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        for step in range(steps):
            attention_mask = torch.nn.functional.pad(attention_mask, (0, together), value=1)
            out = model(
                input_ids=tokens[:, step * together : (step + 1) * together],
                **{CACHE: out[CACHE]},
                use_cache=True,
                **({"attention_mask": attention_mask} if mask else {}),
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("together", [1, 3])
@over_representatives("divprune", "fastv", "divprune+fastv")
def test_bare_loops_without_masks(family: tiny.Family, method: Method, together: int) -> None:
    case = sharp(family)
    inputs = case.batch("single")
    with method.on(case.model) as model:
        ours = bare_loop(model, inputs, 4, mask=False, together=together)
        with torch.no_grad():
            model(**inputs)
        report = vtc.report(model)
    expected = reference.Reference.of(case.model, inputs, report)
    tokens = question(1, 4 * together)
    theirs = []
    with torch.no_grad(), expected.masked():
        # One forward over everything: the sharpest form of the reference.
        prompt = expected.generation_inputs()
        positions = prompt["position_ids"]
        positions = positions[1:] if positions.dim() == 3 else positions
        following = positions[..., -1:] + 1 + torch.arange(tokens.shape[1])
        whole = {
            **{key: value for key, value in prompt.items() if key not in ("mm_token_type_ids", "token_type_ids")},
            "input_ids": torch.cat([prompt["input_ids"], tokens], dim=1),
            "attention_mask": torch.nn.functional.pad(prompt["attention_mask"], (0, tokens.shape[1]), value=1),
            "position_ids": torch.cat([positions, following], dim=-1),
        }
        logits = case.model(**whole).logits[:, prompt["input_ids"].shape[1] :]
        theirs = logits[:, together - 1 :: together]
    assert reference.max_error(ours, theirs) <= tolerance(case)


@pytest.mark.parametrize("kind", ["single", "ragged"])
@pytest.mark.parametrize("name", ["divprune", "fastv", "divprune+fastv"])
@pytest.mark.parametrize("family_name", ["llava", "internvl"])
def test_bare_loops_with_masks(family_name: str, name: str, kind: str) -> None:
    # Not Qwen: with a mask of full length and no positions its bare decode fails in transformers, compressed or not.
    case = sharp(tiny.family(family_name))
    inputs = case.batch(kind)
    with method(name).on(case.model) as model:
        ours = bare_loop(model, inputs, 4, mask=True)
        with torch.no_grad():
            model(**inputs)
        report = vtc.report(model)
    expected = reference.Reference.of(case.model, inputs, report)
    with expected.masked():
        masked = {**inputs, "attention_mask": expected.attention_mask}
        theirs = bare_loop(case.model, masked, 4, mask=True)
    assert reference.max_error(ours, theirs) <= tolerance(case)


@pytest.mark.parametrize("family_name", REPRESENTATIVES)
def test_the_cache_is_shorter_and_knows_the_prompts_length(family_name: str) -> None:
    case = sharp(tiny.family(family_name))
    inputs = case.batch("ragged")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), method("divprune+fastv").on(case.model) as model:
        cache = model(**inputs)[CACHE]
        report = vtc.report(model)
    assert cache.get_seq_length() == length
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [max(lengths) for lengths in report.lengths_per_layer]
    assert held[0] < length
    assert held[2] < held[1]


@pytest.mark.parametrize("name", ["divprune", "divprune+fastv"])
def test_cropping_forgets_the_last_tokens_everywhere(name: str) -> None:
    # What rejected candidates of assisted decoding leave behind: lengths, columns and stored keys must shrink alike.
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    with torch.no_grad(), method(name).on(case.model) as model:
        cache = model(**inputs, use_cache=True)[CACHE]
        stored = [cache.get_query_offset(layer) for layer in range(len(cache.layers))]
        model(input_ids=question(len(inputs["input_ids"])), use_cache=True, **{CACHE: cache})
        cache.crop(-4)
    length = inputs["input_ids"].shape[1] + 6 - 4
    record = record_of(cache)
    assert cache.get_seq_length() == record.logical == length
    for layer, before in enumerate(stored):
        columns = record.keys_of(layer)
        assert columns.shape[1] == cache.get_query_offset(layer) == before + 2
        assert (columns.max(dim=1).values == length - 1).all(), "the last columns went, not the first"


def test_a_reset_static_cache_is_an_ordinary_one() -> None:
    case = sharp(tiny.family("llava"))
    inputs, text = case.batch("single"), question(1)
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=64)
    with torch.no_grad():
        expected = case.model(input_ids=text).logits
        with method("divprune").on(case.model) as model:
            model(**inputs, use_cache=True, **{CACHE: cache})
            assert record_of(cache) is not None
            cache.reset()
            assert record_of(cache) is None
            assert int(cache.get_seq_length()) == 0
            ours = model(input_ids=text, use_cache=True, **{CACHE: cache}).logits
        assert reference.max_error(ours, expected) <= tolerance(case)
        # Also behind restore(): nothing that was forgotten can be asked for.
        cache.reset()
        ours = case.model(input_ids=text, use_cache=True, **{CACHE: cache}).logits
    assert reference.max_error(ours, expected) <= tolerance(case)


@pytest.mark.skipif(CACHE == "past_key_values", reason="this transformers has one name for a cache")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_older_name_of_a_cache_still_works() -> None:
    case, older = sharp(tiny.family("llava")), "past_key_values"
    inputs, text = case.batch("ragged"), question(2)
    with torch.no_grad(), method("divprune+fastv").on(case.model) as model:
        loops, answers = [], []
        for name in (CACHE, older):
            cache = model(**inputs, use_cache=True, **{name: None})[CACHE]
            loops.append(model(input_ids=text, use_cache=True, **{name: cache}).logits)
            turn = Turn(inputs, model.generate(**inputs, **SAY)).then(text)
            answers.append(model.generate(**{name: turn.pop(CACHE)}, **turn, **SAY).sequences)
    assert torch.equal(*loops)
    assert torch.equal(*answers)
