from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from vtc import registry
from vtc.core.context import VisualContext
from vtc.core.selection import Selection
from vtc.errors import ConfigError, UnsupportedMethodError
from vtc.registry import get_selector, register_adapter, register_selector, selectors
from vtc.selectors import Selector


class _First(Selector):
    name: ClassVar[str] = "first"
    paper: ClassVar[str] = "none"

    def select(self, ctx: VisualContext) -> Selection:
        return Selection.full(ctx.budget)


@dataclass(frozen=True)
class FirstSelector(_First):
    step: int = 1


@pytest.fixture(autouse=True)
def _tables_as_found() -> Iterator[None]:
    tables = [registry._SELECTORS._classes, registry._ADAPTERS._classes]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_first_methods_are_there() -> None:
    assert {"random", "uniform", "vtc-cls", "divprune", "fastv"} <= set(selectors())
    assert list(selectors()) == sorted(selectors())


def test_register_and_get() -> None:
    assert register_selector(FirstSelector) is FirstSelector
    assert register_selector(FirstSelector) is FirstSelector, "registering twice is what a reload does"
    assert get_selector("first", step=3) == FirstSelector(step=3)
    assert FirstSelector.options() == {"step": 1}


def test_misses_help() -> None:
    with pytest.raises(
        UnsupportedMethodError, match=r"Unknown method 'vtccls'\. Did you mean 'vtc-cls'\? Known: .*fastv"
    ):
        get_selector("vtccls")
    with pytest.raises(UnsupportedMethodError, match=r"Unknown method 'zzz'\. Known: "):
        get_selector("zzz")
    with pytest.raises(ConfigError, match=r"has no option 'start'.*start_layer=-8, score_source='cls'"):
        get_selector("vtc-cls", start=3)
    with pytest.raises(ConfigError, match=r"has no option 'layer'.*: none"):
        get_selector("divprune", layer=3)


def test_declarations_are_checked() -> None:
    with pytest.raises(ConfigError, match="must be a frozen dataclass"):
        register_selector(_First)

    class Undecorated(FirstSelector):
        pass

    with pytest.raises(ConfigError, match="must be a frozen dataclass"):
        register_selector(Undecorated)

    @dataclass(frozen=True)
    class Nameless(Selector):
        def select(self, ctx: VisualContext) -> Selection:
            return Selection.full(ctx.budget)

    with pytest.raises(ConfigError, match="must set the class attribute 'name'"):
        register_selector(Nameless)

    @dataclass(frozen=True)
    class Bare(_First):
        layers: list[int] = field(default_factory=list)

    with pytest.raises(ConfigError, match=r"the options \['layers'\] need \(immutable\) defaults"):
        register_selector(Bare)

    @dataclass(frozen=True)
    class Loud(_First):
        name: ClassVar[str] = "Loud"

    with pytest.raises(ConfigError, match="lower case and not empty, got 'Loud'"):
        register_selector(Loud)

    @dataclass(frozen=True)
    class Thief(_First):
        name: ClassVar[str] = "divprune"

    with pytest.raises(
        ConfigError, match=r"'divprune' of .*Thief is taken by vtc\.selectors\.divprune\.DivPruneSelector"
    ):
        register_selector(Thief)
    with pytest.raises(ConfigError, match="must derive from Selector"):
        register_selector(int)


def test_adapters_are_declared_by_model_type() -> None:
    @register_adapter("imaginary_vlm", "imaginary_vlm_next")
    class Imaginary:
        pass

    assert registry._ADAPTERS._classes["imaginary_vlm_next"] is Imaginary
    with pytest.raises(ConfigError, match="at least one model type"):
        register_adapter()
    with pytest.raises(ConfigError, match="is taken by"):
        register_adapter("imaginary_vlm")(int)


def entry_points(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    points = [importlib.metadata.EntryPoint(name, value, "vtc.selectors") for name, value in values.items()]

    def fake(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", fake)


def test_entry_points_are_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, first="tests.test_registry:FirstSelector", broken="no.such.module:X")
    assert get_selector("first") == FirstSelector()
    assert get_selector("divprune").name == "divprune", "a broken package does not break the others"
    with pytest.raises(UnsupportedMethodError, match=r"Known: .*broken, divprune, .*first"):
        get_selector("zzz")
    for ask in (lambda: get_selector("broken"), selectors):
        with pytest.raises(ConfigError, match=r"broken = no.such.module:X of vtc.selectors cannot be loaded"):
            ask()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("math:pi", "must name a class"),
        ("builtins:int", "must derive from Selector"),
        ("math:nothing", "cannot be loaded"),
    ],
)
def test_bad_entry_points(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    entry_points(monkeypatch, bad=value)
    with pytest.raises(ConfigError, match=message):
        get_selector("bad")


def test_constructor_errors_pass_through() -> None:
    options: dict[str, Any] = {"layer": 0}
    with pytest.raises(ConfigError, match="fastv: layer"):
        get_selector("fastv", **options)
