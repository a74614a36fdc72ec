"""Faults put into the engine itself: each of its parts raises once, each of its tensor operations runs out of memory.

Afterwards the model has to work as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import vtc
import vtc.engine.after_prefill
import vtc.engine.before_decoder
import vtc.engine.in_decoder
import vtc.engine.state
from tests import tiny
from tests.fuzz.campaign import COUNTS
from tests.fuzz.models import BoomError, comparable, nothing_is_open
from tests.fuzz.modes import Outcome, Setting, ask, expected, mode, settings, untouched
from tests.invariants.test_4_restore import Snapshot
from vtc.core.packing import PackPlan
from vtc.engine.cache import CompactedCache
from vtc.engine.calls import Calls
from vtc.engine.encoder import Encoder
from vtc.engine.engine import Engine
from vtc.engine.hooks import Hooks
from vtc.engine.prompt import Prompt, Segment
from vtc.engine.recorder import Recorder
from vtc.engine.state import ForwardState
from vtc.registry import selectors

VTC = str(Path(vtc.__file__).parent)
ERRORS = (BoomError, torch.OutOfMemoryError, KeyboardInterrupt)

IN_A_CALL: dict[str, tuple[Any, str]] = {
    f"{owner.__name__.rpartition('.')[2]}.{name}": (owner, name)
    for owner, names in (
        (
            Engine,
            "around_generate _note_prompt around_prepare around_encode around_forward _forward _note_inputs before_text"
            " before_layer after_text around_deepstack _follow",
        ),
        (Encoder, "read encoded"),
        (Prompt, "__init__ decide mark_seen release keep_at"),
        (Segment, "apply"),
        (PackPlan, "pack take scatter"),
        (Calls, "open note collect"),  # not `close`: who cannot close a call can only leave it open
        (ForwardState, "__init__ pack pack_at write_record mask rotary scatter attach_prompt"),
        (CompactedCache, "update get_seq_length get_query_offset"),
        (vtc.engine.before_decoder, "choose"),
        (vtc.engine.in_decoder, "choose record_once"),
        (vtc.engine.after_prefill, "choose"),
        (vtc.engine.state, "compacted causal_mask"),
    )
    for name in names.split()
}
IN_COMPRESS: dict[str, tuple[Any, str]] = {
    "Engine.__init__": (Engine, "__init__"),
    "Engine.install": (Engine, "install"),
    "Encoder.install": (Encoder, "install"),
    "Hooks.wrap": (Hooks, "wrap"),
    "Hooks.before": (Hooks, "before"),
    "Hooks.after": (Hooks, "after"),
    "Recorder.__init__": (Recorder, "__init__"),
    "Engine._follow_from": (Engine, "_follow_from"),
    "Engine.uninstall": (Engine, "uninstall"),
}


class Fault:
    """Stands before a function, and raises at one of its calls: before it runs, or after."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.original = owner, name, getattr(owner, name)
        self.calls, self.error, self.when = 0, BoomError, "before"

    def light(self, calls: int, error: type[BaseException], when: str) -> None:
        self.calls, self.error, self.when = calls, error, when

    def install(self, patch: pytest.MonkeyPatch) -> None:
        @functools.wraps(self.original)
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.calls -= 1
            if not self.calls and self.when == "before":
                raise self.error("fault")
            now = not self.calls
            result = self.original(*args, **kwargs)
            if now:
                self.calls = 0
                raise self.error("fault")
            return result

        patch.setattr(self.owner, self.name, faulty)


class OutOfMemory(TorchFunctionMode):
    """The n-th tensor operation that `vtc` itself asks for finds no memory."""

    def __init__(self, operation: int) -> None:
        super().__init__()
        self.left, self.name = operation, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left > 0 and sys._getframe(1).f_code.co_filename.startswith(VTC):
            self.left -= 1
            if not self.left:
                frame = sys._getframe(1)
                self.name = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}: {getattr(func, '__name__', func)}"
                raise torch.OutOfMemoryError("fault")
        return func(*args, **(kwargs or {}))


