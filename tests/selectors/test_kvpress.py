"""Presses of kvpress: asked by their own functions, traced, refused by name. A stand-in replaces the package."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import reference, tiny
from tests.engine.test_eviction import STEPS, hiding
from tests.engine.test_other_caches import offloading, quantized
from tests.invariants.matrix import build, sharp, tolerance
from vtc.engine.cache import CACHE
from vtc.selectors import kvpress as integration


@dataclass
class BasePress:
    def post_init_from_model(self, model: Any) -> None:
        assert hasattr(model, "layers")

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        raise NotImplementedError

    def forward_hook(self, *_: Any) -> Any:
        raise AssertionError("the package's hook is not ours")

    def __call__(self, model: Any) -> Any:
        raise AssertionError("the package's context is not ours")


@dataclass
class ScorerPress(BasePress):
    compression_ratio: float = 0.0

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> torch.Tensor:
        raise NotImplementedError

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = scores.topk(int(keys.shape[2] * (1 - self.compression_ratio)), dim=-1).indices[..., None]
        return tuple(x.gather(2, kept.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))  # type: ignore[return-value]


@dataclass
class LongPress(ScorerPress):
    """Keeps long values, and looks at whatever a press may look at."""

    power: float = 1.0

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> torch.Tensor:
        n = keys.shape[2]
        cos, sin = kwargs["position_embeddings"]
        assert hidden_states.shape[:2] == cos.shape[:2] == sin.shape[:2] == (1, n)
        assert values.shape == keys.shape
        future = module.rotary_emb(hidden_states, torch.arange(n, n + 3)[None])
        assert future[0].shape[-2] == 3
        assert module.config.head_dim == keys.shape[3]
        assert attentions is None or attentions.shape[-2:] == (n, n)
        return values.norm(dim=-1) ** self.power


@dataclass
class AroundPress(BasePress):
    press: Any

    def compress(self, *arguments: Any) -> tuple[Any, Any]:
        keys, values = self.press.compress(*arguments)
        return keys[:, :, 1:], values[:, :, 1:]


@dataclass
class LatePress(BasePress):
    """Knows its ratio when it has run."""

    seen: int = 0

    @property
    def compression_ratio(self) -> float:
        assert self.seen, "it has not run"
        return 0.25

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        self.seen = keys.shape[2]
        return keys[:, :, self.seen // 4 :], values[:, :, self.seen // 4 :]


@dataclass
class ChangingPress(ScorerPress):
    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        keys.mul_(2)
        return keys, values


@dataclass
class MaskingPress(ScorerPress):
    def compress(self, module: Any, *arguments: Any) -> tuple[Any, Any]:
        module.masked_key_indices = (0, 0)
        return arguments[1], arguments[2]


@dataclass
class HookedPress(BasePress):
    def forward_hook(self, *_: Any) -> Any:
        return None


@dataclass
class BrokenPress(ScorerPress):
    def score(self, *_: Any) -> torch.Tensor:
        raise ZeroDivisionError("no such layer")


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("kvpress")
    for cls in (
        BasePress,
        ScorerPress,
        LongPress,
        AroundPress,
        LatePress,
        ChangingPress,
        MaskingPress,
        HookedPress,
        BrokenPress,
    ):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "kvpress", module)
    integration._made.cache_clear()
    yield
    integration._made.cache_clear()


@pytest.mark.parametrize("scope", ["visual", "all"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
@torch.no_grad()
def test_what_a_press_drops_is_as_if_masked(name: str, scope: str) -> None:
    case = sharp(tiny.family(name))
    inputs = case.batch("ragged")
    attributes = [set(layer.self_attn.__dict__) for layer in reference.text_model(case.model).layers]
    values = [layer.values for layer in case.model(**inputs)[CACHE].layers]
    with vtc.compressed(case.model, vtc.press(LongPress(0.5), scope=scope)) as model:
        ours = model.generate(**inputs, **STEPS)
        report = vtc.report(model)
    with hiding(case.model, report.entries, inputs["input_ids"].shape[1]):
        theirs = case.model.generate(**inputs, **STEPS)
    assert reference.max_error(torch.stack(ours.logits), torch.stack(theirs.logits)) <= tolerance(case)
    assert attributes == [set(layer.self_attn.__dict__) for layer in reference.text_model(case.model).layers]

    real = inputs["attention_mask"].bool()
    for layer, stored in enumerate(report.entries):
        for row in range(len(real)):
            lengths = values[layer][row].norm(dim=-1)
            movable = real[row]
            if scope == "visual":
                movable = torch.zeros_like(movable)
                movable[reference.placeholder_columns(case.model, inputs["input_ids"], row, "image")] = True
            for head, own in enumerate(lengths):
                kept = torch.zeros_like(movable)
                kept[stored[row, head][stored[row, head] >= 0]] = True
                assert own[kept & movable].min() >= own[~kept & movable].max()
                if scope == "all":
                    assert int(kept.sum()) == int(real[row].sum() * 0.5)


@pytest.mark.parametrize("scope", ["visual", "all"])
@torch.no_grad()
def test_presses_work_on_quantized_and_offloaded_caches(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = sharp(tiny.family("llava"))
    inputs = case.batch("ragged")

    def run(**mode: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with vtc.compressed(case.model, vtc.press(LongPress(0.5), scope=scope)) as model:
            logits = model.generate(**inputs, **STEPS, **mode).logits
            return torch.stack(logits), vtc.report(model).entries

    plain, entries = run()
    with offloading(monkeypatch) as moved:
        found, same = run(cache_implementation="offloaded")
    assert moved
    assert torch.equal(found, plain)
    assert all(map(torch.equal, same, entries))
    # As kvpress does, a press ranks what the cache holds, which is rounded.
    found, own = run(**{CACHE: quantized("rounded", residual=4)})
    assert [part.shape for part in own] == [part.shape for part in entries]
    with hiding(case.model, own, inputs["input_ids"].shape[1]):
        theirs = case.model.generate(**inputs, **STEPS, **{CACHE: quantized("rounded", residual=4)}).logits
    assert reference.max_error(found, torch.stack(theirs)) <= tolerance(case)
    assert reference.max_error(found, plain) > 1e-4, "it was quantized"


@torch.no_grad()
def test_a_press_around_another_says_how_many_stay() -> None:
    case = build(tiny.family("llava"))
    config = vtc.press(AroundPress(LongPress(0.5, power=2.0)), scope="all")
    with vtc.compressed(case.model, config) as model:
        model(**case.batch("single"))
        report = vtc.report(model)
    assert {n for (n,) in report.stored_per_layer} == {report.lengths_before[0] // 2 - 1}


@torch.no_grad()
def test_a_press_that_has_run_can_be_used_again() -> None:
    case = build(tiny.family("llava"))
    for _ in range(2):
        with vtc.compressed(case.model, vtc.press(LatePress(), scope="all")) as model:
            model(**case.batch("single"))
            report = vtc.report(model)
        before = report.lengths_before[0]
        assert {n for (n,) in report.stored_per_layer} == {before - before // 4}


def test_a_press_survives_its_file(tmp_path: Path) -> None:
    config = vtc.press(LongPress(0.75, power=2.0), seed=3, budgets="pyramid")
    assert config.keep_ratio == 0.25
    path = tmp_path / "press.json"
    config.save(path)
    assert vtc.CompressionConfig.load(path) == config
    described = json.loads(path.read_text())["options"]["press"]
    assert described == {"name": "LongPress", "compression_ratio": 0.75, "power": 2.0}
    around = vtc.press(AroundPress(LongPress(0.5)), scope="all")
    assert vtc.CompressionConfig.from_json(around.to_json()) == around


@pytest.mark.parametrize(
    ("press", "scope", "match"),
    [
        (AroundPress(LongPress(0.5)), "visual", "does not only rank entries"),
        (HookedPress(), "all", "in a hook of its own"),
        (AroundPress(HookedPress()), "all", "in a hook of its own"),
    ],
    ids=str,
)
def test_presses_that_cannot_be_used_are_refused_before_anything(press: Any, scope: str, match: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises(vtc.UnsupportedMethodError, match=match):
        vtc.compress(model, vtc.press(press, scope=scope))
    assert not vtc.is_compressed(model)


@pytest.mark.parametrize(
    ("press", "match"),
    [
        (ChangingPress(0.5), "ChangingPress changes keys or values"),
        (MaskingPress(0.5), "MaskingPress masks other numbers"),
        (BrokenPress(0.5), "BrokenPress failed on this model: ZeroDivisionError"),
    ],
    ids=str,
)
@torch.no_grad()
def test_presses_that_fail_are_named_and_change_nothing(press: Any, match: str) -> None:
    case = build(tiny.family("llava"))
    inputs = case.batch("single")
    plain = case.model(**inputs).logits
    attributes = set(case.model.get_decoder().layers[0].self_attn.__dict__)
    config, failing = vtc.press(press, scope="all"), pytest.raises(vtc.UnsupportedMethodError, match=match)
    with vtc.compressed(case.model, config) as model, failing:
        model(**inputs)
    assert torch.equal(case.model(**inputs).logits, plain)
    assert set(case.model.get_decoder().layers[0].self_attn.__dict__) == attributes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"press": "NoPress"}, "kvpress has no press 'NoPress'; it has AroundPress, BasePress"),
        ({"press": 3}, "press is a class of kvpress or a mapping with its `name`, got 3"),
        ({"press": {"name": "LongPress", "length": 2}}, "LongPress does not take the options"),
        ({"press": {"name": "LongPress", "compression_ratio": 0.1}, "scope": "all"}, "give keep_ratio=0.9"),
    ],
    ids=str,
)
def test_wrong_descriptions_are_refused(options: dict[str, Any], match: str) -> None:
    model = build(tiny.family("llava")).model
    with pytest.raises(vtc.ConfigError, match=match):
        vtc.compress(model, "kvpress", keep_ratio=0.5, **options)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    model = build(tiny.family("llava")).model
    with pytest.raises(vtc.ConfigError, match=r'pip install "vtc\[kvpress\]"'):
        vtc.compress(model, "kvpress", keep_ratio=0.5)
    assert "pip install" in vtc.list_methods(model)["kvpress"]
    with pytest.raises(vtc.ConfigError, match="needs the package kvpress"):
        vtc.press(object())
