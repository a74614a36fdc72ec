"""What stages inside the decoder read: attention of the layer that they enter, and of the text and its raters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtc
from tests import reference, tiny
from tests.invariants.matrix import build, method, sharp
from tests.invariants.test_2_masking import decode_error, prefill_error
from tests.invariants.test_11_merging_in_decoders import TOLERANCE
from vtc.core.signals import HiddenStates, Signal
from vtc.engine.cache import CACHE
from vtc.selectors.dart import KeyLength, PromptStates, TextPivots
from vtc.selectors.pyramiddrop import EnteringAttention
from vtc.selectors.sparsevlm import Raters, TextRows, TextRowsOfHeads, raters_of, score_text

pytestmark = pytest.mark.usefixtures("registries_as_found")

LAYER = 2
FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "gemma3", "paligemma")


@contextlib.contextmanager
def seen(*signals: Signal) -> Iterator[list[vtc.VisualContext]]:
    """Register a method that reads these signals on entering a layer, and collect what it is shown."""
    shown: list[vtc.VisualContext] = []

    @vtc.register_selector
    @dataclasses.dataclass(frozen=True)
    class Reader(vtc.Selector):
        name, paper, adaptive = "reader", "a test", True

        def stages(self, shape: Any = None, keep_ratio: float | None = None) -> tuple[vtc.Stage, ...]:
            return (vtc.Stage(vtc.DecoderLayer(LAYER), signals),)

        def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
            shown.append(ctx)
            return vtc.Selection.full(ctx.n)

    yield shown


def attentions(case: tiny.TinyCase, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """(B, H, L, L) of a decoder layer of the untouched model."""
    case.model.set_attn_implementation("eager")
    try:
        return case.model(**inputs, output_attentions=True).attentions[layer]
    finally:
        case.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_attention_of_the_layer_that_is_entered(family: str) -> None:
    case = build(tiny.family(family))
    inputs = case.batch("ragged")
    with seen(EnteringAttention()) as shown, vtc.compressed(case.model, "reader", keep_ratio=0.5) as model:
        ours = model(**inputs).logits
    assert torch.equal(ours, case.model(**inputs).logits), "looking ahead changes nothing"
    rows = attentions(case, inputs, LAYER)[:, :, -1]
    places = [(0, 0), (1, 0), (1, 1)]
    columns = {row: reference.placeholder_columns(case.model, inputs["input_ids"], row, "image") for row in (0, 1)}
    start = {0: 0, 1: 0}
    for (row, _), ctx in zip(places, shown, strict=True):
        here = columns[row][start[row] : start[row] + ctx.n]
        start[row] += ctx.n
        torch.testing.assert_close(ctx[EnteringAttention][:, 0], rows[row][:, here], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_looking_ahead_computes_keys_and_one_query() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    counts = []
    with seen(EnteringAttention()), vtc.compressed(case.model, "reader", keep_ratio=0.5) as model:
        for pause in (contextlib.nullcontext(), vtc.disabled(model)):
            with FlopCounterMode(display=False) as flops, pause:
                model(**inputs)
            counts.append(flops.get_total_flops())
    attention = reference.text_model(case.model).layers[LAYER].self_attn
    queries, keys = (
        2 * inputs["input_ids"].shape[1] * each.weight.numel() for each in (attention.q_proj, attention.k_proj)
    )
    assert keys < counts[0] - counts[1] < keys + queries // 2
    assert "forward" not in vars(attention.q_proj), "taken off again"


@pytest.mark.parametrize("cached", [False, True], ids=["one prompt", "second turn"])
@torch.no_grad()
def test_looking_ahead_sees_the_earlier_conversation(cached: bool) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    columns = reference.placeholder_columns(case.model, inputs["input_ids"], 0, "image")
    with seen(EnteringAttention()) as shown, vtc.compressed(case.model, "reader", keep_ratio=0.5) as model:
        if cached:
            first = int(columns[0]) - 1
            said = model(input_ids=inputs["input_ids"][:, :first], use_cache=True)[CACHE]
            rest = {"input_ids": inputs["input_ids"][:, first:], "pixel_values": inputs["pixel_values"]}
            model(**rest, **{CACHE: said})
        else:
            model(**inputs)
    rows = attentions(case, inputs, LAYER)[0, :, -1]
    torch.testing.assert_close(shown[0][EnteringAttention][:, 0], rows[:, columns].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["after", "all"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_the_text_and_its_raters(family: str, text: str) -> None:
    case = build(tiny.family(family))
    inputs = case.batch("ragged")
    signals = (Raters(text), TextRows(text), TextRowsOfHeads(text))
    embeds = reference.merged_embeddings(case.model, inputs)
    with seen(*signals) as shown, vtc.compressed(case.model, "reader", keep_ratio=0.5) as model:
        model(**inputs)
    everything = attentions(case, inputs, LAYER - 1)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    start = {0: 0, 1: 0}
    for row, ctx in zip((0, 1, 1), shown, strict=True):
        columns = reference.placeholder_columns(case.model, ids, row, "image")
        words = real[row] & (ids[row] != tiny.IMAGE)
        if text == "after":
            words[: int(columns[0])] = False
        here = columns[start[row] : start[row] + ctx.n]
        start[row] += ctx.n
        raters = raters_of(score_text(embeds[row, here], embeds[row, words]))
        assert torch.equal(ctx[Raters], raters)
        assert 0 < int(raters.sum()) < len(raters)
        rows = everything[row][:, words][:, :, here]  # (H, T, N)
        by_head = ctx[TextRowsOfHeads(text)][..., : len(raters)]
        torch.testing.assert_close(by_head, rows.permute(2, 0, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ctx[TextRows(text)][:, : len(raters)], rows.mean(dim=0).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "paligemma"])
@torch.no_grad()
def test_what_dart_reads_inside_the_decoder(family: str) -> None:
    """Keys of the layer in front with their rotations, as the cache has them, and hidden states on entering."""
    case = build(tiny.family(family))
    inputs = case.batch("ragged")
    signals = (HiddenStates(), KeyLength(), TextPivots(3), PromptStates())
    with seen(*signals) as shown, vtc.compressed(case.model, "reader", keep_ratio=0.5) as model:
        model(**inputs)
    entering: list[torch.Tensor] = []
    layer = reference.text_model(case.model).layers[LAYER]
    handle = layer.register_forward_pre_hook(lambda module, args, kwargs: entering.append(args[0]), with_kwargs=True)
    keys = case.model(**inputs, use_cache=True)[CACHE].layers[LAYER - 1].keys
    handle.remove()
    length = keys.abs().sum(dim=(1, 3))
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    start = {0: 0, 1: 0}
    for row, ctx in zip((0, 1, 1), shown, strict=True):
        columns = reference.placeholder_columns(case.model, ids, row, "image")
        here = columns[start[row] : start[row] + ctx.n]
        start[row] += ctx.n
        later = real[row] & (ids[row] != tiny.IMAGE) & (torch.arange(ids.shape[1]) > columns[0])
        torch.testing.assert_close(ctx[KeyLength], length[row, here], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ctx[HiddenStates], entering[0][row, here], rtol=1e-4, atol=1e-5)
        best = length[row].masked_fill(~later, -1.0).topk(3).indices
        assert ctx[TextPivots].tolist() == best.tolist()
        torch.testing.assert_close(ctx[PromptStates][best], entering[0][row, best], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl", "gemma3"])
def test_recycling_equals_the_untouched_model_told_so(family: str) -> None:
    case = sharp(tiny.family(family))
    for kind in ("single", "ragged"):
        error, dropped = prefill_error(case, method("sparsevlm"), case.batch(kind))
        assert dropped > 0
        assert error <= TOLERANCE, (kind, error)
    assert decode_error(case, method("sparsevlm"), case.batch("ragged")) <= TOLERANCE


@torch.no_grad()
def test_text_in_front_of_the_picture_alone_is_refused_by_name() -> None:
    case = build(tiny.family("paligemma"))
    inputs = case.collate((tiny.Row(0, 4, ((None, 0),), 9),))
    llava = build(tiny.family("llava"))
    columns = reference.placeholder_columns(llava.model, llava.batch("single")["input_ids"], 0, "image")
    whole = llava.batch("single")
    end = int(columns[-1]) + 1
    cut = {**whole, "input_ids": whole["input_ids"][:, :end], "attention_mask": whole["attention_mask"][:, :end]}
    vtc.compress(llava.model, "sparsevlm", keep_ratio=0.5)
    with pytest.raises(vtc.InputError, match=r'sparsevlm needs text_rows, but row 0 .* or give text="all"'):
        llava.model(**cut)
    with vtc.compressed(llava.model, "sparsevlm", keep_ratio=0.5, text="all") as model:
        model(**cut)
    with vtc.compressed(case.model, "sparsevlm", keep_ratio=0.5) as model:
        model(**inputs)  # the picture comes first
