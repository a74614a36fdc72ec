"""Entries of the key-value cache that leave once the prompt was read: as if masked from the first decode step on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.invariants.matrix import PREFILLS_IN_CHUNKS, build, sharp, tolerance
from vtc.engine.cache import CACHE

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "internvl", "idefics3", "glm4v")
STEPS = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}


@contextlib.contextmanager
def hiding(model: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Mask these columns (B, P) of the prompt at every decode step of an untouched model."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs["inputs_embeds"].shape[1] != 1:
            return None
        mask = kwargs.get("attention_mask")
        length = kwargs[CACHE].get_seq_length() + 1
        rows = len(kwargs["inputs_embeds"])
        mask = torch.ones(rows, length, dtype=torch.long) if mask is None else mask.clone()
        mask[:, : hidden.shape[1]] *= (~hidden).repeat_interleave(rows // len(hidden), dim=0)
        return args, {**kwargs, "attention_mask": mask}

    handle = reference.text_model(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def evicted(case: tiny.TinyCase, inputs: dict[str, Any], report: vtc.Report) -> torch.Tensor:
    masks = reference.keep_masks(case.model, inputs, report)
    return ~masks[reference.BEFORE_LM]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("method", ["uniform", "random"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_evicted_is_as_if_masked_at_every_later_step(name: str, method: str, mode: dict[str, Any]) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, method, keep_ratio=0.4, at="cache") as model:
        ours = model.generate(**inputs, **STEPS, **mode, do_sample=False)
        report = vtc.report(model)
    with hiding(case.model, evicted(case, inputs, report)):
        theirs = case.model.generate(**inputs, **STEPS, **mode, do_sample=False)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.logits[0], theirs.logits[0]), "the prompt was read with all its tokens"
    error = reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits))
    assert error <= tolerance(case)
    untouched = case.model.generate(**inputs, **STEPS, **mode, do_sample=False)
    assert not torch.equal(torch.stack(untouched.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_caches_are_as_small_as_reported(name: str) -> None:
    case = build(tiny.family(name))
    with vtc.compressed(case.model, "uniform", keep_ratio=0.25, at="cache") as model:
        cache = model(**case.batch("single"))[CACHE]
        report = vtc.report(model)
    assert report.kv_bytes_after == tuple(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sum(report.kv_bytes_after) < sum(report.kv_bytes_before)
    assert report.flops_after == report.flops_before, "no layer of the prefill is spared anything"
    assert [str(site) for site, _ in report.segments[0].selections] == ["cache"]


@torch.no_grad()
def test_sites_compose_down_to_the_cache() -> None:
    case = build(tiny.family("llava"))
    configs = [vtc.CompressionConfig("uniform", keep_ratio=0.5, at=at) for at in ("decoder", "decoder:2", "cache")]
    with vtc.compressed(case.model, configs) as model:
        cache = model(**case.batch("single"))[CACHE]
        report = vtc.report(model)
    text = report.lengths_before[0] - 16
    assert report.visual_tokens_per_layer == (8, 8, 4, 4)
    assert [layer.keys.shape[2] - text for layer in cache.layers] == [2, 2, 2, 2]
    assert report.visual_tokens_after == 2


@torch.no_grad()
def test_a_second_turn_with_a_new_image() -> None:
    case = build(tiny.family("llava"))
    first, second = case.batch("single"), case.batch("single")
    with vtc.compressed(case.model, "uniform", keep_ratio=0.5, at="cache") as model:
        cache = model(**first)[CACHE]
        stored = cache.layers[0].keys.shape[2]
        length = first["input_ids"].shape[1]
        mask = torch.ones(1, 2 * length, dtype=torch.long)
        model(**{**second, "attention_mask": mask}, **{CACHE: cache})
    assert cache.get_seq_length() == 2 * length
    assert cache.layers[0].keys.shape[2] == 2 * stored


@pytest.mark.parametrize("kind", ["ragged", "right_padded"])
@torch.no_grad()
def test_keeping_everything_and_restoring(kind: str) -> None:
    case = build(tiny.family("qwen2_5_vl"))
    inputs = case.batch(kind)
    plain = case.model.generate(**inputs, **STEPS, do_sample=False)
    with vtc.compressed(case.model, "uniform", keep_ratio=1.0, at="cache") as model:
        assert torch.equal(
            torch.stack(model.generate(**inputs, **STEPS, do_sample=False).logits), torch.stack(plain.logits)
        )
    again = case.model.generate(**inputs, **STEPS, do_sample=False)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        ({"cache_implementation": "static"}, "dynamic cache, but this one has layers of type StaticLayer"),
        ({"use_cache": False}, "needs a key-value cache"),
        pytest.param(
            {"prefill_chunk_size": 7},
            "needs the whole prompt at once",
            marks=pytest.mark.skipif(not PREFILLS_IN_CHUNKS, reason="this release cannot split a prompt with images"),
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_caches_that_cannot_lose_entries_are_refused(mode: dict[str, Any], match: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, "uniform", keep_ratio=0.5, at="cache") as model:
        with pytest.raises(vtc.UnsupportedMethodError, match=match):
            model.generate(**inputs, max_new_tokens=3, **mode)
        model.generate(**inputs, max_new_tokens=3)


@pytest.mark.parametrize(
    ("name", "method", "match"),
    [
        ("gemma3", "uniform", "gemma3 slides windows over its caches"),
        ("paligemma", "random", "paligemma lets images see each other in both directions"),
        ("qwen3_5", "uniform", "recurrent"),
        ("llava", "divprune", "divprune cannot work at 'cache'; it can at: pixels, vision:K, decoder, decoder:K"),
    ],
)
def test_models_and_methods_without_the_site_are_refused(name: str, method: str, match: str) -> None:
    model = build(tiny.family(name)).model
    with pytest.raises(vtc.UnsupportedMethodError, match=match):
        vtc.compress(model, method, keep_ratio=0.5, at="cache")
    assert not vtc.is_compressed(model)
