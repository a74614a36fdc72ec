"""Caches that are quantized or offloaded: what leaves them is as if masked in a cache of the same kind."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

import vtc
from tests import reference, tiny
from tests.engine.test_eviction import METHODS, STEPS, hiding, hiding_earlier_prompts, run, talk
from tests.invariants.matrix import build, sharp, tolerance
from vtc.core.sites import CacheAfterPrefill
from vtc.engine.cache import CACHE
from vtc.engine.entries import keys_and_values, replace_keys_and_values

LAYERS = 4
WIDTH = 16
"""Of a head of the tiny LLaVA."""


class RoundedLayer(QuantizedLayer):
    """A quantized layer that needs no other package: integers of `nbits` between the extremes of each group."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        groups = tensor.reshape(-1, self.q_group_size)
        low, high = groups.aminmax(dim=1, keepdim=True)
        step = ((high - low) / (2**self.nbits - 1)).clamp(min=1e-12)
        return ((groups - low) / step).round().to(torch.uint8), step, low, tensor.shape

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        numbers, step, low, shape = q_tensor
        return (numbers * step + low).reshape(shape)


def _layer(kind: str, *, group: int = WIDTH, residual: int = 128) -> Any:
    options = {"q_group_size": group, "residual_length": residual}
    if kind == "rounded":
        return RoundedLayer(**options)
    if kind == "quanto":
        return cache_utils.QuantoQuantizedLayer(**options)
    if kind == "hqq":
        return cache_utils.HQQQuantizedLayer(axis_key=1, axis_value=1, **options)
    return cache_utils.Fp8QuantizedLayer()


def quantized(kind: str, **options: Any) -> Cache:
    return Cache(layers=[_layer(kind, **options) for _ in range(LAYERS)])


def _needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


KINDS = [
    pytest.param("rounded"),
    pytest.param(
        "fp8", marks=pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this release has none")
    ),
    pytest.param("quanto", marks=_needs("optimum")),
    pytest.param("hqq", marks=_needs("hqq")),
]


SINCE_5_24 = hasattr(QuantizedLayer, "_apply_pending_reorder")


def _stored(cache: Cache) -> list[int]:
    return [keys_and_values(cache, layer)[0].shape[2] for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((method, "rounded") for method in METHODS),
        *(pytest.param("uniform", kind.values[0], marks=kind.marks) for kind in KINDS),
    ],
)
@torch.no_grad()
def test_evicted_from_a_quantized_cache_is_as_if_masked_in_one(method: str, kind: str) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    cache, other = quantized(kind, residual=4), quantized(kind, residual=4)  # quantised again while decoding
    at = {"at": "cache"} if method == "uniform" else {}
    ours, report = run(case, method, inputs, mode={CACHE: cache}, **at)
    prompt = inputs["input_ids"].shape[1]
    assert min(_stored(cache)) < prompt + STEPS["max_new_tokens"] - 1
    assert _stored(cache) == [layer.get_seq_length() for layer in cache.layers]
    entries = report.entries or [_columns(case, inputs, report)] * LAYERS
    with hiding(case.model, entries, prompt):
        theirs = case.model.generate(**inputs, **STEPS, **{CACHE: other})
    assert torch.equal(ours.logits[0], theirs.logits[0]), "the prompt was read with all its tokens"
    bound = 1e-4 if kind == "hqq" else tolerance(case)  # hqq computes in float32
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= bound
    precise, _ = run(case, method, inputs, **at)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(precise.logits)) > 1e-4, "it was quantized"


def _columns(case: tiny.TinyCase, inputs: dict[str, Any], report: vtc.Report) -> torch.Tensor:
    kept = reference.keep_masks(case.model, inputs, report)[reference.BEFORE_LM]
    columns = torch.where(kept, torch.arange(kept.shape[1]), -1)
    return columns[:, None]


@pytest.mark.skipif(not SINCE_5_24, reason="this release leaves a second prompt of any length unquantized")
@pytest.mark.parametrize("kind", KINDS[:2])
@torch.no_grad()
def test_two_turns_with_pictures(kind: str) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("single")
    prompts: list[Any] = []
    with vtc.compressed(case.model, "snapkv", keep_ratio=0.4, **METHODS["snapkv"]) as model:
        ours = talk(model, inputs, prompts, **{CACHE: quantized(kind, residual=1)})
    with hiding_earlier_prompts(case.model, prompts):
        theirs = talk(case.model, inputs, **{CACHE: quantized(kind, residual=1)})
    assert reference.max_error(ours, theirs) <= tolerance(case)


