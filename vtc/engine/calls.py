"""The calls of one compressed model: which are open, and which prompt each thread or task has read last."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vtc.engine.prompt import Prompt
from vtc.errors import StateError

__all__ = ["Calls"]

_LAST: ContextVar[Mapping[weakref.ref[Calls], Prompt]] = ContextVar("vtc_last", default={})  # noqa: B039 # never mutated
_PAUSED: ContextVar[tuple[Calls, ...]] = ContextVar("vtc_paused", default=())
_COLLECTING: ContextVar[tuple[tuple[Calls, Callable[[Prompt], None]], ...]] = ContextVar("vtc_collecting", default=())


class Calls:
    """Bookkeeping of the outermost calls of one engine, whichever threads and tasks they run in.

    What a thread or task did is a matter of its context (`contextvars`), as for `torch.no_grad`: tasks, and threads
    started by `asyncio.to_thread`, see what the context that started them saw.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Any] = []
        self._overlapped: list[Any] = []  # those open calls that others ran beside
        self._latest: tuple[Prompt, bool] | None = None  # and whether other calls ran beside that one

    def __reduce__(self) -> Any:
        return Calls, ()  # a copy of the model has made no calls

    def open(self, call: Any) -> None:
        """Note that an outermost call begins."""
        with self._lock:
            self._open.append(call)
            if len(self._open) > 1:
                self._overlapped = list(self._open)
                if self._latest is not None:
                    self._latest = (self._latest[0], True)

    def close(self, call: Any) -> None:
        """Note that it has ended, in whatever way."""
        with self._lock:
            self._open = [other for other in self._open if other is not call]
            self._overlapped = [other for other in self._overlapped if other is not call]

    def note(self, call: Any, prompt: Prompt) -> None:
        """Note the prompt of an outermost call, for the report."""
        me = weakref.ref(self)
        others = {known: last for known, last in _LAST.get().items() if known() is not None}
        _LAST.set({**others, me: prompt})
        with self._lock:
            self._latest = (prompt, any(other is call for other in self._overlapped))

    def last(self) -> Prompt:
        """Return the last prompt of this thread or task; where it has read none, the last of the model.

        Raises
        ------
        StateError
            There was none, or several threads ran at once, none of them this one.
        """
        mine = _LAST.get().get(weakref.ref(self))
        if mine is not None:
            return mine
        if self._latest is None:
            raise StateError("nothing to report yet: run generate() or forward() first")
        prompt, overlapped = self._latest
        if overlapped:
            raise StateError(
                "several threads ran this model at the same time, none of them the one that asks for a report: ask in "
                "the thread that made the call, or collect with vtc.reports(model)"
            )
        return prompt

    def refuse_while_open(self, what: str) -> None:
        """Raise StateError if a call is running."""
        count = len(self._open)
        if count:
            raise StateError(
                f"{what} while {count} call{'s' if count > 1 else ''} of this model "
                f"{'are' if count > 1 else 'is'} running, here or in another thread; wait until they have ended"
            )

    @property
    def paused(self) -> bool:
        """Whether this thread or task wants its calls uncompressed."""
        return any(other is self for other in _PAUSED.get())

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the calls of this thread or task uncompressed while entered."""
        token = _PAUSED.set((*_PAUSED.get(), self))
        try:
            yield
        finally:
            _PAUSED.reset(token)

    @contextmanager
    def collecting(self, collect: Callable[[Prompt], None]) -> Iterator[None]:
        """Call `collect(prompt)` after each outermost call of this thread or task, while entered."""
        token = _COLLECTING.set((*_COLLECTING.get(), (self, collect)))
        try:
            yield
        finally:
            _COLLECTING.reset(token)

    def collect(self, prompt: Prompt) -> None:
        """Hand the prompt of an outermost call that has ended to those who collect."""
        for calls, collect in _COLLECTING.get():
            if calls is self:
                collect(prompt)
