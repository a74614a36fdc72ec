"""How commands end: with one line on stderr for what a user can mend, and a traceback for a fault of the program."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from .errors import VtcError

__all__ = ["finish"]


def finish(program: str, work: Callable[[], int | None]) -> int:
    """Run a command and return its exit status.

    Mistakes of a user, a full disk, files without permission and too little memory are told in one line. Everything
    else that is raised is a fault of the program and passes through.

    Parameters
    ----------
    program
        Its name, with which the line begins.
    work
        Returns the status; None is 0.

    Returns
    -------
    int
        That of `work`; 2 after an error, 130 after an interruption, 1 where the reader of stdout has gone.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal cannot show
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (head, a pager) has gone. Python flushes once more on its way out; that must not fail again.
        _drop_stdout()
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (VtcError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if isinstance(error, (MemoryError, RuntimeError)):
            text = f"not enough memory: {text}" if text else "not enough memory"
        print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
        return 2


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on a device or on the host; torch is not imported to ask."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
