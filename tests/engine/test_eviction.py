"""Methods that choose per layer and head which entries leave the caches: as if masked there from the next step on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache, cache_utils

import vtc
from tests import reference, tiny
from tests.invariants.matrix import PREFILLS_IN_CHUNKS, build, sharp, tolerance
from vtc.core.eviction import CacheContext, CacheSelector, Eviction
from vtc.engine.cache import CACHE, cache_in, record_of
from vtc.engine.masks import allowed_keys

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen2_5_vl_video", "qwen3_vl", "internvl", "idefics3", "glm4v")
STEPS: dict[str, Any] = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
DEPTH = 4

METHODS = {
    "snapkv": {"window": 4, "kernel": 3},
    "h2o": {"budgets": "squeeze"},
    "streaming": {"budgets": [0.9, 0.1, 0.2, 0.4]},
    "prefixkv": {},
    "light-transfer": {"budgets": {"name": "lazy", "initial": 2, "recent": 3}},
    "chunkkv": {"window": 4, "length": 3},
    "defensivekv": {"window": 4, "kernel": 3},
    "triattention": {},
}
"""Per head and per layer, with equal and other lengths, and by every observation."""


@contextlib.contextmanager
def hiding(model: Any, entries: Sequence[torch.Tensor], prompt: int, past: int = 0) -> Iterator[None]:
    """Mask, in steps of one token of an untouched model, the columns of the prompt that are not among `entries`.

    `entries` are those of the report: (B, G, P) columns per layer. The mask of each layer gets a head axis.
    """
    handles = []

    def pre_hook(layer: int, stored: torch.Tensor) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] != 1:
                return None
            config = reference.text_model(model).config
            rows, heads = len(hidden), config.num_attention_heads
            length = cache_in(kwargs).get_seq_length(layer) + 1
            kept = torch.ones(len(stored), stored.shape[1], length, dtype=torch.bool)
            kept[..., past : past + prompt] = False
            for row, own in enumerate(stored):
                for group, columns in enumerate(own):
                    kept[row, group, past + columns[columns >= 0]] = True
            kept = kept.repeat_interleave(rows // len(stored), dim=0).repeat_interleave(heads // kept.shape[1], dim=1)
            given = allowed_keys(kwargs.get("attention_mask"))
            if given is not None:
                kept = kept & given[:, :, 0, -length:]
            return args, {**kwargs, "attention_mask": kept[:, :, None]}

        return hook

    layers = reference.text_model(model).layers
    for layer, stored in enumerate(entries):
        handles.append(layers[layer].register_forward_pre_hook(pre_hook(layer, stored), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(case: tiny.TinyCase, method: str, inputs: dict[str, Any], *, keep: float = 0.4, **arguments: Any) -> Any:
    mode = {**STEPS, **arguments.pop("mode", {})}
    options = {**METHODS.get(method, {}), **arguments}
    if isinstance(options.get("budgets"), list):  # some tiny decoders are deeper
        deeper = len(reference.text_model(case.model).layers) - DEPTH
        options["budgets"] = options["budgets"] + deeper * [keep]
    with vtc.compressed(case.model, method, keep_ratio=keep, **options) as model:
        return model.generate(**inputs, **mode), vtc.report(model)


@pytest.mark.parametrize("scope", ["visual", "all"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_evicted_is_as_if_masked_in_each_layer_and_head(name: str, method: str, scope: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    ours, report = run(case, method, inputs, scope=scope)
    assert report.scope == scope
    with hiding(case.model, report.entries, inputs["input_ids"].shape[1]):
        theirs = case.model.generate(**inputs, **STEPS)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.logits[0], theirs.logits[0]), "the prompt was read with all its tokens"
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= tolerance(case)
    untouched = case.model.generate(**inputs, **STEPS)
    assert not torch.equal(torch.stack(untouched.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
@pytest.mark.parametrize("method", ["snapkv", "prefixkv"])
@torch.no_grad()
def test_beams(method: str, mode: dict[str, Any]) -> None:
    case = sharp(tiny.family("qwen2_5_vl"))
    inputs = case.batch("ragged")
    ours, report = run(case, method, inputs, mode=mode)
    with hiding(case.model, report.entries, inputs["input_ids"].shape[1]):
        theirs = case.model.generate(**inputs, **STEPS, **mode)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= tolerance(case)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_sampling_draws_as_the_masked_model(method: str) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    torch.manual_seed(3)
    ours, report = run(case, method, inputs, mode={"do_sample": True})
    with hiding(case.model, report.entries, inputs["input_ids"].shape[1]):
        torch.manual_seed(3)
        theirs = case.model.generate(**inputs, **{**STEPS, "do_sample": True})
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_prompt_lookup_changes_nothing(method: str) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    plain, report = run(case, method, inputs)
    guessed, again = run(case, method, inputs, mode={"prompt_lookup_num_tokens": 3})
    assert torch.equal(plain.sequences, guessed.sequences)
    for one, other in zip(report.entries, again.entries, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scope", ["visual", "all"])
@pytest.mark.parametrize("method", [*METHODS, "elastic-cache"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_a_batch_equals_its_rows(name: str, method: str, scope: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    together, report = run(case, method, inputs, scope=scope)
    width = inputs["input_ids"].shape[1]
    for row, own in enumerate(case.rows("ragged")):
        alone, single = run(case, method, own, scope=scope)
        pad = width - own["input_ids"].shape[1]
        for layer, (many, one) in enumerate(zip(report.entries, single.entries, strict=True)):
            ours = [columns[columns >= 0] for columns in many[row]]
            expected = [columns[columns >= 0] for columns in one[0]]
            assert all(torch.equal(a, b + pad) for a, b in zip(ours, expected, strict=True)), f"layer {layer}"
        logits = torch.stack(together.logits)[:, row]
        assert reference.max_error(logits, torch.stack(alone.logits)[:, 0]) <= tolerance(case)


@pytest.mark.parametrize("method", [*METHODS, "elastic-cache"])
@pytest.mark.parametrize("kind", ["ragged", "right_padded"])
@torch.no_grad()
def test_keeping_everything_and_restoring(kind: str, method: str) -> None:
    case = build(tiny.family("qwen2_5_vl"))
    inputs = case.batch(kind)
    options = {"budgets": "uniform"} if method == "streaming" else {}
    plain = case.model.generate(**inputs, **STEPS)
    ours, report = run(case, method, inputs, keep=1.0, **options)
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
    assert report.kv_bytes_after == report.kv_bytes_before
    again = case.model.generate(**inputs, **STEPS)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("method", [*METHODS, "elastic-cache"])
@torch.no_grad()
def test_caches_are_as_small_as_reported(method: str) -> None:
    case = build(tiny.family("qwen2_5_vl"))
    with vtc.compressed(case.model, method, keep_ratio=0.4, **METHODS.get(method, {})) as model:
        cache = model(**case.batch("single"))[CACHE]
        report = vtc.report(model)
    held = tuple(
        layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in cache.layers
    )
    assert report.kv_bytes_after == held, "nothing else is kept alive"
    assert sum(report.kv_bytes_after) < sum(report.kv_bytes_before)
    assert report.flops_after == report.flops_before
    text = report.lengths_before[0] - report.visual_tokens_before
    visual = sum(n - text for (n,) in report.stored_per_layer) / len(cache.layers)
    whole_layers = report.visual_tokens_before / len(cache.layers) if method == "light-transfer" else 0
    assert visual <= 0.4 * report.visual_tokens_before + 1 + whole_layers
    assert "Entries of visual tokens may leave" in str(report)
    assert "cache entries, mean over layers" in str(report)


@torch.no_grad()
def test_layers_keep_what_their_fractions_say() -> None:
    case = build(tiny.family("llava"))
    _, report = run(case, "streaming", case.batch("single"), scope="visual")
    text = report.lengths_before[0] - 16
    assert [n - text for (n,) in report.stored_per_layer] == [14, 2, 3, 6]


@torch.no_grad()
def test_after_tokens_have_left_at_earlier_sites() -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    configs = [
        vtc.CompressionConfig("uniform", keep_ratio=0.75, at="decoder"),
        vtc.CompressionConfig("uniform", keep_ratio=0.5, at="decoder:2"),
        vtc.CompressionConfig("snapkv", keep_ratio=0.5, options=METHODS["snapkv"]),
    ]
    with vtc.compressed(case.model, configs[:2]) as model:
        model.generate(**inputs, **STEPS)
        before = vtc.report(model)
    with vtc.compressed(case.model, configs) as model:
        ours = model.generate(**inputs, **STEPS)
        report = vtc.report(model)
    text = report.lengths_before[0] - 16
    assert [n[0] - text for n in report.stored_per_layer] == [6, 6, 3, 3]
    masked = reference.Reference.of(case.model, inputs, before)
    with hiding(case.model, report.entries, inputs["input_ids"].shape[1]):
        theirs = masked.generate(**STEPS)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= tolerance(case)


@pytest.mark.parametrize("method", ["snapkv", "prefixkv", "elastic-cache"])
@torch.no_grad()
def test_a_second_turn_with_a_new_picture(method: str) -> None:
    case = build(tiny.family("llava"))
    first, second = case.batch("single"), case.batch("single")
    length = first["input_ids"].shape[1]
    with vtc.compressed(case.model, method, keep_ratio=0.5, **METHODS.get(method, {})) as model:
        cache = model(**first)[CACHE]
        stored = [layer.keys.shape[2] for layer in cache.layers]
        mask = torch.ones(1, 2 * length, dtype=torch.long)
        model(**{**second, "attention_mask": mask}, **{CACHE: cache})
        report = vtc.report(model)
    assert cache.get_seq_length() == 2 * length
    own = [layer.keys.shape[2] - before for layer, before in zip(cache.layers, stored, strict=True)]
    assert own == [n for (n,) in report.stored_per_layer]
    assert sum(own) <= sum(stored) + DEPTH
    for entries, count in zip(report.entries, own, strict=True):  # what the first turn left is none of this prompt's
        assert (entries >= 0).sum(dim=2).unique().tolist() == [count]
    record: Any = record_of(cache)
    assert record.logical == 2 * length


@contextlib.contextmanager
def hiding_earlier_prompts(model: Any, prompts: list[tuple[int, int, Sequence[torch.Tensor]]]) -> Iterator[None]:
    """Mask, for all queries behind each of these prompts of one row, what its report does not name.

    `prompts` has the first column, the length and the entries of each, and may grow while this is entered.
    """
    heads, handles = reference.text_model(model).config.num_attention_heads, []

    def pre_hook(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
            length = cache_in(kwargs).get_seq_length(layer) + queries
            seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries).repeat(heads, 1, 1)
            for first, width, entries in prompts:
                if first + width <= length - queries:
                    stored = entries[layer][0]
                    kept = torch.zeros(len(stored), width, dtype=torch.bool)
                    for group, columns in enumerate(stored):
                        kept[group, columns[columns >= 0]] = True
                    seen[..., first : first + width] &= kept.repeat_interleave(heads // len(kept), dim=0)[:, None]
            return args, {**kwargs, "attention_mask": seen[None]}

        return hook

    for layer, module in enumerate(reference.text_model(model).layers):
        handles.append(module.register_forward_pre_hook(pre_hook(layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def talk(model: Any, inputs: dict[str, Any], prompts: list[Any] | None = None, **first: Any) -> torch.Tensor:
    """Logits of two turns with a picture each, the same one, and of four steps behind them.

    What is stored of each turn's prompt is added to `prompts`; `first` are more arguments of the first turn.
    """
    length = inputs["input_ids"].shape[1]
    cache = model(**inputs, **first)[CACHE]
    if prompts is not None:
        prompts.append((0, length, vtc.report(model).entries))
    mask = torch.ones(1, 2 * length, dtype=torch.long)
    found = [model(**{**inputs, "attention_mask": mask}, **{CACHE: cache}).logits]
    if prompts is not None:
        prompts.append((length, length, vtc.report(model).entries))
    for step in range(4):
        mask = torch.ones(1, 2 * length + step + 1, dtype=torch.long)
        found.append(model(input_ids=torch.tensor([[11 + step]]), attention_mask=mask, **{CACHE: cache}).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("scope", ["visual", "all"])
@pytest.mark.parametrize("method", ["snapkv", "prefixkv", "h2o"])
@torch.no_grad()
def test_two_turns_with_pictures_are_as_if_masked(method: str, scope: str) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    prompts: list[Any] = []
    with vtc.compressed(case.model, method, keep_ratio=0.4, scope=scope, **METHODS[method]) as model:
        ours = talk(model, inputs, prompts)
    with hiding_earlier_prompts(case.model, prompts):
        theirs = talk(case.model, inputs)
    assert reference.max_error(ours, theirs) <= tolerance(case)
    assert reference.max_error(talk(case.model, inputs), ours) > 1e-3, "something was hidden"


def means_of(entries: torch.Tensor, keep: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What Elastic Cache makes of keys or values (H, N, d) at `places`, by a loop."""
    slots: dict[int, list[int]] = {int(i): [int(i)] for i in keep}
    for i in range(len(places)):
        if i not in slots:
            slots[min(keep.tolist(), key=lambda k: (abs(int(places[i] - places[k])), k))].append(i)
    return torch.stack([entries[:, members].mean(dim=1) for members in slots.values()], dim=1)


