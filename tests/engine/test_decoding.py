"""Entries that leave the caches at every step of decoding: as if masked from the next step on, and never too many."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import vtc
from tests import reference, tiny
from tests.invariants.matrix import build, sharp, tolerance
from vtc.core.eviction import DecodingState
from vtc.engine.cache import CACHE, cache_in
from vtc.engine.masks import allowed_keys
from vtc.engine.preallocated import PreallocatedLayer
from vtc.registry import get_selector

STEPS: dict[str, Any] = {
    "max_new_tokens": 14,
    "min_new_tokens": 14,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
METHODS: dict[str, dict[str, Any]] = {
    "streaming": {"sinks": 2},
    "prefixkv": {},
    "h2o": {"recent": 4},
}


class Simulated:
    """The entries of every layer, row and head by the rule of a method, kept as lists of columns."""

    def __init__(self, model: Any, method: Any, report: vtc.Report, width: int) -> None:
        self.model, self.method, self.width = model, method, width
        self.read = report.lengths_before
        heads = reference.text_model(model).config.num_key_value_heads
        self.entries = [
            [[own[own >= 0].tolist() for own in row.expand(heads, -1)] for row in layer]
            for layer in report.entries or ()
        ]
        self.kept = [[len(row[0]) for row in layer] for layer in self.entries]
        self.scores: list[list[list[dict[int, float]]]] = [
            [[{} for _ in row] for row in layer] for layer in self.entries
        ]

    def mask(self, layer: int, rows: int, heads: int, length: int) -> torch.Tensor:
        """(B, H, 1, length) bool: what the new token sees."""
        seen = torch.zeros(rows, heads, 1, length, dtype=torch.bool)
        for b, row in enumerate(self.entries[layer]):
            share = heads // len(row)
            for h, columns in enumerate(row):
                seen[b, h * share : (h + 1) * share, 0, columns] = True
        seen[..., -1] = True
        return seen

    def step(self, layer: int, column: int, attention: torch.Tensor | None) -> None:
        """Add the entry of a token, and take out what leaves."""
        for b, row in enumerate(self.entries[layer]):
            seen = self.read[b] + column - self.width + 1
            for h, columns in enumerate(row):
                columns.append(column)
                known = self.scores[layer][b][h]
                if attention is not None:
                    share = attention.shape[1] // len(row)
                    received = attention[b, h * share : (h + 1) * share, 0].mean(dim=0)
                    for c in columns:
                        known[c] = known.get(c, 0.0) + float(received[c])
                leaving = self.method.leaving(
                    DecodingState(layer, len(columns), self.kept[layer][b], seen, self.read[b])
                )
                for _ in range(leaving.count):
                    place = leaving.place
                    if place is None:
                        old = columns[: len(columns) - leaving.recent]
                        place = columns.index(min(old, key=lambda c: known[c]))
                    del columns[place]


@contextlib.contextmanager
def following(simulated: Simulated) -> Iterator[None]:
    """Mask an untouched model, step by step, as the rule says."""
    model, handles = simulated.model, []
    config = reference.text_model(model).config

    def pre_hook(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] != 1:
                return None
            length = cache_in(kwargs).get_seq_length(layer) + 1
            mask = simulated.mask(layer, len(hidden), config.num_attention_heads, length)
            given = allowed_keys(kwargs.get("attention_mask"))
            mask = mask if given is None else mask & given[..., -length:]
            if config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def after_hook(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if kwargs["hidden_states"].shape[1] == 1:
                column = cache_in(kwargs).get_seq_length(layer) - 1
                simulated.step(layer, column, output[1])

        return hook

    for layer, module in enumerate(reference.text_model(model).layers):
        handles.append(module.register_forward_pre_hook(pre_hook(layer), with_kwargs=True))
        handles.append(module.self_attn.register_forward_hook(after_hook(layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(case: tiny.TinyCase, name: str, inputs: dict[str, Any], keep: float = 0.5, **mode: Any) -> Any:
    options = {"scope": "all", "at": "cache:decoding", **METHODS[name]}
    with vtc.compressed(case.model, name, keep_ratio=keep, **options) as model:
        return model.generate(**inputs, **{**STEPS, **mode}), vtc.report(model)


@pytest.mark.parametrize("kind", ["single", "ragged", "right_padded"])
@pytest.mark.parametrize("method", ["streaming", "prefixkv"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_what_leaves_at_a_step_is_as_if_masked_from_the_next(name: str, method: str, kind: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch(kind)
    ours, report = run(case, method, inputs)
    rule = get_selector(method, scope="all", **METHODS[method])
    simulated = Simulated(case.model, rule, report, inputs["input_ids"].shape[1])
    with following(simulated):
        theirs = case.model.generate(**inputs, **STEPS)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= tolerance(case)
    for layer, cached in enumerate(ours.past_key_values.layers):
        assert cached.keys.shape[2] == max(len(row[0]) for row in simulated.entries[layer])
    if method == "streaming":
        assert [len(row[0]) for row in simulated.entries[0]] == simulated.kept[0], "the budget is kept"
        assert 0 in [column - len(inputs["input_ids"][0]) for column in simulated.entries[0][0][0]]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_attention_of_each_step_counts(name: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("single")
    case.model.set_attn_implementation("eager")  # which tells its attention
    full = case.model(**inputs, output_attentions=True).attentions
    ours, report = run(case, "h2o", inputs)
    rule = get_selector("h2o", scope="all", **METHODS["h2o"])
    simulated = Simulated(case.model, rule, report, inputs["input_ids"].shape[1])
    for layer, attention in enumerate(full):
        heads = len(simulated.entries[layer][0])
        sums = attention[0].sum(dim=1).unflatten(0, (heads, -1)).mean(dim=1)
        for h, columns in enumerate(simulated.entries[layer][0]):
            simulated.scores[layer][0][h] = {c: float(sums[h, c]) for c in columns}
    before = [list(columns) for columns in simulated.entries[1][0]]
    with following(simulated):
        theirs = case.model.generate(**inputs, **STEPS)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= 1e-5  # sums are in float32
    assert [cached.keys.shape[2] for cached in ours.past_key_values.layers] == [layer[0] for layer in simulated.kept]
    assert before[0] != before[1], "heads keep other entries"


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_batch_equals_its_rows(method: str) -> None:
    case = sharp(tiny.family("llava"))
    for kind in ("ragged", "no_image_row"):
        together, _ = run(case, method, case.batch(kind))
        for row, inputs in enumerate(case.rows(kind)):
            if "pixel_values" in inputs:
                alone, _ = run(case, method, inputs)
            else:
                alone = case.model.generate(**inputs, **STEPS)
            logits = torch.stack(together.logits)[:, row]
            assert reference.max_error(logits, torch.stack(alone.logits)[:, 0]) <= tolerance(case), (kind, row)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_beams_and_samples_keep_the_budget(method: str, mode: dict[str, Any]) -> None:
    case = sharp(tiny.family("qwen2_5_vl"))
    inputs = case.batch("ragged")
    torch.manual_seed(0)
    out, report = run(case, method, inputs, **mode)
    assert all(step.isfinite().all() for step in out.logits)
    lengths = [max(stored) for stored in report.stored_per_layer]
    grown = [cached.keys.shape[2] - n for cached, n in zip(out.past_key_values.layers, lengths, strict=True)]
    assert all(0 <= n <= (8 if method == "prefixkv" else 0) for n in grown)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_beam_says_what_greedy_decoding_says_of_its_tokens(method: str) -> None:
    """Beams copy rows of the caches and of what is known of them."""
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    options = {"scope": "all", "at": "cache:decoding", **METHODS[method]}
    with vtc.compressed(case.model, method, keep_ratio=0.5, **options) as model:
        out = model.generate(**inputs, **{**STEPS, "num_beams": 3, "output_logits": False, "output_scores": True})
        cache = model(**inputs)[CACHE]
        total = 0.0
        for step, token in enumerate(out.sequences[0, inputs["input_ids"].shape[1] :]):
            if step == 0:
                logits = model(**inputs).logits[0, -1]
            total += float(logits.log_softmax(dim=-1)[token])
            length = inputs["input_ids"].shape[1] + step + 1
            mask = torch.ones(1, length, dtype=torch.long)
            logits = model(input_ids=token[None, None], attention_mask=mask, **{CACHE: cache}).logits[0, -1]
    length = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert float(out.sequences_scores[0]) * length == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_turn_of_text_leaves_the_budget_as_it_was(method: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    options = {"scope": "all", "at": "cache:decoding", **METHODS[method]}
    length = inputs["input_ids"].shape[1]
    with vtc.compressed(case.model, method, keep_ratio=0.5, **options) as model:
        cache = model(**inputs)[CACHE]
        before = [layer.keys.shape[2] for layer in cache.layers]
        mask = torch.ones(1, length + 5, dtype=torch.long)
        model(input_ids=torch.arange(10, 15)[None], attention_mask=mask, **{CACHE: cache})
        after = [layer.keys.shape[2] for layer in cache.layers]
        again = case.batch("single")
        mask = torch.ones(1, 2 * length + 5, dtype=torch.long)
        model(**{**again, "attention_mask": mask}, **{CACHE: cache})
        report = vtc.report(model)
        third = [layer.keys.shape[2] for layer in cache.layers]
    assert cache.get_seq_length() == 2 * length + 5
    if method != "prefixkv":  # it lets one leave per pass
        assert after == before
    assert third == [n + own for n, (own,) in zip(after, report.stored_per_layer, strict=True)]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_nothing_leaves_while_compression_is_paused(method: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    length = inputs["input_ids"].shape[1]
    with vtc.compressed(
        case.model, method, keep_ratio=0.5, scope="all", at="cache:decoding", **METHODS[method]
    ) as model:
        cache = model(**inputs)[CACHE]
        before = [layer.keys.shape[2] for layer in cache.layers]
        with vtc.disabled(model):
            for step in range(3):
                mask = torch.ones(1, length + step + 1, dtype=torch.long)
                model(input_ids=torch.tensor([[11 + step]]), attention_mask=mask, **{CACHE: cache})
        assert [layer.keys.shape[2] for layer in cache.layers] == [n + 3 for n in before]
        model(
            input_ids=torch.tensor([[9]]), attention_mask=torch.ones(1, length + 4, dtype=torch.long), **{CACHE: cache}
        )
    after = [layer.keys.shape[2] for layer in cache.layers]
    assert after == ([n + 3 for n in before] if method == "prefixkv" else before)


@torch.no_grad()
def test_drafts_are_refused() -> None:
    case = build(tiny.family("llava"))
    options = {"scope": "all", "at": "cache:decoding"}
    with vtc.compressed(case.model, "streaming", keep_ratio=0.5, **options) as model:
        with pytest.raises(vtc.UnsupportedMethodError, match="streaming at 'cache:decoding' has evicted entries"):
            model.generate(**case.batch("single"), max_new_tokens=6, prompt_lookup_num_tokens=3)
        model.generate(**case.batch("single"), max_new_tokens=6)


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        (
            "random",
            {},
            "random cannot work at 'cache:decoding'; it can at: pixels, vision:K, decoder, decoder:K, cache",
        ),
        ("snapkv", {"scope": "all"}, "snapkv cannot work at 'cache:decoding'; it can at: cache"),
        ("streaming", {}, "give scope='all'"),
    ],
)
def test_what_cannot_evict_while_decoding_is_refused(method: str, options: dict[str, Any], match: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises((vtc.UnsupportedMethodError, vtc.ConfigError), match=match):
        vtc.compress(model, method, keep_ratio=0.5, at="cache:decoding", **options)
    assert not vtc.is_compressed(model)


def test_a_layer_with_room_holds_what_a_dynamic_one_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> torch.Tensor:
        return torch.randn(2, 3, length, 4, generator=generator)

    plain, roomy = DynamicLayer(), DynamicLayer()
    first = drawn(7), drawn(7)
    for layer in (plain, roomy):
        layer.update(*first)
    roomy.__class__ = PreallocatedLayer
    copies = set()
    for step in range(150):
        new = drawn(1 + step % 2), drawn(1 + step % 2)
        for layer in (plain, roomy):
            layer.update(*new)
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        if step == 40:
            for layer in (plain, roomy):
                layer.reorder_cache(torch.tensor([1, 1]))
        if step == 80:
            for layer in (plain, roomy):
                layer.crop(-2)
        assert torch.equal(plain.keys, roomy.keys)
        assert torch.equal(plain.values, roomy.values)
        copies.add(roomy.keys.untyped_storage().data_ptr())
    assert len(copies) <= 8, "not one per step"
    again = copy.deepcopy(roomy)
    new = drawn(1), drawn(1)
    for layer in (plain, roomy, again):
        layer.update(*new)
    assert torch.equal(plain.keys, roomy.keys)
    assert torch.equal(plain.keys, again.keys)
