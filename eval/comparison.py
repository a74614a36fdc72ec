"""Paired differences between two runs over the samples that both answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import vtc
from eval import results_log, statistics, tables, tasks
from eval.results_log import Row
from eval.runner import rows_by_run

SHARP = 0.025
"""Half-width of an interval that tells methods apart that differ by what matters."""


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
    kinds : dict of str to Difference
        The same for each kind of question, where the task has kinds.
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
    kinds: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def half_width(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2


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
        return [_pair(side_a, run_a, side_b, run_b)]
    pairs = [run for run in side_a.runs if run in side_b.runs]
    if not pairs:
        raise vtc.InputError(f"{a} and {b} have no run in common")
    return [_pair(side_a, run, side_b, run) for run in pairs]


def compare_with(base: str, folder: Path) -> list[Difference]:
    """Compare every run of a folder with one of them.

    Raises
    ------
    InputError
        The folder has no such run, or no other.
    """
    side, run = _side(f"{folder}:{base}")
    others = [other for other in side.runs if other != run]
    if run is None or not others:
        raise vtc.InputError(f"{folder} has nothing to compare {base!r} with")
    return [_pair(side, run, side, other) for other in others]


def _pair(side_a: _Side, run_a: str, side_b: _Side, run_b: str) -> Difference:
    names = (run_a, run_b)
    if side_a.name != side_b.name:
        names = (f"{side_a.name}: {run_a}", f"{side_b.name}: {run_b}")
    a, b, main = side_a.runs[run_a], side_b.runs[run_b], tasks.get_task(side_a.task).main_score
    shared = [sample for sample in a if sample in b]
    kinds = list(dict.fromkeys(a[sample].get("kind") for sample in shared))
    parts = {
        str(kind): _difference(names, {s: a[s] for s in shared if a[s].get("kind") == kind}, b, main)
        for kind in sorted(filter(None, kinds))
    }
    return replace(_difference(names, a, b, main), kinds=parts)


def _side(text: str) -> tuple[_Side, str | None]:
    folder, run = (text, None) if Path(text).exists() else _split(text)
    headers, rows = results_log.read(Path(folder))
    good = rows_by_run(row for row in rows if "error" not in row)
    by_sample = {name: {row["sample"]: row for row in each} for name, each in good.items()}
    if run is not None and run not in by_sample:
        raise vtc.InputError(f"{folder} has no run {run!r} with answers; it has: {', '.join(by_sample)}")
    return _Side(folder, headers[-1]["identity"]["task"], by_sample), run


def _split(text: str) -> tuple[str, str | None]:
    for place in (place for place, char in enumerate(text) if char == ":"):  # names of runs have colons, too
        if Path(text[:place]).is_dir():
            return text[:place], text[place + 1 :]
    folder, colon, run = text.partition(":")
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


def to_markdown(differences: Sequence[Difference], level: float = 0.05) -> str:
    """Return a table of all pairs, and one by kind of question.

    With several pairs p is corrected for their number (Holm), and the verdict is that of the corrected p.
    """
    several = len(differences) > 1
    adjusted = statistics.holm([each.p for each in differences])
    header = ["A", "B", "B - A", "95 %", "half-width", "p, sign flips", *(["p, Holm"] * several), "verdict"]
    lines = []
    for each, holm in zip(differences, adjusted, strict=True):
        verdict = "not told apart" if not holm < level else "B is better" if each.difference > 0 else "A is better"
        line = [each.a, each.b, f"{each.difference:+.4f}", f"{each.low:+.4f} to {each.high:+.4f}"]
        line += [f"{each.half_width:.4f}", f"{each.p:.4f}", *([f"{holm:.4f}"] * several), verdict]
        line += ["" if each.mcnemar is None else f"{each.mcnemar:.4f}", str(each.n), str(each.groups)]
        lines.append(line)
    parts = [tables.to_markdown_table([*header, "p, McNemar", "samples", "groups"], lines)]
    widest = max(each.half_width for each in differences)
    if widest > SHARP:
        groups = max(each.groups for each in differences)
        parts.append(
            f"The widest interval reaches {widest:.3f} to either side; {SHARP} would take about "
            f"{groups * (widest / SHARP) ** 2:.0f} groups instead of {groups}."
        )
    kinds = sorted({kind for each in differences for kind in each.kinds})
    if kinds:
        parts.append("B - A by kind of question, with the half-width of the interval; not corrected:")
        rows = [[each.a, each.b, *(_by_kind(each.kinds.get(kind)) for kind in kinds)] for each in differences]
        parts.append(tables.to_markdown_table(["A", "B", *kinds], rows))
    return "\n\n".join(parts)


def _by_kind(part: Difference | None) -> str:
    return "" if part is None else f"{part.difference:+.3f} ± {part.half_width:.3f}"