@torch.no_grad()
def test_evicted_entries_are_merged_into_the_nearest_that_stay() -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    full = case.model(**inputs)[CACHE]
    with vtc.compressed(case.model, "elastic-cache", keep_ratio=0.25) as model:
        small = model(**inputs)[CACHE]
        report = vtc.report(model)
    columns = reference.placeholder_columns(case.model, inputs["input_ids"], 0, "image")
    for layer, stored in enumerate(report.entries):
        kept = torch.isin(columns, stored[0, 0]).nonzero()[:, 0]
        at = torch.isin(stored[0, 0], columns)
        for ours, all_of_it in (
            (small.layers[layer].keys, full.layers[layer].keys),
            (small.layers[layer].values, full.layers[layer].values),
        ):
            expected = means_of(all_of_it[0][:, columns], kept, columns)
            torch.testing.assert_close(ours[0][:, at], expected, rtol=1e-6, atol=1e-6)
            text = stored[0, 0][~at]
            assert torch.equal(ours[0][:, ~at], all_of_it[0][:, text])


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
def test_caches_that_cannot_lose_entries_are_refused_before_the_prompt_is_read(
    mode: dict[str, Any], match: str
) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("ragged")
    read = []
    hook = reference.text_model(case.model).layers[0].register_forward_hook(lambda *_: read.append(1))
    with vtc.compressed(case.model, "snapkv", keep_ratio=0.5) as model:
        with pytest.raises(vtc.UnsupportedMethodError, match=match):
            model.generate(**inputs, max_new_tokens=3, **mode)
        assert not read or "prefill_chunk_size" in mode
        model.generate(**inputs, max_new_tokens=3)
    hook.remove()


