"""Readers of question files: JSON, JSON lines, TSV, CSV, parquet and arrow, as records that name their file in errors.

Images inside parquet and arrow files are read only when a sample is opened.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc
from vtc.plain import parse_json

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

    from eval.tasks.base import Task

_STATE = "state.json"
"""Every folder that `datasets.save_to_disk` writes contains this file."""


class Record(dict[str, Any]):
    """One record of a file; a missing field raises an error that names file and record.

    The key ``number`` is the record's place in its file, from 1, unless the file itself has such a field.

    Parameters
    ----------
    values : mapping
    path : Path
    number : int
    """

    def __init__(self, values: Mapping[str, Any], path: Path, number: int) -> None:
        super().__init__(values)
        self.path, self.number = path, number

    def __missing__(self, key: str) -> Any:
        if key == "number":
            return self.number
        raise self.error(f"no {key!r}; it has {', '.join(map(str, self))}")

    def error(self, cause: str) -> vtc.InputError:
        """Return the error to raise about this record."""
        return vtc.InputError(f"{self.path}, record {self.number}: {cause}")

    def as_list(self, key: str) -> list[Any]:
        """Return a list, which text tables store as a Python literal.

        Raises
        ------
        InputError
            The field is missing or no list.
        """
        value = self[key]
        if isinstance(value, str):
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
        if not isinstance(value, list):
            raise self.error(f"expected a list, got {value!r}")
        return value


def find(task: Task, folder: Path | None, *names: str) -> list[Path]:
    """Return the files of the first of `names` that exists in the folder.

    Parameters
    ----------
    task : Task
        Named in errors.
    folder : Path or None
    *names : str
        Files, patterns of files (the shards of one split), or folders that `datasets.save_to_disk` wrote; "." is the
        folder itself.

    Raises
    ------
    InputError
        None of them exists, or no folder was given; the message states the expected layout.
    """
    if folder is None:
        raise vtc.InputError(f"{task.name} needs --data, a folder with:\n{task.layout}")
    for name in names:
        found = [folder] if name == "." else sorted(folder.glob(name))
        found = [path for path in found if path.is_file() or (path / _STATE).is_file()]
        if found:
            return found
    tried = " or ".join(name if name != "." else f"{_STATE} of a data set" for name in names)
    raise vtc.InputError(f"{folder} has no {tried}; {task.name} expects:\n{task.layout}\nfrom {task.source}")


def read(path: Path, key: str | None = None, *, lines: bool = False) -> list[Record]:
    """Return all records of a file, or of a folder that `datasets.save_to_disk` wrote.

    Parameters
    ----------
    path : Path
    key : str, optional
        The field of a JSON document that contains the records; by default the document is the list.
    lines : bool
        Read JSON lines whatever the file is called.

    Raises
    ------
    InputError
        The content does not match the kind of file.
    """
    kind = path.suffix.lower()
    values: Iterable[Mapping[str, Any]]
    if path.is_dir():
        values = [record for part in _arrow_parts(path) for record in _from_arrow(part)]
    elif lines or kind == ".jsonl":
        values = _from_lines(path)
    elif kind in (".tsv", ".csv"):
        values = _from_text_table(path)
    elif kind == ".parquet":
        values = _from_parquet(path)
    elif kind == ".arrow":
        values = _from_arrow(path)
    else:
        values = _from_json(path, key)
    return [Record(each, path, number) for number, each in enumerate(values, 1)]


def open_base64(text: str) -> Image.Image:
    """Open a base64 picture.

    Raises
    ------
    InputError
        The text is not base64, or no picture.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise vtc.InputError(f"not base64: {error}") from error
    return vtc.open_image(data)


@dataclass(frozen=True)
class StoredPicture:
    """A picture in a parquet or arrow table, read when it is called; the first one of a list of pictures.

    Attributes
    ----------
    path : Path
        The table's file; paths of pictures outside of it are relative to its folder.
    column : str
    row : int
    """

    path: Path
    column: str
    row: int

    def __call__(self) -> Image.Image:
        """Open the picture.

        Raises
        ------
        InputError
            There is none, or it is broken; the message names the file.
        """
        value = _value(self.path, self.column, self.row)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            raise vtc.InputError(f"{self.path}, row {self.row}: no picture in column {self.column!r}")
        if not value.get("bytes"):
            return vtc.open_image(self.path.parent / value["path"])
        try:
            return vtc.open_image(value["bytes"])
        except vtc.InputError as error:
            raise vtc.InputError(f"{self.path}, row {self.row}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------- text


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except vtc.ConfigError as error:
        raise vtc.InputError(f"{path}: not JSON: {error}") from error


def _from_json(path: Path, key: str | None) -> list[dict[str, Any]]:
    content = _json(path)
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise vtc.InputError(f"{path}: expected a list of records{f' in {key!r}' if key is not None else ''}")
    return content


def _from_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                record = parse_json(line)
            except vtc.ConfigError as error:
                raise vtc.InputError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise vtc.InputError(f"{path}, line {number}: expected an object, got {line[:60]!r}")
            yield record


def _from_text_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table separated by tabs, or by commas in a .csv; empty fields are None."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise vtc.InputError(f"{path}: not such a table: {error}") from error
    return [{name: value or None for name, value in row.items()} for row in frame.to_dict("records")]


# ------------------------------------------------------------------------------------------------------------- parquet


def _from_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        pictures = _picture_columns(file.schema_arrow)
        table = file.read(columns=[name for name in file.schema_arrow.names if name not in pictures])
    except (OSError, pyarrow.ArrowException) as error:
        raise vtc.InputError(f"{path}: not a parquet file: {error}") from error
    return _rows(path, table, pictures)


def _value(path: Path, column: str, row: int) -> Any:
    if path.suffix == ".arrow":
        return _arrow_table(path).column(column)[row].as_py()
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    for group in range(file.num_row_groups):
        inside = file.metadata.row_group(group).num_rows
        if row < inside:
            return _row_group(path, column, group)[row].as_py()
        row -= inside
    raise IndexError(row)


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, column: str, group: int) -> pyarrow.ChunkedArray:
    """Read one row group, the smallest unit of a parquet file; cached because neighbouring pictures share it."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


# --------------------------------------------------------------------------------------------------------------- arrow


def _arrow_parts(folder: Path) -> list[Path]:
    state = folder / _STATE
    try:
        return [folder / each["filename"] for each in _json(state)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise vtc.InputError(f"{state}: no list of data files") from error


def _from_arrow(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        table = _arrow_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise vtc.InputError(f"{path}: not an arrow file: {error}") from error
    pictures = _picture_columns(table.schema)
    return _rows(path, table.drop_columns(list(pictures)), pictures)


@functools.lru_cache(maxsize=16)
def _arrow_table(path: Path) -> pyarrow.Table:
    """Map a table into memory; `datasets` writes the stream format, other programs the file format."""
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(mapped).read_all()


def _rows(path: Path, table: pyarrow.Table, pictures: Sequence[str]) -> Iterator[dict[str, Any]]:
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    for row in range(table.num_rows):
        yield {name: values[row] for name, values in columns.items()} | {
            name: StoredPicture(path, name, row) for name in pictures
        }


def _picture_columns(schema: pyarrow.Schema) -> tuple[str, ...]:
    """Return the columns of {bytes, path}, as `datasets` stores pictures, or of lists of them."""
    import pyarrow

    found = []
    for field in schema:
        kind = field.type.value_type if pyarrow.types.is_list(field.type) else field.type
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found.append(field.name)
    return tuple(found)
