"""Files that are written in full or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

__all__ = ["check_writable", "cut_incomplete_line", "replacing", "write_text"]


_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
"""Names of files that are open already, and must stay the files that they are."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block of a `with` statement a temporary file to write, which becomes `path` when the block ends.

    The temporary file is in the same folder and has the same suffix. If the block fails or is interrupted, or the disk
    is full, it is removed, and a file that was there before stays as it was. Symbolic links are followed, and an
    earlier file keeps its permissions. Devices and pipes, such as /dev/stdout, are written directly.

    Parameters
    ----------
    path
        The final name.

    Yields
    ------
    Path
        An empty file.

    Raises
    ------
    InputError
        No file can be written there: the folder does not exist or is not writable, or `path` is a folder.
    OSError
        Writing failed; it names `path`.
    """
    target, temporary = _begin(path)
    try:
        yield temporary
        if target is not None:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())  # or a crash of the machine could leave the new name on an empty file
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
    except BaseException as error:
        if target is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, as `replacing` does; raises as it does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(*paths: str | os.PathLike[str]) -> None:
    """Find out now whether files can be written later, by creating and removing a temporary file beside each.

    Raises
    ------
    InputError
        One of them cannot, or two are the same file.
    """
    seen: dict[Path, str | os.PathLike[str]] = {}
    for path in paths:
        target, temporary = _begin(path)
        if target is not None:
            temporary.unlink()
            if target in seen:
                raise InputError(f"{path}: this file is to be written twice, as {seen[target]} too; give two names.")
            seen[target] = path


def cut_incomplete_line(path: Path) -> None:
    """Cut off what follows the last line break of a file, which an interrupted writer has left."""
    text = path.read_bytes()
    complete = text.rfind(b"\n") + 1
    if complete < len(text):
        with path.open("r+b") as file:
            file.truncate(complete)


def _begin(path: str | os.PathLike[str]) -> tuple[Path | None, Path]:
    """The file that is meant, links followed, and an empty temporary one; None and `path` for a device or a pipe."""
    name = os.fspath(path)
    try:
        try:
            mode = os.stat(name).st_mode
        except FileNotFoundError:
            mode = None
        if mode is not None and stat.S_ISDIR(mode):
            raise InputError(f"{name}: this is a folder; give the name of a file.")
        if mode is not None and not os.access(name, os.W_OK):
            raise InputError(f"{name}: this file is write-protected; give another name.")
        if mode is not None and (not stat.S_ISREG(mode) or name.startswith(_STREAMS)):
            if stat.S_ISCHR(mode):
                with open(name, "wb", buffering=0) as device:
                    device.write(b"")  # /dev/full refuses even that
            return None, Path(name)
        target = Path(os.path.realpath(name))
        if not target.parent.is_dir():
            folder = target.parent if Path(name).parent.is_dir() else Path(name).parent
            raise InputError(f"{name}: the folder {folder} does not exist.")
        temporary = target.with_name(f".vtc-{secrets.token_hex(4)}{target.suffix}")
        # Not tempfile's, which nobody but the owner could read: the permissions are those of any new file.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name!r}: no file can be written there: {reason}.") from error
    return target, temporary
