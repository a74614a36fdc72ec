"""An append-only file of results: what a killed process has measured is not measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtc import ConfigError, InputError
from vtc.files import cut_incomplete_line
from vtc.plain import parse_json

Row = dict[str, Any]


class ResultsLog:
    """JSON lines: a header for each session of measuring, and a row for each measurement.

    Every line is flushed to the disk before the next one begins, so a killed process leaves at most one incomplete
    line at the end, which the next session cuts off. Several logs of one kind in a folder (``rows.jsonl``,
    ``rows.0-of-2.jsonl``) hold one set of results: each process writes its own file and reads all of them.

    Parameters
    ----------
    path : Path
        The file; its name up to the first dot is the kind.
    identity : mapping
        What must be equal for rows to belong together: task, model, seed, precision.
    conditions : mapping
        What may change between sessions: versions, hardware, command.
    retry : bool
        Measure again what ended in an error; the later row replaces the earlier one.

    Raises
    ------
    InputError
        A file of the folder has rows with another identity, or is not such a log.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], conditions: Mapping[str, Any], *, retry: bool = False
    ) -> None:
        self.path = path
        self.rows: list[Row] = []
        identity = json.loads(json.dumps(identity))
        if path.exists():
            cut_incomplete_line(path)
        for file in _files(path.parent, path.name.split(".")[0]):
            self._recover(file, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._write({"identity": identity, "conditions": dict(conditions)})
        self._done = {(row["run"], row["sample"]) for row in self.rows if not (retry and "error" in row)}

    def _recover(self, file: Path, identity: Mapping[str, Any]) -> None:
        for header, row in _parse(file):
            if header is not None and header["identity"] != identity:
                before = header["identity"]
                changed = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
                raise InputError(
                    f"{file} holds rows of another evaluation (different: {', '.join(changed)}); choose another output "
                    "folder, or remove the file"
                )
            if row is not None:
                self.rows.append(row)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def has(self, run: str, sample: str) -> bool:
        """Return whether this measurement has been made."""
        return (run, sample) in self._done

    def add(self, row: Row) -> None:
        """Append one measurement."""
        self._write(row)
        self.rows.append(row)
        self._done.add((row["run"], row["sample"]))

    def close(self) -> None:
        """Close the file; `rows` stays available."""
        self._file.close()

    def __enter__(self) -> ResultsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path, kind: str = "rows") -> tuple[list[Row], list[Row]]:
    """Return the headers and the rows of a log, or of all logs of one kind in a folder.

    Rows are ordered by sample and by the order of runs in the headers, whichever processes wrote them in whatever
    order. Of two rows about the same measurement the later one counts.

    Raises
    ------
    InputError
        There is no log, or there are several with different identities.
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
                rows[row["run"], row["sample"]] = row
    if not headers:
        raise InputError(f"{path}: the files are empty; `python -m eval run --out {path}` fills them")
    if len({json.dumps(header["identity"], sort_keys=True) for header in headers}) != 1:
        raise InputError(f"{path}: the files hold rows of different evaluations, which cannot be put into one table")
    runs = [run["name"] for header in headers for run in header["conditions"].get("runs", ())]
    place = {name: number for number, name in enumerate(dict.fromkeys(runs))}
    return headers, sorted(rows.values(), key=lambda row: (row["order"], place.get(row["run"], len(place))))


def _files(folder: Path, kind: str) -> list[Path]:
    return sorted(file for file in folder.glob(f"{kind}*.jsonl") if file.name.split(".")[0] == kind)


def _parse(path: Path) -> Iterator[tuple[Row | None, Row | None]]:
    with path.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            if not text.endswith(b"\n"):
                return  # incomplete; its measurement is made again
            try:
                line = parse_json(text)
            except ConfigError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); the file was changed by hand") from error
            if not isinstance(line, dict) or not {"identity", "run", "cell"} & set(line):
                raise InputError(f"{path}, line {number}: neither a header nor a row; choose another output folder")
            yield (_header(line), None) if "conditions" in line else (None, _row(line))


def _header(line: Row) -> Row:
    """Return a header; earlier versions named its fields `run` and `cells`."""
    conditions = line["conditions"]
    if "cells" in conditions:
        conditions["runs"] = conditions.pop("cells")
    return line if "identity" in line else {"identity": line["run"], "conditions": conditions}


def _row(line: Row) -> Row:
    """Return a row; earlier versions named the run `cell`."""
    return line if "run" in line else {"run": line.pop("cell"), **line}
