"""Invariant 4: restore() leaves everything as found, and so does an exception inside a call."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers.masking_utils
import transformers.modeling_utils
from torch import nn

import vtc
from tests import tiny
from tests.invariants.matrix import Method, borrowed, build, method, over_matrix
from vtc.core.context import VisualContext
from vtc.core.selection import Selection
from vtc.engine.install import engine_of
from vtc.engine.state import current_call
from vtc.selectors import Selector

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Written by transformers itself in every forward.
WRITTEN_BY_FORWARD = ("rope_deltas",)


class BoomError(RuntimeError):
    """What the tests throw."""


@dataclass(frozen=True)
class Snapshot:
    """All that a plug-in could leave behind."""

    modules: dict[str, tuple[type, int]]
    hooks: dict[tuple[str, str], list[int]]
    attributes: dict[str, dict[str, int]]
    tensors: dict[str, tuple[int, bytes]]
    config: str
    generation_config: str
    attention: dict[str, Any]
    tables: tuple[dict[str, Any], ...]
    threads: int

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        modules = dict(model.named_modules())
        skip = {*HOOK_TABLES, "_parameters", "_buffers", "_modules", *WRITTEN_BY_FORWARD}
        return cls(
            modules={name: (type(module), id(module)) for name, module in modules.items()},
            hooks={
                (name, table): [id(hook) for hook in getattr(module, table).values()]
                if hasattr(getattr(module, table), "values")
                else list(getattr(module, table))
                for name, module in modules.items()
                for table in HOOK_TABLES
            },
            attributes={
                name: {key: id(value) for key, value in vars(module).items() if key not in skip}
                for name, module in modules.items()
            },
            tensors={
                name: (tensor.data_ptr(), tensor.detach().contiguous().numpy().tobytes())
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            },
            config=model.config.to_json_string(use_diff=False),
            generation_config=model.generation_config.to_json_string(use_diff=False),
            attention={
                name: module.config._attn_implementation
                for name, module in modules.items()
                if hasattr(getattr(module, "config", None), "_attn_implementation")
            },
            tables=tuple(
                dict(part)
                for table in (
                    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS,
                    transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
                )
                for part in (table._local_mapping, table._global_mapping)
            ),
            threads=threading.active_count(),
        )


def assert_unchanged(before: Snapshot, model: nn.Module) -> None:
    after = Snapshot.of(model)
    for field in Snapshot.__dataclass_fields__:
        assert getattr(after, field) == getattr(before, field), field


@pytest.fixture(autouse=True, scope="module")
def _no_models_of_earlier_tests() -> None:
    # One that was never restored is in the attention table until it is collected.
    gc.collect()


def used(case: tiny.TinyCase) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A model that has answered once, so that whatever transformers sets up lazily is there."""
    inputs = case.batch("ragged")
    with torch.no_grad():
        logits = case.model(**inputs).logits
        case.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    return case.model, inputs, logits


@functools.cache
def used_before(family: str) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """One that was compressed by no other test: what the first method left behind would hide what the next leaves."""
    return used(build(tiny.family(family)))


@over_matrix(attentions=("sdpa",))
@torch.no_grad()
def test_restore_leaves_everything_as_found(family: tiny.Family, method: Method, attention: str) -> None:
    model, inputs, logits = used_before(family.name)
    before = Snapshot.of(model)
    method.compress(model)
    assert vtc.is_compressed(model)
    model(**inputs)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    vtc.restore(model)
    assert not vtc.is_compressed(model)
    try:
        assert_unchanged(before, model)
    except AssertionError:
        used_before.cache_clear()
        raise
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
@torch.no_grad()
def test_the_context_manager_restores_also_after_an_exception(name: str) -> None:
    model, inputs, _ = used(build(tiny.family(name)))
    before = Snapshot.of(model)

    def block() -> None:
        with vtc.compressed(model, "fastv", keep_ratio=0.5) as same:
            assert same is model
            model(**inputs)
            raise BoomError

    with pytest.raises(BoomError):
        block()
    assert_unchanged(before, model)


@over_matrix(families=tuple(tiny.family(name) for name in ("llava", "qwen3_vl", "gemma3")), attentions=("sdpa",))
@torch.no_grad()
def test_disabled_is_the_untouched_model_and_ends(family: tiny.Family, method: Method, attention: str) -> None:
    case = borrowed(family, attention)
    model, inputs, logits = case.model, case.batch("ragged"), case.plain("ragged").logits
    with method.on(model):
        packed = model(**inputs).logits
        assert torch.equal(packed, logits) == method.cache, "entries of caches leave behind the prefill"
        with vtc.disabled(model):
            assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model(**inputs).logits, packed)


@torch.no_grad()
def test_restoring_twice_is_harmless() -> None:
    model, inputs, logits = used(build(tiny.family("llava")))
    before = Snapshot.of(model)
    assert vtc.restore(model) is model
    method("divprune").compress(model)
    vtc.restore(model)
    vtc.restore(model)
    assert_unchanged(before, model)
    assert torch.equal(model(**inputs).logits, logits)


# -------------------------------------------------------------------------------------- exceptions inside a call


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def generate(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=3, do_sample=False)


@dataclass
class Fuse:
    """A forward hook that raises while it is lit."""

    lit: bool = False

    def __call__(self, *_: Any) -> None:
        if self.lit:
            raise BoomError


