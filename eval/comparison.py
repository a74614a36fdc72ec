"""Paired differences between two runs over the samples that both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtc
from eval import results_log, statistics, tables, tasks
from eval.results_log import Row
from eval.runner import rows_by_run


@dataclass(frozen=True)
class Difference:
    """B minus A in the task's main score.

    Attributes
    ----------
    a, b : str
        Names of the two sides.
    difference : float
    low, high : float
        95 % confidence interval; whole groups of samples (an image, a video) are resampled.
    p : float
        Two-sided, by sign flips of whole groups.
    mcnemar : float or None
        Exact p of McNemar's test, which treats samples as independent; None where scores are not binary.
    n, groups : int
        Numbers of samples and groups.
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
    """The answers in a folder: the task, and the rows by run and sample."""

    name: str
    task: str
    runs: dict[str, dict[str, Row]]


def compare(a: str, b: str, folder: Path | None = None) -> list[Difference]:
    """Compare two runs, or every run that two folders share.

    Parameters
    ----------
    a, b : str
        With `folder` names of its runs; without, folders of results, or FOLDER:RUN.
    folder : Path, optional

    Raises
    ------
    InputError
        Something does not exist, or nothing can be paired: other tasks, no sample or no run in common.
    """
    if folder is not None:
        a, b = f"{folder}:{a}", f"{folder}:{b}"
    (side_a, run_a), (side_b, run_b) = _side(a), _side(b)
    if side_a.task != side_b.task:
        raise vtc.InputError(f"{a} is about {side_a.task}, {b} about {side_b.task}: nothing to pair")
    if (run_a is None) != (run_b is None):
        raise vtc.InputError("compare two folders, or FOLDER:RUN with FOLDER:RUN, not one with the other")
    if run_a is not None and run_b is not None:
        pairs = [(run_a, run_b)]
    else:
        pairs = [(run, run) for run in side_a.runs if run in side_b.runs]
        if not pairs:
            raise vtc.InputError(f"{a} and {b} have no run in common")
    main = tasks.get_task(side_a.task).main_score
    same_folder = side_a.name == side_b.name
    found = []
    for left, right in pairs:
        names = (left, right) if same_folder else (f"{side_a.name}: {left}", f"{side_b.name}: {right}")
        found.append(_difference(names, side_a.runs[left], side_b.runs[right], main))
    return found


def _side(text: str) -> tuple[_Side, str | None]:
    folder, run = (text, None) if Path(text).exists() else _split(text)
    headers, rows = results_log.read(Path(folder))
    good = rows_by_run(row for row in rows if "error" not in row)
    by_sample = {name: {row["sample"]: row for row in each} for name, each in good.items()}
    if run is not None and run not in by_sample:
        raise vtc.InputError(f"{folder} has no run {run!r} with answers; it has: {', '.join(by_sample)}")
    return _Side(folder, headers[-1]["identity"]["task"], by_sample), run


def _split(text: str) -> tuple[str, str | None]:
    folder, colon, run = text.rpartition(":")
    return (folder, run) if colon else (text, None)


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


def to_markdown(differences: Sequence[Difference]) -> str:
    """Return a table; with several lines also p after Holm's correction for multiple comparisons."""
    several = len(differences) > 1
    adjusted = statistics.holm([each.p for each in differences])
    header = ["A", "B", "B - A", "95 %", "p, sign flips", *(["p, Holm"] * several), "p, McNemar", "samples", "groups"]
    lines = []
    for each, holm in zip(differences, adjusted, strict=True):
        line: list[Any] = [each.a, each.b, f"{each.difference:+.4f}", f"{each.low:+.4f} to {each.high:+.4f}"]
        line += [f"{each.p:.4f}", *([f"{holm:.4f}"] * several)]
        line += ["" if each.mcnemar is None else f"{each.mcnemar:.4f}", str(each.n), str(each.groups)]
        lines.append(line)
    return tables.to_markdown_table(header, lines)
