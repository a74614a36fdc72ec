"""Every mode of generate() says what it would say with the dropped tokens masked."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation import CompileConfig

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
from vtc import CompressionConfig

STEPS = 5
# A random model would say the placeholder ids too, which transformers refuses without a cache.
SAY = {"max_new_tokens": STEPS, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO], "return_dict_in_generate": True}
GREEDY = {"do_sample": False}

DRAWN_OR_SEARCHED = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "output_scores": True},
    "beam-sampling": {"do_sample": True, "num_beams": 3, "output_scores": True},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "several-beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "output_scores": True},
}
GREEDY_IN_OTHER_WORDS = {
    "no-cache": {"use_cache": False},
    "static-cache": {"cache_implementation": "static"},
}
"""Greedy itself is in `tests/invariants/test_2_masking.py`."""


def say(model: Any, inputs: dict[str, Any], **mode: Any) -> Any:
    torch.manual_seed(11)
    return model.generate(**inputs, **(SAY | mode))


def compressed_and_reference(
    case: tiny.TinyCase, method: Method, inputs: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> tuple[Any, Any]:
    with method.on(case.model) as model:
        answer = say(model, inputs, **ours)
        report = vtc.report(model)
    expected = reference.Reference.of(case.model, inputs, report)
    assert expected.visible.sum() < inputs["attention_mask"].sum()
    with expected.masked():
        return answer, say(case.model, expected.generation_inputs(), **theirs)


@pytest.mark.parametrize("mode", list(DRAWN_OR_SEARCHED))
@over_representatives("divprune", "divprune+fastv")
def test_sampling_and_beams(family: tiny.Family, method: Method, mode: str) -> None:
    case = sharp(family)
    options = DRAWN_OR_SEARCHED[mode]
    ours, theirs = compressed_and_reference(case, method, case.batch("ragged"), options, options)
    assert torch.equal(ours.sequences, theirs.sequences)
    if "num_beams" in options:
        assert reference.max_error(ours.sequences_scores, theirs.sequences_scores) <= tolerance(case)


@pytest.mark.parametrize("kind", ["single", "no_image_row"])
@pytest.mark.parametrize("mode", list(GREEDY_IN_OTHER_WORDS))
@over_representatives("divprune", "divprune+fastv")
def test_greedy_in_other_words(family: tiny.Family, method: Method, mode: str, kind: str) -> None:
    case = sharp(family)
    mode_options = {**GREEDY, "output_logits": True, **GREEDY_IN_OTHER_WORDS[mode]}
    ours, theirs = compressed_and_reference(
        case, method, case.batch(kind), mode_options, {**GREEDY, "output_logits": True}
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    error = reference.max_error(reference.stacked_logits(ours), reference.stacked_logits(theirs))
    assert error <= tolerance(case)


@pytest.mark.skipif(not PREFILLS_IN_CHUNKS, reason="this release cannot split a prompt with images")
@pytest.mark.parametrize("kind", ["single", "ragged"])
@pytest.mark.parametrize("size", [7, 16])
@pytest.mark.parametrize("name", ["divprune", "uniform"])
@pytest.mark.parametrize("family_name", REPRESENTATIVES)
def test_chunked_prefill(family_name: str, name: str, size: int, kind: str) -> None:
    case = sharp(tiny.family(family_name))
    mode = {**GREEDY, "prefill_chunk_size": size}
    ours, theirs = compressed_and_reference(case, method(name), case.batch(kind), mode, GREEDY)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.skipif(not PREFILLS_IN_CHUNKS, reason="this release cannot split a prompt with images")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["single", "two_images", "mixed"])
@pytest.mark.parametrize("family_name", REPRESENTATIVES)
def test_chunks_of_which_nothing_is_kept(family_name: str, kind: str, size: int) -> None:
    case = sharp(tiny.family(family_name))
    if kind not in case.family.kinds:
        pytest.skip("takes no videos")
    few = Method("divprune, 1", (CompressionConfig("divprune", keep_tokens=1),))
    mode = {**GREEDY, "prefill_chunk_size": size}
    ours, theirs = compressed_and_reference(case, few, case.batch(kind), mode, GREEDY)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("mode", [{}, {"use_cache": False}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
@over_representatives("divprune", "fastv")
def test_the_report_of_a_prompt_is_of_the_prompt(family: tiny.Family, method: Method, mode: dict[str, Any]) -> None:
    case = sharp(family)
    for kind in ("text_only", "no_image_row"):
        if "prefill_chunk_size" in mode and (method.decoder or not PREFILLS_IN_CHUNKS):
            continue
        inputs = case.batch(kind)
        with method.on(case.model) as model:
            say(model, inputs, **GREEDY, **mode)
            report = vtc.report(model)
        assert report.lengths_before == tuple(inputs["attention_mask"].sum(dim=1).tolist())
        assert len(report.segments) == (0 if kind == "text_only" else 1)


@over_representatives("divprune", "divprune+fastv")
def test_prompt_lookup(family: tiny.Family, method: Method) -> None:
    case = sharp(family)
    inputs = case.batch("single")
    # A repetition in the prompt, so that candidates are found, some right and some wrong.
    tail = inputs["input_ids"][:, -8:]
    inputs = extended(inputs, torch.cat([tail, tail], dim=1))
    whole = {**GREEDY, "max_new_tokens": 8}
    mode = {**whole, "prompt_lookup_num_tokens": 3}
    ours, theirs = compressed_and_reference(case, method, inputs, mode, whole)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("draft", ["copy", "stranger", "compressed-copy"])
@over_representatives("divprune", "divprune+fastv")
def test_assisted_decoding(family: tiny.Family, method: Method, draft: str) -> None:
    # The copy's candidates are nearly all accepted, the stranger's nearly all rejected: both paths are walked.
    case = sharp(family)
    assistant = tiny.build(family.name, seed=1 if draft == "stranger" else 0, dtype=case.model.dtype).model
    if draft == "compressed-copy":
        method.compress(assistant)
    inputs = case.batch("single")
    whole = {**GREEDY, "max_new_tokens": 8}
    mode = {**whole, "assistant_model": assistant}
    ours, theirs = compressed_and_reference(case, method, inputs, mode, whole)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("draft_seed", [0, 1])
@pytest.mark.parametrize("family_name", REPRESENTATIVES)
def test_a_draft_does_not_change_what_is_kept(family_name: str, draft_seed: int) -> None:
    # The prompt's last token decides, not the last candidate that the draft appended.
    case = sharp(tiny.family(family_name))
    assistant = tiny.build(family_name, seed=draft_seed, dtype=case.model.dtype).model
    inputs = case.batch("single")
    kept = []
    for mode in (GREEDY, {**GREEDY, "assistant_model": assistant}, {**GREEDY, "prompt_lookup_num_tokens": 3}):
        with method("fastv").on(case.model) as model:
            say(model, inputs, **mode)
            kept.append([segment.kept.tolist() for segment in vtc.report(model).segments])
    assert kept[0] == kept[1] == kept[2]


@over_representatives("divprune", "divprune+fastv", "pyramiddrop")
def test_compiled_decoding_in_one_graph(family: tiny.Family, method: Method) -> None:
    case = sharp(family)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    gc.collect()  # a compressed model that an earlier test forgot must not tidy up in the middle of a trace
    torch.compiler.reset()
    compiled = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compiled._compile_all_devices = True
    mode = {**GREEDY, "cache_implementation": "static", "compile_config": compiled, "output_logits": True}
    ours, theirs = compressed_and_reference(case, method, case.batch("ragged"), mode, {**GREEDY, "output_logits": True})
    assert len(graphs) == 1, "one graph for all decode steps"
    assert torch.equal(ours.sequences, theirs.sequences)
    error = reference.max_error(reference.stacked_logits(ours), reference.stacked_logits(theirs))
    assert error <= tolerance(case)


@over_representatives("divprune+fastv")
def test_a_static_cache_is_reused_clean(family: tiny.Family, method: Method) -> None:
    # transformers keeps the static cache on the model and resets it: what we noted about it has to go as well.
    case = sharp(family)
    inputs = case.batch("ragged")
    mode = {**GREEDY, "cache_implementation": "static"}
    plain = say(case.model, inputs, **mode).sequences
    with method.on(case.model) as model:
        first = say(model, inputs, **mode).sequences
        assert torch.equal(say(model, inputs, **mode).sequences, first)
    assert torch.equal(say(case.model, inputs, **mode).sequences, plain)


class Forced(LogitsProcessor):
    """Says `token` at one step, whatever the model wants."""

    def __init__(self, length: int, token: int) -> None:
        self.length, self.token = length, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.token] = 0.0
        return scores


@over_representatives("divprune", "divprune+fastv")
def test_a_generated_placeholder_is_no_picture(family: tiny.Family, method: Method) -> None:
    case = sharp(family)
    inputs = case.batch("ragged")
    mode = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "logits_processor": [Forced(inputs["input_ids"].shape[1] + 2, tiny.IMAGE)],
        "return_dict_in_generate": True,
    }
    with method.on(case.model) as model:
        ours = model.generate(**inputs, **mode)
        report = vtc.report(model)
    assert (ours.sequences[:, -STEPS:] == tiny.IMAGE).any(dim=1).all()
    theirs = reference.Reference.of(case.model, inputs, report).generate(**mode)
    assert torch.equal(ours.sequences, theirs.sequences)


def extended(inputs: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """The same batch with text tokens appended."""
    out = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
    out["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in out:
            out[name] = torch.nn.functional.pad(inputs[name], (0, tokens.shape[1]), value=0)
    return out


# -------------------------------------------------------------------------------------------- embeddings for ids

WITHOUT_IDS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "static-cache": {"do_sample": False, "cache_implementation": "static"},
    "no-cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize(("kind", "mode"), [("single", "greedy"), *(("two_images", mode) for mode in WITHOUT_IDS)])
@over_representatives("divprune", "fastv", "divprune+fastv")
def test_embeddings_instead_of_ids(family: tiny.Family, method: Method, kind: str, mode: str) -> None:
    case = sharp(family)
    inputs = case.batch(kind)
    ids = inputs.pop("input_ids")
    if family.name.startswith("qwen"):  # which cannot tell the positions of pictures without their ids
        inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        inputs["inputs_embeds"] = case.model.get_input_embeddings()(ids)
    plain = say(case.model, inputs, **WITHOUT_IDS[mode]).sequences
    with method.at(1.0).on(case.model) as model:
        assert torch.equal(say(model, inputs, **WITHOUT_IDS[mode]).sequences, plain)
    with method.on(case.model) as model:
        packed = say(model, inputs, **WITHOUT_IDS[mode]).sequences
        report = vtc.report(model)
        if family.name in ("llava", "internvl"):  # whose answer does not depend on how the prompt is given
            known = say(model, {**inputs, "inputs_embeds": None, "input_ids": ids}, **WITHOUT_IDS[mode]).sequences
            assert torch.equal(packed, known[:, ids.shape[1] :])
    assert len(report.segments) == (1 if kind == "single" else 4)
    assert all(segment.tokens_after < segment.tokens_before for segment in report.segments)
    assert not torch.equal(packed, plain)


# ------------------------------------------------------------------------------------------- continuous batching


@pytest.mark.skipif(not PREFILLS_IN_CHUNKS, reason="the continuous batching of older releases takes minutes on a CPU")
def test_continuous_batching_of_text() -> None:
    # transformers' continuous batching takes ids alone: there are no pictures to compress, and text is never touched.
    case = sharp(tiny.family("llava"))
    prompts = [[1, 5, 6, 7, 8], [1, 9, 10]]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=tiny.PAD, eos_token_id=-1)

    def answers() -> list[list[int]]:
        outputs = case.model.generate_batch(inputs=prompts, generation_config=config)
        return [outputs[name].generated_tokens for name in sorted(outputs)]

    plain = answers()
    assert [len(tokens) for tokens in plain] == [4, 4]
    with method("divprune+fastv").on(case.model):
        assert answers() == plain


def test_pictures_in_a_paged_cache_are_refused() -> None:
    case = sharp(tiny.family("llava"))
    with method("divprune").on(case.model) as model, pytest.raises(vtc.UnsupportedModelError, match="PagedCache"):
        model(**case.batch("single"), past_key_values=type("PagedCache", (), {})())