class Patient:
    """A compressed model that faults are tried on."""

    def __init__(self, family: tiny.Family, setting: Setting, way: str = "greedy", kind: str = "ragged") -> None:
        self.family, self.setting, self.mode, self.kind = family, setting, mode(way), kind
        self.wanted = expected(family, setting, kind, self.mode)
        assert self.wanted.error is None, self.wanted.error
        self.model = tiny.build(family.name).model
        for name in ("greedy", way):
            ask(family, self.model, kind, mode(name))
        self.before = comparable(Snapshot.of(self.model))

    def call(self) -> Outcome:
        return ask(self.family, self.model, self.kind, self.mode)

    def works(self, what: str) -> None:
        """The next call says what it should."""
        nothing_is_open()
        difference = self.call().differs_from(self.wanted)
        assert difference is None, f"after {what}: {difference}"

    def restores(self, what: str) -> None:
        vtc.restore(self.model)
        after = comparable(Snapshot.of(self.model))
        for field in Snapshot.__dataclass_fields__:
            assert getattr(after, field) == getattr(self.before, field), f"after {what}, restore: {field} changed"
        difference = self.call().differs_from(untouched(self.family, self.kind, self.mode))
        assert difference is None, f"after {what} and restore: {difference}"


def raised(call: Callable[[], Any]) -> BaseException | None:
    """What a call raises, or gives back as the error of its outcome."""
    try:
        outcome = call()
    except (Exception, KeyboardInterrupt) as error:
        return error
    return outcome.error if isinstance(outcome, Outcome) else None


def faults_of(names: dict[str, tuple[Any, str]], patch: pytest.MonkeyPatch) -> dict[str, Fault]:
    found = {name: Fault(*place) for name, place in names.items()}
    for fault in found.values():
        fault.install(patch)
    return found


def fail_in_calls(patient: Patient, patch: pytest.MonkeyPatch, most: int | None) -> Iterator[str]:
    """Let every part raise at its first, second, ... call; yields what was tried."""
    method = selectors()[patient.setting.configs[-1].method]
    faults = faults_of({**IN_A_CALL, "select": (method, "select")}, patch)
    patient.setting.compress(patient.model)
    patient.works("nothing")
    errors = itertools.cycle(ERRORS)
    for name, fault in faults.items():
        for when in ("before", "after"):
            for count in itertools.count(1):
                if most is not None and count > most:
                    break
                error = next(errors)
                what = f"{error.__name__} {when} call {count} of {name}"
                fault.light(count, error, when)
                found = raised(patient.call)
                never, fault.calls = fault.calls > 0, 0
                if never:
                    break
                COUNTS["faults"] += 1
                assert found is not None, f"{what} was swallowed"
                assert "fault" in str(found), f"{what} became {type(found).__name__}: {found}"
                patient.works(what)
                yield what
    patient.restores("all of it")


def run_out_of_memory(patient: Patient, stride: int) -> Iterator[str]:
    """Let the n-th operation of `vtc` in a call find no memory, for n = 1, 1 + stride, ... until there is none."""
    patient.setting.compress(patient.model)
    patient.works("nothing")
    for number in itertools.count(1, stride):
        memory = OutOfMemory(number)
        with memory:
            found = raised(patient.call)
        if memory.left:
            break
        COUNTS["faults"] += 1
        what = f"no memory in operation {number}, {memory.name}"
        assert found is not None, f"{what} was swallowed"
        assert "fault" in str(found), f"{what} became {type(found).__name__}: {found}"
        patient.works(what)
        yield what
    patient.restores("all of it")


def fail_in_compress(patient: Patient, patch: pytest.MonkeyPatch, earlier: Setting | None) -> Iterator[str]:
    """A compress() that fails half-way leaves the model, or the compression that was there, as it was."""
    faults = faults_of(IN_COMPRESS, patch)
    errors = itertools.cycle(ERRORS)
    for name, fault in faults.items():
        for count in itertools.count(1):
            vtc.restore(patient.model)
            if earlier is not None:
                earlier.compress(patient.model)
            error = next(errors)
            what = f"{error.__name__} in call {count} of {name} in compress() over {earlier}"
            fault.light(count, error, "before")
            found = raised(lambda: patient.setting.compress(patient.model))
            never, fault.calls = fault.calls > 0, 0
            if never:
                break
            COUNTS["faults"] += 1
            assert found is not None, f"{what} was swallowed"
            assert "fault" in str(found), f"{what} became {found!r}"
            nothing_is_open()
            difference = patient.call().differs_from(expected(patient.family, earlier, patient.kind, patient.mode))
            assert difference is None, f"after {what}: {difference}"
            assert vtc.is_compressed(patient.model) == (earlier is not None), f"after {what}: is_compressed"
            with contextlib.suppress(vtc.StateError):
                vtc.report(patient.model)
            patient.restores(what)
            yield what
    patient.setting.compress(patient.model)
    patient.works("all of it")
    patient.restores("all of it")


def setting_of(family: tiny.Family, name: str) -> Setting:
    return next(setting for setting in settings(family) if setting.name == name)
