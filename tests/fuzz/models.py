"""A machine that uses one model for long, in any order, and compares everything it says with a fresh model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import vtc
from tests import tiny
from tests.engine.test_turns import Turn
from tests.fuzz.campaign import settings, watched
from tests.fuzz.modes import (
    SAY,
    Mode,
    Outcome,
    Setting,
    ask,
    can,
    expected,
    following,
    inputs_of,
    kinds,
    mode,
    modes,
    plain_report,
    refused,
    untouched,
    values_of,
)
from tests.fuzz.modes import settings as settings_of
from tests.invariants.test_4_restore import Snapshot
from vtc.engine import memory, recorder, state, watch

KEPT_BY_TRANSFORMERS = ("_cache", "_previous_max_cache_length")
"""Attributes that generate() leaves on a model, compressed or not."""


class BoomError(RuntimeError):
    """What the fuzz throws."""


@dataclass
class Fuse:
    """A forward hook that raises at the n-th call from now."""

    calls: int = 0
    error: type[BaseException] = BoomError

    def light(self, calls: int, error: type[BaseException]) -> None:
        self.calls, self.error = calls, error

    def __call__(self, *_: Any) -> None:
        if self.calls:
            self.calls -= 1
            if not self.calls:
                raise self.error("fuse")


def seats(model: Any) -> dict[str, torch.nn.Module]:
    """Modules in which something may go wrong."""
    tower = getattr(model.model, "visual", None)
    tower = model.model.vision_tower if tower is None and hasattr(model.model, "vision_tower") else tower
    tower = model.model.vision_model if tower is None and hasattr(model.model, "vision_model") else tower
    if tower is None:
        tower = model.model.video_tower
    layers = model.get_decoder().layers
    inside = [module for module in tower.modules() if type(module).__name__.endswith("Attention")][-1]
    return {
        "tower": inside,
        "first layer": layers[0],
        "layer 2": layers[2],
        "last layer's mlp": layers[-1].mlp,
        "decoder": model.get_decoder(),
        "base": model.model,
        "head": model.lm_head,
    }


ERRORS = (BoomError, KeyboardInterrupt, torch.OutOfMemoryError)


@dataclass(eq=False)
class Installed:
    """What one compress() put on the model, as the machine believes."""

    setting: Setting
    enabled: bool = True


@dataclass(eq=False)
class Talk:
    """A conversation of which the first turn is over."""

    installed: Installed | None
    setting: Setting | None
    kind: str
    turn: Turn
    offsets: Any
    """What transformers keeps on the model for the positions of the second turn."""


def nothing_is_open() -> None:
    """No call, no recording and no encoding of this thread is half done."""
    assert state._CALL.get() is None, "the state of a call is left"
    assert not recorder._RECORDED.get(), "a recording is left"
    assert watch.ENCODING.get() is None, "an encoding is left"
    assert memory.MEMORY.get() is None, "a memory is left"


def forget_what_is_open() -> None:
    """Begin anew behind an example that left something open."""
    state._CALL.set(None)
    recorder._RECORDED.set({})
    watch.ENCODING.set(None)
    memory.MEMORY.set(None)


def comparable(snapshot: Snapshot) -> Snapshot:
    """Without what transformers itself leaves on a model."""
    kept = {
        name: {key: value for key, value in values.items() if key not in KEPT_BY_TRANSFORMERS}
        for name, values in snapshot.attributes.items()
    }
    return dataclasses.replace(snapshot, attributes=kept)


def shape_of(snapshot: Snapshot) -> dict[str, Any]:
    """What a copy shares with its original: names and numbers of things, and weights."""
    return {
        "hooks": {key: len(hooks) for key, hooks in snapshot.hooks.items()},
        "attributes": {name: set(values) for name, values in comparable(snapshot).attributes.items()},
        "tensors": {name: data for name, (_, data) in snapshot.tensors.items()},
        "config": snapshot.config,
        "attention": snapshot.attention,
        "tables": snapshot.tables,
        "threads": snapshot.threads,
    }


def _changes(now: Any, then: Any) -> Any:
    """Where two fields of a snapshot differ."""
    if not isinstance(now, dict) or not isinstance(then, dict):
        return None
    changed = {key for key in now.keys() | then.keys() if now.get(key) != then.get(key)}
    inside = {name for key in changed for name in _changes(now.get(key), then.get(key)) or ()}
    return sorted(inside, key=str) or sorted(changed, key=str)


class ModelMachine(RuleBasedStateMachine):
    """The rules; `machine_of` gives them what a family can be asked for."""

    family: tiny.Family

    def __init__(self) -> None:
        super().__init__()
        forget_what_is_open()
        self.model = tiny.build(self.family.name).model
        self.fuses = {}
        for name, module in seats(self.model).items():
            self.fuses[name] = Fuse()
            module.register_forward_hook(self.fuses[name])
        self.installed: Installed | None = None
        self.blocks: list[tuple[Any, Callable[[], None]]] = []
        self.talks: list[Talk] = []
        self.captures = False
        self.before: Snapshot | None = None
        self.shape: dict[str, Any] = {}

    # -- what is expected -------------------------------------------------------------------------------------------

    @property
    def setting(self) -> Setting | None:
        """The setting in force."""
        return self.installed.setting if self.installed is not None and self.installed.enabled else None

    def compare(self, what: str, mode: Mode, outcome: Outcome, wanted: Outcome) -> None:
        difference = outcome.differs_from(wanted, mode.tolerance)
        sites = "untouched" if self.setting is None else "+".join(self.setting.sites)
        assert difference is None, f"{what}: {mode.name}, {sites}: {difference}"
        if self.setting is not None and outcome.error is None:
            assert outcome.report == wanted.report, f"{what}: {mode.name}, {sites}: the report differs"

    def ask(self, what: str, kind: str, mode: Mode) -> None:
        wanted = expected(self.family, self.setting, kind, mode)
        self.compare(what, mode, ask(self.family, self.model, kind, mode, with_report=self.setting is not None), wanted)

    # -- rules --------------------------------------------------------------------------------------------------------

    def begin(self, wrapped: bool, captures: bool) -> None:
        # Whatever transformers sets up in the first call is there before anything is compared.
        for name in ("greedy", "forward", *(["hidden-states"] if captures else [])):
            for kind in ("ragged", "mixed"):  # of families with two towers both
                if kind in kinds(self.family):
                    ask(self.family, self.model, kind, mode(name))
        self.captures = captures
        if wrapped:
            original = self.model.generate
            self.model.generate = functools.partial(original)
        self.before = comparable(Snapshot.of(self.model))
        self.shape = shape_of(self.before)

    def compress(self, setting: Setting) -> None:
        setting.compress(self.model)
        self.installed = Installed(setting)

    def be_refused(self, setting: Setting) -> None:
        try:
            setting.compress(self.model)
        except vtc.VtcError:
            return
        raise AssertionError("compress: taken now, refused before")

    def restore(self) -> None:
        assert vtc.restore(self.model) is self.model
        self.installed = None
        self.is_as_found()

    def is_as_found(self) -> None:
        assert not vtc.is_compressed(self.model), "restore: still compressed"
        after = comparable(Snapshot.of(self.model))
        if self.before is not None:
            for field in Snapshot.__dataclass_fields__:
                now, then = getattr(after, field), getattr(self.before, field)
                assert now == then, f"restore: {field} changed: {_changes(now, then)}"
        else:  # a copy has objects of its own
            for name, value in shape_of(after).items():
                assert value == self.shape[name], f"restore: {name} of a copy changed"
        outcome = ask(self.family, self.model, "ragged", mode("forward"))
        difference = outcome.differs_from(untouched(self.family, "ragged", mode("forward")))
        assert difference is None, f"restore: {difference}"

    def enter_compressed(self, setting: Setting) -> None:
        before, block = self.installed, vtc.compressed(self.model, list(setting.configs))
        assert block.__enter__() is self.model
        self.installed = Installed(setting)

        def end() -> None:
            self.installed = before

        self.blocks.append((block, end))

    def enter_disabled(self) -> None:
        installed, block = self.installed, vtc.disabled(self.model)
        if installed is None:
            with contextlib.suppress(vtc.StateError):
                block.__enter__()
                raise AssertionError("disabled: entered without compression")
            return
        before = installed.enabled
        block.__enter__()
        installed.enabled = False

        def end() -> None:
            installed.enabled = before

        self.blocks.append((block, end))

    def leave(self, error: bool) -> None:
        block, end = self.blocks.pop()
        if error:
            boom = BoomError("inside a block")
            assert not block.__exit__(BoomError, boom, None), "a block swallowed an exception"
        else:
            block.__exit__(None, None, None)
        end()
        assert vtc.is_compressed(self.model) == (self.installed is not None), "leaving a block"

    def say(self, kind: str, mode: Mode) -> None:
        if can(self.family, kind, mode) and self.captures >= (mode.name == "hidden-states"):
            self.ask("say", kind, mode)

    def fail(self, kind: str, mode: Mode, seat: str, calls: int, error: type[BaseException]) -> None:
        if not can(self.family, kind, mode) or self.captures < (mode.name == "hidden-states"):
            return
        wanted = expected(self.family, self.setting, kind, mode)
        self.fuses[seat].light(calls, error)
        try:
            outcome = ask(self.family, self.model, kind, mode, with_report=self.setting is not None)
        except (KeyboardInterrupt, SystemExit):
            outcome = Outcome(error=BoomError("fuse"))
        finally:
            burnt, self.fuses[seat].calls = not self.fuses[seat].calls, 0
        if not burnt or outcome.error is None:  # prompt lookup and the like may end before
            self.compare("with a fuse", mode, outcome, wanted)
        elif wanted.error is None:
            assert "fuse" in str(outcome.error), f"an exception became {type(outcome.error).__name__}: {outcome.error}"
        self.model.zero_grad()
        self.model.eval()

    def start_to_talk(self, kind: str) -> None:
        if not can(self.family, kind, mode("turns")):
            return
        wanted = expected(self.family, self.setting, kind, mode("turns"))
        if wanted.error is not None:
            return
        inputs = inputs_of(self.family, kind)
        turn = Turn(inputs, self.model.generate(**inputs, **SAY))
        half = len(wanted.values) // 2
        said = Outcome(tuple(value.clone() for value in values_of(turn.output)))
        difference = said.differs_from(Outcome(wanted.values[:half]))
        assert difference is None, f"first turn: {difference}"
        self.talks.append(
            Talk(self.installed if self.setting is not None else None, self.setting, kind, turn, self.offsets)
        )

    @property
    def offsets(self) -> Any:
        return getattr(self.model.model, "rope_deltas", None)

    def go_on_talking(self, number: int) -> None:
        talk = self.talks.pop(number % len(self.talks))
        wanted = expected(self.family, talk.setting, talk.kind, mode("turns"))
        if talk.offsets is not None:
            self.model.model.rope_deltas = talk.offsets
        try:
            said = Outcome(values_of(self.model.generate(**following(talk.turn), **SAY)))
        except vtc.StateError:
            # Only a cache that some other compression has shortened is refused.
            assert talk.installed is not None, "second turn: an untouched cache was refused"
            assert talk.installed is not self.installed or self.blocks, "second turn: refused by who filled the cache"
            return
        difference = said.differs_from(Outcome(wanted.values[len(wanted.values) // 2 :]))
        assert difference is None, f"second turn: {difference}"

    def copy(self, how: str, move: bool) -> None:
        if how == "deepcopy":
            twin = copy.deepcopy(self.model)
        else:
            try:
                twin = pickle.loads(pickle.dumps(self.model))
            except AttributeError as error:
                # What transformers hooks on for output_hidden_states cannot be pickled, compressed or not.
                assert "output_capturing_hook" in str(error), f"pickle: {error}"
                return
        # vtc.disabled() holds for the model it was given, not for copies of it.
        setting = None if self.installed is None else self.installed.setting
        wanted = expected(self.family, setting, "ragged", mode("greedy"))
        outcome = ask(self.family, twin, "ragged", mode("greedy"), with_report=setting is not None)
        difference = outcome.differs_from(wanted)
        assert difference is None, f"a {how} of the model, {setting}: {difference}"
        assert outcome.report == wanted.report, f"a {how} of the model, {setting}: the report differs"
        if move and not self.blocks:
            vtc.restore(self.model)  # or it stays in the table of attention functions until it is collected
            self.model, self.before, self.talks = twin, None, []
            self.fuses = {name: self._fuse_of(module) for name, module in seats(twin).items()}
        else:
            vtc.restore(twin)
            outcome = ask(self.family, twin, "ragged", mode("greedy"))
            difference = outcome.differs_from(untouched(self.family, "ragged", mode("greedy")))
            assert difference is None, f"a restored {how} of the model: {difference}"
            self.ask(f"the original of a {how}", "single", mode("greedy"))

    @staticmethod
    def _fuse_of(module: torch.nn.Module) -> Fuse:
        return next(hook for hook in module._forward_hooks.values() if isinstance(hook, Fuse))

    def in_threads(self, jobs: list[tuple[str, Mode]]) -> None:
        jobs = [(kind, mode) for kind, mode in jobs if can(self.family, kind, mode)]
        # vtc.disabled() holds for the thread that is in the block, not for these.
        setting = None if self.installed is None else self.installed.setting
        wanted = [expected(self.family, setting, kind, mode) for kind, mode in jobs]
        heard: list[Outcome | None] = [None] * len(jobs)
        start = threading.Barrier(len(jobs) or 1)

        def work(place: int) -> None:
            start.wait(timeout=60)
            heard[place] = ask(self.family, self.model, *jobs[place], with_report=setting is not None)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        for (_, way), outcome, want in zip(jobs, heard, wanted, strict=True):
            assert outcome is not None, "a thread died"
            difference = outcome.differs_from(want, way.tolerance)
            sites = "untouched" if setting is None else "+".join(setting.sites)
            assert difference is None, f"in threads: {way.name}, {sites}: {difference}"
            assert outcome.report == want.report, f"in threads: {way.name}, {sites}: the report differs"

    def look(self) -> None:
        """Verbs that only look."""
        assert vtc.is_compressed(self.model) == (self.installed is not None)
        vtc.list_methods(self.model)
        try:
            report = vtc.report(self.model)
        except vtc.StateError:
            return
        assert str(report)
        assert plain_report(report)

    # -- always -------------------------------------------------------------------------------------------------------

    def end_of_example(self) -> None:
        while self.blocks:
            self.leave(error=False)
        self.restore()

    def teardown(self) -> None:
        if self.before is not None or self.shape:
            with watched():
                try:
                    self.end_of_example()
                finally:
                    vtc.restore(self.model)


def _watched(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def run(self: ModelMachine, **arguments: Any) -> None:
        with watched():
            function(self, **arguments)
            nothing_is_open()

    return run


@functools.cache
def machine_of(family: tiny.Family) -> type[ModelMachine]:
    """The machine of one family."""
    some_setting, some_kind = st.sampled_from(settings_of(family)), st.sampled_from(kinds(family))
    some_mode = st.sampled_from(modes(family))
    concurrent = [mode for mode in modes(family) if mode.concurrent]
    # transformers keeps the offsets of M-RoPE on the model: threads disturb each other without compression, too.
    threads = not any(hasattr(module, "rope_deltas") for module in tiny.build(family.name).model.modules())
    jobs = st.lists(st.tuples(some_kind, st.sampled_from(concurrent)), min_size=2, max_size=3)
    a_seat = st.sampled_from(tuple(seats(tiny.build(family.name).model)))

    rules: dict[str, Any] = {
        "begin": initialize(wrapped=st.booleans(), captures=st.booleans()),
        "compress": rule(setting=some_setting),
        "be_refused": rule(setting=st.sampled_from(refused(family))),
        "restore": rule(),
        "enter_compressed": rule(setting=some_setting),
        "enter_disabled": rule(),
        "leave": rule(error=st.booleans()),
        "say": rule(kind=some_kind, mode=some_mode),
        "fail": rule(
            kind=some_kind, mode=some_mode, seat=a_seat, calls=st.integers(1, 8), error=st.sampled_from(ERRORS)
        ),
        "start_to_talk": rule(kind=some_kind),
        "go_on_talking": rule(number=st.integers(0, 3)),
        "copy": rule(how=st.sampled_from(("deepcopy", "pickle")), move=st.booleans()),
        "in_threads": rule(jobs=jobs),
        "look": rule(),
    }
    # Said more often than the rest: every mode is one rule's argument.
    again = {f"say_{word}": rules["say"] for word in ("more", "again", "once_more")}
    conditions = {
        "leave": lambda self: self.blocks,
        "go_on_talking": lambda self: self.talks,
        "enter_compressed": lambda self: len(self.blocks) < 3,
        "enter_disabled": lambda self: len(self.blocks) < 3,
    }
    if not threads:
        del rules["in_threads"]
    body: dict[str, Any] = {"family": family}
    for name, decorate in {**rules, **again}.items():
        function = _watched(getattr(ModelMachine, name.split("_")[0] if name in again else name))
        if name in again:
            function.__name__ = name
        decorated = decorate(function)
        body[name] = precondition(conditions[name])(decorated) if name in conditions else decorated
    return type(f"Machine_{family.name}", (ModelMachine,), body)


def run(family: tiny.Family, *, examples: int, steps: int = 12, seed: int | None = None) -> None:
    """Run examples of one family; without a seed always the same ones."""
    machine = machine_of(family)
    if seed is not None:
        machine = hypothesis.seed(seed)(type(machine.__name__, (machine,), {}))
    run_state_machine_as_test(machine, settings=settings(examples, steps=steps, derandomize=seed is None))
