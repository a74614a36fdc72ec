"""Reading the files that benchmarks come in, with errors that say which file, which line and what was expected."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import vtc

if TYPE_CHECKING:
    from eval.tasks.base import Task


def find(task: Task, folder: Path | None, *names: str) -> Path:
    """The first of `names` that is in the folder.

    Raises
    ------
    InputError
        None is; the message shows the layout.
    """
    for name in names:
        if folder is not None and (folder / name).exists():
            return folder / name
    raise missing(task, folder, names)


def missing(task: Task, folder: Path | None, names: Iterable[str]) -> vtc.InputError:
    """What to raise when a folder has none of these files."""
    if folder is None:
        return vtc.InputError(f"{task.name} needs --data, a folder with:\n{task.layout}")
    return vtc.InputError(
        f"{folder} has no {' or '.join(names)}; {task.name} expects:\n{task.layout}\nfrom {task.source}"
    )


def read_json(path: Path) -> Any:
    """A JSON document."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise vtc.InputError(f"{path}: not JSON: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON object per line, whatever the file is called."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise vtc.InputError(f"{path}, line {number}: not JSON: {error}") from error
    return found


def read_tsv(path: Path, columns: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a table of text, separated by tabs, or by commas in a .csv; empty cells are None."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise vtc.InputError(f"{path}: not such a table: {error}") from error
    missing = sorted(set(columns) - set(frame.columns))
    if missing:
        raise vtc.InputError(f"{path} has no column {', '.join(missing)}; it has {', '.join(frame.columns)}")
    return [{name: value or None for name, value in row.items()} for row in frame.to_dict("records")]


def need(record: Mapping[str, Any], key: str, path: Path, number: int) -> Any:
    """A value of one record.

    Raises
    ------
    InputError
        It is not there; names file and record.
    """
    if key not in record:
        raise vtc.InputError(f"{path}, record {number}: no {key!r}; it has {', '.join(map(str, record))}")
    return record[key]


def encoded(text: str) -> functools.partial[Image.Image]:
    """Opener of a base64 picture."""
    return functools.partial(_decode, text)


def _decode(text: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
