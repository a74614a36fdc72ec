"""Is one setting better than another? Paired differences over the samples that both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtc
from eval import journal, statistics, tables, tasks
from eval.journal import Row
from eval.runner import in_groups


@dataclass(frozen=True)
class Difference:
    """B minus A in the task's main score.

    Attributes
    ----------
    a, b : str
        What was compared.
    difference : float
    low, high : float
        95 %, groups of samples (an image, a video) drawn as wholes.
    p : float
        Two-sided, by sign flips of whole groups.
    mcnemar : float or None
        Exact p of McNemar's test, which takes samples as independent; None where scores are not right or wrong.
    n, groups : int
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p: float
    mcnemar: float | None
    n: int
    groups: int


@dataclass(frozen=True)
class _Side:
    """A folder's answers: the task, and by cell the rows by sample."""

    name: str
    task: str
    cells: dict[str, dict[str, Row]]


def compare(a: str, b: str, folder: Path | None = None) -> list[Difference]:
    """Paired differences of two cells, or of every cell that two folders share.

    Parameters
    ----------
    a, b : str
        With `folder` names of its cells; without, folders of results, or FOLDER:CELL.
    folder : Path, optional

    Raises
    ------
    InputError
        Something is not there, or there is nothing to pair: other tasks, no sample or no cell in common.
    """
    if folder is not None:
        a, b = f"{folder}:{a}", f"{folder}:{b}"
    (side_a, cell_a), (side_b, cell_b) = _side(a), _side(b)
    if side_a.task != side_b.task:
        raise vtc.InputError(f"{a} is about {side_a.task}, {b} about {side_b.task}: nothing to pair")
    if (cell_a is None) != (cell_b is None):
        raise vtc.InputError("compare two folders, or FOLDER:CELL with FOLDER:CELL, not one with the other")
    if cell_a is not None and cell_b is not None:
        pairs = [(cell_a, cell_b)]
    else:
        pairs = [(cell, cell) for cell in side_a.cells if cell in side_b.cells]
        if not pairs:
            raise vtc.InputError(f"{a} and {b} have no cell in common")
    main = tasks.get_task(side_a.task).main_score
    same_folder = side_a.name == side_b.name
    found = []
    for left, right in pairs:
        names = (left, right) if same_folder else (f"{side_a.name}: {left}", f"{side_b.name}: {right}")
        found.append(_difference(names, side_a.cells[left], side_b.cells[right], main))
    return found


def _side(text: str) -> tuple[_Side, str | None]:
    folder, cell = (text, None) if Path(text).exists() else _split(text)
    headers, rows = journal.read(Path(folder))
    good = in_groups(row for row in rows if "error" not in row)
    side = _Side(folder, headers[-1]["run"]["task"], {name: {r["sample"]: r for r in rs} for name, rs in good.items()})
    if cell is not None and cell not in side.cells:
        raise vtc.InputError(f"{folder} has no cell {cell!r} with answers; it has: {', '.join(side.cells)}")
    return side, cell


def _split(text: str) -> tuple[str, str | None]:
    folder, colon, cell = text.rpartition(":")
    return (folder, cell) if colon else (text, None)


def _difference(names: tuple[str, str], a: Mapping[str, Row], b: Mapping[str, Row], main: str) -> Difference:
    shared = [sample for sample in a if sample in b]
    if not shared:
        raise vtc.InputError(f"{names[0]} and {names[1]} have no sample in common")
    x, y = ([side[sample]["scores"][main] for sample in shared] for side in (a, b))
    groups = [a[sample]["group"] for sample in shared]
    difference, (low, high), p = statistics.paired(x, y, groups)
    binary = set(x) | set(y) <= {0.0, 1.0}
    return Difference(
        *names, difference, low, high, p, statistics.mcnemar(x, y) if binary else None, len(shared), len(set(groups))
    )


def told(differences: Sequence[Difference]) -> str:
    """A table; where there are several lines, also p after Holm, which allows for having looked so often."""
    several = len(differences) > 1
    adjusted = statistics.holm([each.p for each in differences])
    header = ["A", "B", "B - A", "95 %", "p, sign flips", *(["p, Holm"] * several), "p, McNemar", "samples", "groups"]
    lines = []
    for each, holm in zip(differences, adjusted, strict=True):
        line: list[Any] = [each.a, each.b, f"{each.difference:+.4f}", f"{each.low:+.4f} to {each.high:+.4f}"]
        line += [f"{each.p:.4f}", *([f"{holm:.4f}"] * several)]
        line += ["" if each.mcnemar is None else f"{each.mcnemar:.4f}", str(each.n), str(each.groups)]
        lines.append(line)
    return tables.pipes(header, lines)
