"""Records of questions in whatever container a release comes: JSON, JSON lines, TSV or CSV, parquet, arrow.

Pictures inside parquet and arrow files stay there until they are looked at.
"""

from __future__ import annotations

import ast
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import vtc
from eval.tasks.reading import encoded, missing, need, read_json, read_lines, read_tsv

if TYPE_CHECKING:
    import pyarrow

    from eval.tasks.base import Picture, Task

Record = dict[str, Any]

_STATE = "state.json"
"""Lies in every folder that `datasets.save_to_disk` writes."""


def records(task: Task, folder: Path | None, *names: str) -> tuple[Path, list[Record]]:
    """The records in the first of `names` that the folder has, and where they stand.

    Parameters
    ----------
    task : Task
        Named in errors.
    folder : Path or None
    *names : str
        Files or patterns of files (the shards of one split), or folders that `datasets.save_to_disk` wrote; "." is the
        folder itself.

    Raises
    ------
    InputError
        There is none, or it cannot be read.
    """
    for name in names if folder is not None else ():
        found = [folder] if name == "." else sorted(folder.glob(name))
        found = [path for path in found if path.is_file() or (path / _STATE).is_file()]
        if found:
            return found[0], [record for path in found for record in read(path)]
    raise missing(task, folder, [name if name != "." else f"{_STATE} of a data set" for name in names])


def read(path: Path) -> list[Record]:
    """All records of one file, or of a folder that `datasets.save_to_disk` wrote.

    Raises
    ------
    InputError
        It is not what its name says.
    """
    if path.is_dir():
        return [record for part in _arrow_parts(path) for record in _from_arrow(part)]
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return read_lines(path)
    if kind in (".tsv", ".csv"):
        return read_tsv(path, ())
    if kind == ".parquet":
        return _from_parquet(path)
    if kind == ".arrow":
        return _from_arrow(path)
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise vtc.InputError(f"{path}: expected a list of records")
    return found


def picture(record: Mapping[str, Any], path: Path, number: int, key: str = "image") -> Picture:
    """How to open the picture of a record: a cell of a table, or base64.

    Raises
    ------
    InputError
        The record has none.
    """
    cell = need(record, key, path, number)
    if isinstance(cell, PictureCell):
        return cell
    if isinstance(cell, str) and cell:
        return encoded(cell)
    raise vtc.InputError(f"{path}, record {number}: {key!r} is {type(cell).__name__}, not a picture")


@dataclass(frozen=True)
class PictureCell:
    """A picture in a table, read when it is called; of a list of pictures the first.

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
        """The picture."""
        value = _cell(self.path, self.column, self.row)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            raise ValueError(f"{self.path}, row {self.row}: no picture in column {self.column!r}")
        if value.get("bytes"):
            return Image.open(io.BytesIO(value["bytes"]))
        return Image.open(self.path.parent / value["path"])


# ------------------------------------------------------------------------------------------------------------- parquet


def _from_parquet(path: Path) -> list[Record]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        shown = _picture_columns(file.schema_arrow)
        table = file.read(columns=[name for name in file.schema_arrow.names if name not in shown])
    except (OSError, pyarrow.ArrowException) as error:
        raise vtc.InputError(f"{path}: not a parquet file: {error}") from error
    return list(_rows(path, table, shown))


def _cell(path: Path, column: str, row: int) -> Any:
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
    """Neighbouring pictures are read together: a row group is the least that parquet files give out."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


# --------------------------------------------------------------------------------------------------------------- arrow


def _arrow_parts(folder: Path) -> list[Path]:
    state = folder / _STATE
    if not state.is_file():
        raise vtc.InputError(f"{folder}: not a folder that datasets.save_to_disk wrote: it has no {_STATE}")
    try:
        return [folder / each["filename"] for each in read_json(state)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise vtc.InputError(f"{state}: no list of data files") from error


def _from_arrow(path: Path) -> list[Record]:
    import pyarrow

    try:
        table = _arrow_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise vtc.InputError(f"{path}: not an arrow file: {error}") from error
    shown = _picture_columns(table.schema)
    return list(_rows(path, table.drop_columns(list(shown)), shown))


@functools.lru_cache(maxsize=16)
def _arrow_table(path: Path) -> pyarrow.Table:
    """Mapped, not read; files of `datasets` are streams, others may be files."""
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(mapped).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(mapped).read_all()


def _rows(path: Path, table: pyarrow.Table, shown: Sequence[str]) -> Iterator[Record]:
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    for row in range(table.num_rows):
        yield {name: values[row] for name, values in columns.items()} | {
            name: PictureCell(path, name, row) for name in shown
        }


def _picture_columns(schema: pyarrow.Schema) -> tuple[str, ...]:
    """Columns of {bytes, path}, as `datasets` stores pictures, or of lists of them."""
    import pyarrow

    found = []
    for field in schema:
        kind = field.type.value_type if pyarrow.types.is_list(field.type) else field.type
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            found.append(field.name)
    return tuple(found)


def as_list(value: Any, path: Path, number: int) -> list[Any]:
    """A list, which tables without lists write as Python does.

    Raises
    ------
    InputError
        It is neither.
    """
    if isinstance(value, list):
        return value
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        found = None
    if not isinstance(found, list):
        raise vtc.InputError(f"{path}, record {number}: expected a list, got {value!r}")
    return found
