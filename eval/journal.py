"""An append-only file of rows that survives being killed: what is measured once is never measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtc import InputError

Row = dict[str, Any]


class Journal:
    """JSON lines, the first of which says what the run is.

    A line is written whole and flushed before the next begins. A process that is killed while writing leaves at most
    one torn line at the end, which the next one cuts off. Journals of the same kind in one folder (``rows.jsonl``,
    ``rows.0-of-2.jsonl``) are one journal in several files: each writes its own and knows what the others hold.

    Parameters
    ----------
    path : Path
        Its name up to the first dot is the kind.
    run : mapping
        What must be the same for rows to belong together: task, model, seed, precision. Conditions that may change
        between sittings (the machine) go into the rows' own header lines, one per sitting.
    conditions : mapping
        Versions, hardware, command of this sitting.
    retry : bool
        Measure again what ended in an error. The later row counts.

    Raises
    ------
    InputError
        A file of the folder holds another run's rows, or is no journal.
    """

    def __init__(
        self, path: Path, run: Mapping[str, Any], conditions: Mapping[str, Any], *, retry: bool = False
    ) -> None:
        self.path = path
        self.rows: list[Row] = []
        run = json.loads(json.dumps(run))
        if path.exists():
            _cut_torn_line(path)
        for file in _files(path.parent, path.name.split(".")[0]):
            self._recover(file, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._write({"run": run, "conditions": dict(conditions)})
        self._done = {(row["cell"], row["sample"]) for row in self.rows if not (retry and "error" in row)}

    def _recover(self, file: Path, run: Mapping[str, Any]) -> None:
        for header, row in _parse(file):
            if header is not None and header["run"] != run:
                changed = sorted(k for k in {*header["run"], *run} if header["run"].get(k) != run.get(k))
                raise InputError(
                    f"{file} holds rows of another run (different: {', '.join(changed)}); choose another output "
                    "folder, or remove the file"
                )
            if row is not None:
                self.rows.append(row)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def has(self, cell: str, sample: str) -> bool:
        """Whether this measurement has been made."""
        return (cell, sample) in self._done

    def add(self, row: Row) -> None:
        """Write one measurement down."""
        self._write(row)
        self.rows.append(row)
        self._done.add((row["cell"], row["sample"]))

    def close(self) -> None:
        """Close the file; rows stay readable."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path, kind: str = "rows") -> tuple[list[Row], list[Row]]:
    """Headers of all sittings and all rows of a journal, or of all journals of one kind in a folder (shards).

    Rows come in the order of samples and of the cells in the headers, whatever order or however many processes wrote
    them. Of two rows about the same measurement the later stands.

    Raises
    ------
    InputError
        There is no journal, or several of different runs.
    """
    files = _files(path, kind) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise InputError(f"{path}: no {kind}*.jsonl here; `python -m eval run --out {path}` makes one")
    headers, rows = [], {}
    for file in files:
        for header, row in _parse(file):
            if header is not None:
                headers.append(header)
            if row is not None:
                rows[row["cell"], row["sample"]] = row
    if len({json.dumps(header["run"], sort_keys=True) for header in headers}) != 1:
        raise InputError(f"{path}: the files hold rows of different runs, which cannot be put into one table")
    cells = [cell["name"] for header in headers for cell in header["conditions"].get("cells", ())]
    place = {name: number for number, name in enumerate(dict.fromkeys(cells))}
    order = sorted(rows.values(), key=lambda row: (row["order"], place.get(row["cell"], len(place))))
    return headers, order


def _files(folder: Path, kind: str) -> list[Path]:
    return sorted(file for file in folder.glob(f"{kind}*.jsonl") if file.name.split(".")[0] == kind)


def _cut_torn_line(path: Path) -> None:
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)


def _parse(path: Path) -> Iterator[tuple[Row | None, Row | None]]:
    with path.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            if not text.endswith("\n"):
                return  # torn; its measurement will be made again
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); the file was changed by hand") from error
            yield (line, None) if "run" in line else (None, line)