@pytest.mark.skipif(not SINCE_5_24, reason="this release cannot search beams")
@torch.no_grad()
def test_beams() -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    mode = {"num_beams": 2}
    ours, report = run(case, "snapkv", inputs, mode={**mode, CACHE: quantized("rounded")})
    with hiding(case.model, report.entries, inputs["input_ids"].shape[1]):
        theirs = case.model.generate(**inputs, **STEPS, **mode, **{CACHE: quantized("rounded")})
    assert torch.equal(ours.sequences, theirs.sequences)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= tolerance(case)


def test_groups_of_several_entries_round_each_value_once_more() -> None:
    cache, generator = quantized("rounded", group=4 * WIDTH), torch.Generator().manual_seed(0)
    layer: Any = cache.layers[0]
    layer.update(*(torch.randn(1, 2, 32, WIDTH, dtype=torch.double, generator=generator) for _ in range(2)))
    layer.update(*(torch.randn(1, 2, 4, WIDTH, dtype=torch.double, generator=generator) for _ in range(2)))
    before = keys_and_values(cache, 0)
    assert before[0].shape[2] == 36, "those that are not quantized yet among them"
    kept = torch.arange(0, 36, 3)
    replace_keys_and_values(cache, 0, *(entries[:, :, kept] for entries in before))
    after = keys_and_values(cache, 0)
    assert layer.get_seq_length() == 12
    for old, new, stored in zip(before, after, (layer._quantized_keys, layer._quantized_values), strict=True):
        moved = (new - old[:, :, kept]).abs().reshape(-1, 4 * WIDTH)
        assert (moved <= stored[1] / 2 + 1e-12).all()
        assert moved.max() > 0


@torch.no_grad()
def test_groups_that_no_longer_fit_are_refused() -> None:
    case = build(tiny.family("llava"))
    with vtc.compressed(case.model, "snapkv", keep_ratio=0.4) as model:
        with pytest.raises(vtc.UnsupportedMethodError, match="give the cache a q_group_size that divides the width"):
            model(**case.batch("single"), **{CACHE: Cache(layers=[_Strict() for _ in range(LAYERS)])})
        model(**case.batch("single"))


class _Strict(RoundedLayer):
    """Takes no other number of entries than the first."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        if self.__dict__.setdefault("first", tensor.shape[2]) != tensor.shape[2]:
            raise ValueError("no such groups")
        return super()._quantize(tensor, axis)

    def __init__(self) -> None:
        super().__init__(q_group_size=WIDTH)


class _Stream:
    """Stands for a stream of a device that this machine lacks."""

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@contextlib.contextmanager
def offloading(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let transformers offload caches on a machine with a CPU alone; yields the layers that were."""
    moved: list[int] = []
    offload = Cache.offload

    def counted(self: Cache, layer: int, *args: Any, **kwargs: Any) -> None:
        moved.append(layer)
        offload(self, layer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "Stream", _Stream)
        patch.setattr(torch.cuda, "default_stream", lambda device=None: _Stream())
        patch.setattr(Cache, "offload", counted)
        yield moved


@pytest.mark.parametrize("method", ["uniform", "snapkv", "triattention"])
@torch.no_grad()
def test_an_offloaded_cache_loses_what_another_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")
    at = {"at": "cache"} if method == "uniform" else {}
    plain, _ = run(case, method, inputs, **at)
    with offloading(monkeypatch) as moved:
        ours, report = run(case, method, inputs, mode={"cache_implementation": "offloaded"}, **at)
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
    assert moved == list(range(LAYERS)) * STEPS["max_new_tokens"]
    assert report.segments[0].selections[-1][0] == CacheAfterPrefill()


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        (lambda: quantized("rounded"), "this cache is quantized: each layer would be dequantised and quantised whole"),
        (lambda: DynamicCache(offloading=True), "this cache is offloaded: each layer would be carried to the CPU"),
    ],
    ids=["quantized", "offloaded"],
)
@torch.no_grad()
def test_nothing_leaves_them_while_decoding(
    cache: Callable[[], Cache], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build(tiny.family("llava"))
    refused = pytest.raises(vtc.UnsupportedMethodError, match=match)
    with (
        offloading(monkeypatch),
        vtc.compressed(case.model, "streaming", keep_ratio=0.5, at="cache:decoding", scope="all") as model,
    ):
        given = cache()
        with refused:
            model(**case.batch("single"), **{CACHE: given})
        assert not given.get_seq_length(), "nothing was read"