@dataclass(frozen=True)
class FailingSelector(Selector):
    """Raises, or keeps the first tokens, as `FailingSelector.fuse` says."""

    name: ClassVar[str] = "failing"
    paper: ClassVar[str] = "none"
    fuse: ClassVar[Fuse] = Fuse()

    layer: int | None = None

    def stages(self, shape: Any = None, keep_ratio: float | None = None) -> tuple[vtc.Stage, ...]:
        return (vtc.Stage(vtc.BeforeDecoder() if self.layer is None else vtc.DecoderLayer(self.layer)),)

    def select(self, ctx: VisualContext) -> Selection:
        self.fuse()
        return Selection(ctx.n, torch.arange(min(ctx.budget, ctx.n)))


@pytest.fixture
def failing_selector(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FailingSelector]]:
    from vtc import registry

    monkeypatch.setitem(registry._SELECTORS._classes, "failing", FailingSelector)
    yield FailingSelector
    FailingSelector.fuse.lit = False


@pytest.mark.parametrize("place", ["tower", "selector", "decoder-selector", "decoder-layer", "head"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
@pytest.mark.parametrize("call", [forward, generate])
def test_an_exception_inside_a_call_leaves_nothing_behind(
    name: str, place: str, call: Callable[..., Any], failing_selector: type[FailingSelector]
) -> None:
    case = build(tiny.family(name))
    model, decoder = case.model, case.model.get_decoder()
    fuse = failing_selector.fuse if "selector" in place else Fuse()
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    inside = next(module for module in tower.modules() if type(module).__name__.endswith("Attention"))
    seat = {"tower": inside, "decoder-layer": decoder.layers[3], "head": model.lm_head}.get(place)
    if seat is not None:
        seat.register_forward_hook(fuse)
    _, inputs, plain = used(case)

    before = Snapshot.of(model)
    if place == "selector":
        vtc.compress(model, "failing", keep_ratio=0.5)
    elif place == "decoder-selector":
        vtc.compress(model, "failing", keep_ratio=0.5, layer=2)
    else:
        method("divprune+fastv").compress(model)
    clean = forward(model, inputs)
    installed = Snapshot.of(model)

    fuse.lit = True
    with pytest.raises(BoomError):
        call(model, inputs)
    fuse.lit = False
    assert current_call(engine_of(model)) is None, "the state of a call ends with it"

    # The engine keeps its last report, so attribute values may change; hooks, modules and tables may not.
    broken = Snapshot.of(model)
    for field in ("modules", "hooks", "tensors", "config", "generation_config", "attention", "tables", "threads"):
        assert getattr(broken, field) == getattr(installed, field), field
    assert {k: set(v) for k, v in broken.attributes.items()} == {k: set(v) for k, v in installed.attributes.items()}
    assert torch.equal(forward(model, inputs), clean), "the next call sees the broken one"
    vtc.restore(model)
    assert_unchanged(before, model)
    assert torch.equal(forward(model, inputs), plain)


@pytest.mark.parametrize("place", ["tower", "decoder-layer"])
def test_restore_right_after_an_exception(place: str) -> None:
    case = build(tiny.family("llava"))
    model, fuse = case.model, Fuse()
    seat = model.model.vision_tower if place == "tower" else model.get_decoder().layers[3]
    seat.register_forward_hook(fuse)
    _, inputs, plain = used(case)
    before = Snapshot.of(model)
    method("divprune+fastv").compress(model)
    fuse.lit = True
    with pytest.raises(BoomError):
        model(**inputs)
    fuse.lit = False
    vtc.restore(model)
    assert_unchanged(before, model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_a_refused_compress_leaves_the_model_alone() -> None:
    model, inputs, logits = used(build(tiny.family("qwen2_5_vl")))
    before = Snapshot.of(model)
    for arguments in (
        {"method": "vtc-cls", "keep_ratio": 0.5},
        {"method": "no-such-method", "keep_ratio": 0.5},
        {"method": "fastv", "keep_ratio": 0.5, "layer": 99},
        {"method": "fastv", "keep_ratio": 0.5, "no_such_option": 1},
        {"method": "divprune", "keep_ratio": 0.0},
        {"method": "divprune"},
        {"method": [vtc.CompressionConfig("divprune", keep_ratio=0.5), vtc.CompressionConfig("nope", keep_ratio=0.5)]},
    ):
        with pytest.raises(vtc.errors.VtcError):
            vtc.compress(model, **arguments)
        assert not vtc.is_compressed(model)
        assert_unchanged(before, model)
    assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_a_refused_compress_keeps_the_compression_that_is_there() -> None:
    model, inputs, _ = used(build(tiny.family("llava")))
    with method("divprune").on(model):
        packed = model(**inputs).logits
        with pytest.raises(vtc.errors.VtcError):
            vtc.compress(model, "no-such-method", keep_ratio=0.5)
        assert vtc.is_compressed(model)
        assert torch.equal(model(**inputs).logits, packed)


@torch.no_grad()
def test_hooks_of_others_survive() -> None:
    # A user's hook, added before or while compressed, is not ours to remove; nor is an attention function of theirs.
    case = build(tiny.family("llava"))
    model, inputs, _ = used(case)
    calls: list[str] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append("before"))
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    original = table["sdpa"]

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("attention")
        return original(*args, **kwargs)

    table["sdpa"] = theirs
    try:
        method("divprune+fastv").compress(model)
        model.get_decoder().register_forward_hook(lambda *_: calls.append("while"))
        vtc.restore(model)
        assert table["sdpa"] is theirs
    finally:
        del table["sdpa"]
    calls.clear()
    model(**inputs)
    assert calls == ["before", "while"]
