"""A pass of the first decoder layers over the prompt, made to choose by: what it reads, costs and leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.invariants.matrix import build, sharp
from vtc.engine.cache import CACHE, cache_in


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
@torch.no_grad()
def test_the_choice_is_that_of_the_untouched_models_layer(name: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    attention = reference.text_model(case.model).layers[1].self_attn
    seen: list[Any] = []

    # The choice is worked out from what the untouched model's attention writes into a cache and its own projection.
    hook = attention.register_forward_hook(lambda m, a, k, o: seen.append(k), with_kwargs=True)
    out = case.model(**inputs, use_cache=True)
    hook.remove()
    keys = out[CACHE].layers[1].keys
    (given,) = seen
    queries = _queries(attention, given)
    with vtc.compressed(case.model, "gemfilter", keep_ratio=0.4, layer=1) as model:
        model(**inputs)
        report = vtc.report(model)
    width = inputs["input_ids"].shape[1]
    for segment in report.segments:
        real = inputs["attention_mask"][segment.row].bool()
        groups = queries.shape[1] // keys.shape[1]
        last = queries[segment.row, :, -1].unflatten(0, (-1, groups)).sum(dim=1)
        logits = torch.einsum("hd,hnd->n", last, keys[segment.row]).masked_fill(~real, 0.0)
        padded = torch.nn.functional.pad(logits, (2, 2))
        pooled = torch.stack([padded[i : i + width] for i in range(5)]).mean(dim=0)
        columns = _columns(case, inputs, report, segment)
        kept = torch.zeros(len(columns), dtype=torch.bool)
        kept[segment.selections[0][1].keep] = True
        assert pooled[columns[kept]].min() >= pooled[columns[~kept]].max() - 1e-4


def _queries(attention: Any, given: dict[str, Any]) -> torch.Tensor:
    """(B, H, T, d) queries of an attention module, with its own parts."""
    module = __import__(type(attention).__module__, fromlist=["x"])
    hidden = given["hidden_states"]
    q = attention.q_proj(hidden).view(*hidden.shape[:2], -1, attention.head_dim)
    q = (attention.q_norm(q) if hasattr(attention, "q_norm") else q).transpose(1, 2)
    return module.apply_rotary_pos_emb(q, q, *given["position_embeddings"])[0]


def _columns(case: tiny.TinyCase, inputs: dict[str, Any], report: vtc.Report, segment: Any) -> torch.Tensor:
    columns = reference.placeholder_columns(case.model, inputs["input_ids"], segment.row, segment.modality)
    start = sum(s.tokens_before for s in report.segments if s.row == segment.row and s.index < segment.index)
    columns = columns[start : start + segment.tokens_before]
    return columns[~reference.structural_columns(case.model, inputs)[segment.row, columns]]


@torch.no_grad()
def test_a_probe_costs_its_layers_and_leaves_no_cache() -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    ran: list[tuple[int, int, bool]] = []
    for layer, module in enumerate(reference.text_model(case.model).layers):
        module.register_forward_pre_hook(
            lambda m, a, k, layer=layer: ran.append((layer, a[0].shape[1], cache_in(k) is not None)), with_kwargs=True
        )
    done: list[int] = []
    for layer, module in enumerate(reference.text_model(case.model).layers):
        module.register_forward_hook(lambda m, a, o, layer=layer: done.append(layer))
    length = inputs["input_ids"].shape[1]
    with vtc.compressed(case.model, "gemfilter", keep_ratio=0.25, layer=2) as model:
        model(**inputs)
        report = vtc.report(model)
    kept = length - 12
    assert ran == [(layer, length, False) for layer in range(3)] + [(layer, kept, True) for layer in range(4)]
    assert done == [0, 1, 0, 1, 2, 3], "of the last layer of the probe only queries and keys are made"
    assert report.probed_layers == 2
    plain = vtc.compressed(case.model, "uniform", keep_ratio=0.25)
    with plain as model:
        model(**inputs)
        without = vtc.report(model)
    extra = [own - other for own, other in zip(report.flops_after, without.flops_after, strict=True)]
    assert extra == [report.flops_before[0], report.flops_before[1], 0, 0]
    assert "2 decoder layers read the whole prompt first" in str(report)


@torch.no_grad()
def test_without_a_picture_there_is_no_probe() -> None:
    case = build(tiny.family("llava"))
    ran: list[int] = []
    reference.text_model(case.model).layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    ids = torch.arange(10, 20)[None]
    with vtc.compressed(case.model, "gemfilter", keep_ratio=0.25, layer=2) as model:
        model(input_ids=ids)
        assert vtc.report(model).probed_layers == 0
    assert len(ran) == 1


def test_recurrent_decoders_are_refused() -> None:
    model = build(tiny.family("qwen3_5")).model
    with pytest.raises(vtc.UnsupportedMethodError, match=r"gemfilter reads attention inside the decoder.*recurrent"):
        vtc.compress(model, "gemfilter", keep_ratio=0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"layer": 4}, "gemfilter reads decoder layer 4; this model has layers 0 to 3"), ({"kernel": 2}, "odd integer")],
)
def test_mistakes_are_named(options: dict[str, Any], match: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises(vtc.ConfigError, match=match):
        vtc.compress(model, "gemfilter", keep_ratio=0.5, **options)
