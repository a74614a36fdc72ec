from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vtc
from vtc import registry
from vtc.adapters.base import Adapter
from vtc.adapters.glm4v import Glm4vAdapter
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


pytestmark = pytest.mark.usefixtures("registries_as_found")


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
    for name in ("lookaheadkv", "LookaheadKV", "lookahead-kv"):
        with pytest.raises(UnsupportedMethodError, match="not offered, because it needs trained parts"):
            get_selector(name)
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

    @dataclass(frozen=True)
    class Unfinished(Selector):
        name: ClassVar[str] = "unfinished"
        paper: ClassVar[str] = "none"

    with pytest.raises(ConfigError, match="Unfinished must define select"):
        register_selector(Unfinished)


def test_adapters_are_declared_by_model_type() -> None:
    @register_adapter("imaginary_vlm", "imaginary_vlm_next")
    class Imaginary(Glm4vAdapter):
        pass

    class Another(Glm4vAdapter):
        pass

    assert registry._ADAPTERS._classes["imaginary_vlm_next"] is Imaginary
    with pytest.raises(ConfigError, match="at least one model type"):
        register_adapter()
    with pytest.raises(ConfigError, match="is taken by"):
        register_adapter("imaginary_vlm")(Another)
    with pytest.raises(ConfigError, match=r"builtins\.int must derive from vtc\.adapters\.base\.Adapter"):
        register_adapter("imaginary_vlm")(int)
    with pytest.raises(ConfigError, match=r"base\.Adapter must define .*tower"):
        register_adapter("bare")(Adapter)


@dataclass(frozen=True)
class Helpless(_First):
    def stages(self, shape: Any = None, keep_ratio: float | None = None) -> Any:
        raise KeyError("shape")


def entry_points(monkeypatch: pytest.MonkeyPatch, *more: tuple[str, str, str], **values: str) -> None:
    every = [*((name, value, "vtc.selectors") for name, value in values.items()), *more]
    points = [importlib.metadata.EntryPoint(*each) for each in every]

    def fake(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", fake)
    for table in (registry._SELECTORS, registry._ADAPTERS):
        monkeypatch.setattr(table, "_warned", set())


def test_entry_points_are_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, first="tests.test_registry:FirstSelector", broken="no.such.module:X")
    assert get_selector("first") == FirstSelector()
    assert get_selector("divprune").name == "divprune", "a broken package does not break the others"
    with pytest.raises(UnsupportedMethodError, match=r"Known: .*broken, .*divprune, .*first"):
        get_selector("zzz")
    with pytest.raises(ConfigError, match=r"broken = no.such.module:X of vtc.selectors cannot be loaded") as caught:
        get_selector("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that end the program at import, or fail after they have registered a class."""
    (tmp_path / "vtc_test_exits.py").write_text("import sys\nsys.exit('no licence')\n")
    (tmp_path / "vtc_test_half.py").write_text(
        "import dataclasses\n"
        "import tests.test_registry as t\n"
        "body = {'name': 'half', '__module__': __name__}\n"
        "half = dataclasses.dataclass(frozen=True)(type('Half', (t._First,), body))\n"
        "t.register_selector(half)\n"
        "1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


BROKEN = {
    "missing": ("no.such.module:X", "No module named 'no'"),
    "exits": ("vtc_test_exits:X", "SystemExit while it was imported: no licence"),
    "half": ("vtc_test_half:half", "division by zero"),
    "value": ("math:pi", "must name a class"),
    "number": ("builtins:int", "must derive from"),
    "nothing": ("math:nothing", "has no attribute"),
    "helpless": ("tests.test_registry:Helpless", r"no stages with its default options: KeyError\('shape'\)"),
    "garbled": ("not a path", ""),
    "divprune": ("tests.test_registry:FirstSelector", "'divprune' .* is taken by"),
    "LOUD": ("tests.test_registry:FirstSelector", "lower case"),
}


def test_methods_are_found_by_a_pattern() -> None:
    assert list(vtc.list_methods("*zip*")) == ["visionzip"]
    assert list(vtc.list_methods("Fast*")) == ["fastervlm", "fastv", "fastvid"]
    assert vtc.list_methods("*s?ze") == {"resize": "baseline; a smaller picture"}
    with pytest.raises(UnsupportedMethodError, match=r"No method matches '\*vzip\*'\. Did you mean 'visionzip'"):
        vtc.list_methods("*vzip*")


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_left_out_of_lists_with_one_warning(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value, reason = BROKEN[name]
    whole, types = vtc.list_methods(), vtc.supported_models()
    entry_points(
        monkeypatch,
        (name, value, "vtc.selectors"),
        ("broken_vlm", "math:pi", "vtc.adapters"),
        first="tests.test_registry:FirstSelector",
    )
    with pytest.warns(UserWarning, match=f"(?s){name} = {value} of vtc.selectors .*{reason}.* left out") as warned:
        found = vtc.list_methods()
    assert len(warned) == 1
    assert set(found) == {*whole, "first"}
    with pytest.warns(UserWarning, match=r"broken_vlm = math:pi of vtc\.adapters") as warned:
        assert vtc.supported_models() == types
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that was given is not given again
        assert set(vtc.list_methods()) == {*whole, "first"}
        assert vtc.supported_models() == types
    if name != "divprune":
        with pytest.raises(ConfigError, match=f"(?s){name} = {value} of vtc.selectors cannot be loaded.*{reason}"):
            get_selector(name)
    with pytest.raises(ConfigError, match="broken_vlm = math:pi"):
        registry.get_adapter("broken_vlm")


def test_of_two_packages_with_one_name_the_first_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (("first", "no.such:X"), ("first", "tests.test_registry:FirstSelector"), ("first", "builtins:int"))
    entry_points(monkeypatch, *((name, value, "vtc.selectors") for name, value in names))
    with pytest.warns(UserWarning, match="left out") as warned:
        assert get_selector("first") == FirstSelector()
    assert len(warned) == 2


def test_interruption_of_an_import_is_no_fault_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Any) -> Any:
        raise KeyboardInterrupt

    entry_points(monkeypatch, first="tests.test_registry:FirstSelector")
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", load)
    with pytest.raises(KeyboardInterrupt):
        vtc.list_methods()


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