@torch.no_grad()
def test_sliding_windows_are_refused_by_name() -> None:
    case = build(tiny.family("llava"))
    cache = DynamicCache()
    cache.layers = [cache_utils.DynamicSlidingWindowLayer(4)]
    refused = pytest.raises(vtc.UnsupportedMethodError, match="layers of type DynamicSlidingWindowLayer")
    with vtc.compressed(case.model, "snapkv", keep_ratio=0.5) as model, refused:
        model(**case.batch("single"), **{CACHE: cache})
    assert not cache.get_seq_length(), "nothing was read"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gemma3", "gemma3 slides windows over its caches"),
        ("paligemma", "paligemma lets images see each other in both directions"),
        ("qwen3_5", "recurrent"),
    ],
)
def test_models_whose_caches_cannot_lose_entries_are_refused(name: str, match: str) -> None:
    model = build(tiny.family(name)).model
    with pytest.raises(vtc.UnsupportedMethodError, match=match):
        vtc.compress(model, "snapkv", keep_ratio=0.5)
    assert not vtc.is_compressed(model)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"scope": "text"}, "scope must be one of"),
        ({"budgets": "steep"}, "budgets must be a sequence of fractions"),
        ({"budgets": {"name": "pyramid", "slope": 2}}, "budgets must be a sequence of fractions"),
        ({"budgets": [0.5, 0.5]}, "2 fractions, but this model has 4 decoder layers"),
        ({"budgets": [0.1, 0.1, 0.1, 0.1]}, "keeps 0.100 on average, but keep_ratio=0.5"),
        ({"budgets": [0.1, 0.1, 0.1, 1.7]}, "between 0 and 1"),
        ({"budgets": {"name": "lazy", "recent": -1}}, "recent must be an integer of at least 0"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"kernel": 4}, "kernel must be an odd integer"),
        ({"at": "decoder"}, "snapkv cannot work at 'decoder'; it can at: cache"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(arguments: dict[str, Any], match: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises((vtc.ConfigError, vtc.UnsupportedMethodError), match=match):
        vtc.compress(model, "snapkv", keep_ratio=0.5, **arguments)
    assert not vtc.is_compressed(model)


def test_two_methods_cannot_choose_at_the_caches() -> None:
    model = build(tiny.family("llava")).model
    configs = [vtc.CompressionConfig(name, keep_ratio=0.5, at="cache") for name in ("random", "snapkv")]
    with pytest.raises(vtc.ConfigError, match="random and snapkv cannot both work at 'cache'"):
        vtc.compress(model, configs)


@dataclass(frozen=True)
class Wrong(CacheSelector):
    """Answers with whatever it is told to."""

    name: ClassVar[str] = "wrong"
    paper: ClassVar[str] = "none"
    heads: int = 1
    more: int = 0

    def score(self, ctx: CacheContext) -> torch.Tensor:
        raise NotImplementedError

    def evict(self, ctx: CacheContext) -> Eviction:
        return Eviction(ctx.n, torch.arange(ctx.budget + self.more).expand(self.heads, -1))


@pytest.mark.parametrize("options", [{"heads": 3}, {"more": 1}], ids=str)
@torch.no_grad()
def test_answers_of_another_size_are_refused(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(tiny.family("llava"))
    monkeypatch.setattr("vtc.engine.plan.get_selector", lambda name, **_: Wrong(**options))
    wrong = pytest.raises(vtc.InputError, match="wrong was asked for 8 of 16 entries of layer 0")
    with vtc.compressed(case.model, "wrong", keep_ratio=0.5) as model, wrong:
        model(**case.batch("single"))
