"""Invariant 11: tokens that merge on entering a decoder layer are as if the untouched model were told so.

The reference runs every layer of the untouched model on all tokens. On entering a layer where tokens merge it writes
the weighted sums over those that stay, and hides the others from there on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.invariants.matrix import Method, borrowed, build, sharp, sharp_borrowed
from tests.invariants.test_2_masking import decode_error, prefill_error
from tests.invariants.test_8_towers import masked, seen_towers
from vtc.engine.cache import CACHE
from vtc.errors import UnsupportedMethodError

FAMILIES = tuple(family for family in tiny.FAMILIES if not family.hybrid and family.like is None)
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Pairs(vtc.Selector):
    """Merges every token into the last of its group: weighted by its place, or to plain means."""

    name, paper = "pairs", "a test"
    sites = (vtc.BeforeDecoder, vtc.DecoderLayer)
    adaptive = True
    every: int = 2
    weighted: bool = True
    declared: bool = True

    def stages(self, shape: Any = None, keep_ratio: float | None = None) -> tuple[vtc.Stage, ...]:
        return (vtc.Stage(action=vtc.Action.MERGE if self.declared else vtc.Action.KEEP),)

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        if ctx.budget == ctx.n:
            return vtc.Selection.full(ctx.n)
        slots = torch.arange(ctx.n) // self.every
        keep = torch.cat([(slots.diff() > 0).nonzero()[:, 0], torch.tensor([ctx.n - 1])])
        weight = None
        if self.weighted:
            raw = 1.0 + torch.arange(ctx.n) % 5
            weight = raw / torch.zeros(len(keep)).index_add(0, slots, raw)[slots]
        return vtc.Selection(ctx.n, keep, slots, weight)


@pytest.fixture(autouse=True)
def _pairs() -> None:
    vtc.register_selector(Pairs)


def pairs(layer: int, keep_ratio: float = 0.5, **options: Any) -> vtc.CompressionConfig:
    return vtc.CompressionConfig("pairs", keep_ratio=keep_ratio, at=f"decoder:{layer}", options=options)


SETTINGS: dict[str, tuple[vtc.CompressionConfig, ...]] = {
    "at layer 1": (pairs(1),),
    "at layers 1 and 3": (pairs(1, every=3), pairs(3, weighted=False)),
    "behind other stages": (
        vtc.CompressionConfig("pool", keep_ratio=0.8),
        vtc.CompressionConfig("fastv", keep_ratio=0.7, options={"layer": 1}),
        pairs(2),
        vtc.CompressionConfig("fastv", keep_ratio=0.5, options={"layer": 3}),
    ),
}


def method(name: str) -> Method:
    return Method(name, SETTINGS[name], merges=True, decoder=True)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_merging_equals_the_untouched_model_told_so(family: tiny.Family, name: str) -> None:
    case = sharp_borrowed(family)
    # Selections merge in the precision of the model if that is float64. The whole answer is that to a ragged batch.
    for kind in ("two_images", "no_image_row"):
        error, dropped = prefill_error(case, method(name), case.batch(kind))
        assert dropped > 0
        assert error <= TOLERANCE, (kind, error)
    assert decode_error(case, method(name), case.batch("ragged")) <= TOLERANCE


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_behind_a_tower_that_lost_patches(name: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("two_images")
    stages = [vtc.CompressionConfig("random", keep_ratio=0.7, at="vision:1"), pairs(2)]
    with vtc.compressed(case.model, stages) as model, seen_towers() as towers:
        ours = model(**inputs).logits
        report = vtc.report(model)
    with masked(case.model, "image", towers[0]):
        expected = reference.Reference.of(case.model, inputs, report)
        theirs = expected.prefill().logits
    assert reference.max_error(ours[expected.visible], theirs[expected.visible]) <= TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_without_a_cache_the_prompt_merges_again(family: str) -> None:
    case = sharp(tiny.family(family))
    inputs = case.batch("ragged")
    said = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vtc.compressed(case.model, pairs(2)) as model:
        cached = model.generate(**inputs, **said)
        plain = model.generate(**inputs, **said, use_cache=False)
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        report = vtc.report(model)
    assert reference.max_error(reference.stacked_logits(cached), reference.stacked_logits(plain)) <= TOLERANCE
    expected = reference.Reference.of(case.model, inputs, report)
    assert torch.equal(beams, expected.generate(max_new_tokens=4, num_beams=3, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_batch_equals_its_rows(family: tiny.Family) -> None:
    case = sharp_borrowed(family)
    said = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for kind in ("two_images", "no_image_row"):
        with vtc.compressed(case.model, pairs(2, every=3)) as model:
            together = reference.stacked_logits(model.generate(**case.batch(kind), **said))
            alone = [reference.stacked_logits(model.generate(**row, **said)) for row in case.rows(kind)]
        assert reference.max_error(together, torch.cat(alone)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_keeping_all_changes_no_bit(family: tiny.Family) -> None:
    case = borrowed(family)
    inputs, plain = case.batch("ragged"), case.plain("ragged").logits
    with vtc.compressed(case.model, pairs(2, 1.0)) as model:
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_equal_hidden_states_merge_into_themselves() -> None:
    """Where the tokens of a group are equal, merging them and dropping all but the last are the same."""
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    layers = reference.text_model(case.model).layers
    columns = reference.placeholder_columns(case.model, inputs["input_ids"], 0, "image")

    def make_equal(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].clone()
        if hidden.shape[1] > columns.max():
            hidden[:, columns] = hidden[:, columns[1::2].repeat_interleave(2)]
        return (hidden, *args[1:]), kwargs

    drop_odd = dataclasses.make_dataclass(
        "LastOfPairs",
        [],
        bases=(vtc.Selector,),
        frozen=True,
        namespace={
            "name": "last-of-pairs",
            "paper": "a test",
            "select": lambda self, ctx: vtc.Selection(ctx.n, torch.arange(1, ctx.n, 2)),
        },
    )
    vtc.register_selector(drop_odd)
    logits = []
    for config in (pairs(2), vtc.CompressionConfig("last-of-pairs", keep_ratio=0.5, at="decoder:2")):
        # Installed first, so that the states are equal when the stage comes.
        handle = layers[2].register_forward_pre_hook(make_equal, with_kwargs=True)
        with vtc.compressed(case.model, config) as model:
            logits.append(model(**inputs).logits[:, -1])
        handle.remove()
    with vtc.compressed(case.model, pairs(2)) as model:
        other = model(**inputs).logits[:, -1]
    assert reference.max_error(*logits) <= TOLERANCE
    assert reference.max_error(logits[0], other) > 1e-3


@torch.no_grad()
def test_caches_from_the_layer_on_are_shorter() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    with vtc.compressed(case.model, pairs(2)) as model:
        cache = model(**inputs)[CACHE]
    length = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, length, length - 8, length - 8]


def test_gradients_are_those_of_the_merged_states() -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    with vtc.compressed(case.model, pairs(2)) as model:
        out = model(**inputs).logits
        report = vtc.report(model)
        expected = reference.Reference.of(model, inputs, report)
        out[expected.visible].sum().backward()
        ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    case.model.zero_grad()
    expected.prefill().logits[expected.visible].sum().backward()
    for name, weight in case.model.named_parameters():
        if weight.grad is not None and "layers.0" in name and "language_model" in name:
            assert torch.allclose(ours[name], weight.grad, rtol=1e-6, atol=1e-8), name


def test_checkpointed_layers_merge_again() -> None:
    """Up to transformers 5.22 checkpointing runs the hooks of a layer again, later only the layer."""
    gradients = []
    for checkpointing in (False, True):
        case = sharp(tiny.family("llava"))
        case.model.train()
        if checkpointing:
            enable = getattr(case.model, "activation_checkpointing_enable", case.model.gradient_checkpointing_enable)
            enable()
        with vtc.compressed(case.model, [pairs(1), pairs(3, every=3)]) as model:
            model(**case.batch("ragged"), use_cache=False).logits.sum().backward()
        gradients.append({n: w.grad for n, w in case.model.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-9, atol=1e-9), name


def test_a_stage_that_did_not_say_so_is_refused() -> None:
    case = build(tiny.family("llava"))
    vtc.compress(case.model, pairs(2, declared=False))
    with pytest.raises(UnsupportedMethodError, match="merged tokens at 'decoder:2' though its stage declares"):
        case.model(**case.batch("single"))
