"""Rows to tables."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import vtc
from eval import statistics
from eval.cells import FULL, Cell
from eval.journal import Row
from eval.runner import in_groups
from eval.tasks.base import Task
from eval.timing import FIGURES

Timings = Mapping[str, Mapping[str, float]]


def summary(
    rows: Sequence[Row], cells: Sequence[Cell], task: Task, times: Timings | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """One line per cell in which any sample could be answered; `unanswered` tells of the others.

    Columns: ``score`` with ``low`` and ``high`` (95 %, clusters drawn as wholes), ``agreement`` and ``kl`` with the
    model that sees all tokens, ``kept`` (share of visual tokens, mean over layers and samples), ``tokens`` (the same as
    a number), ``gflops`` and ``flops`` (the decoder's prefill, and its share of all tokens'), what was measured of time
    and memory (`timing.FIGURES`), ``n``, ``broken`` samples, and the task's own aggregate numbers as ``task.*``.

    Raises
    ------
    InputError
        No sample could be answered with all tokens.
    """
    by_cell = in_groups(rows)
    visual = {row["sample"]: row["visual"] for row in rows if row.get("visual") is not None}
    lines = []
    for cell in cells:
        every = by_cell.get(cell.name, [])
        good = [row for row in every if "error" not in row]
        if not good:
            if cell == FULL:
                raise vtc.InputError(f"{cell.name}: {_why_not(every)}")
            continue
        values, groups = [row["scores"][task.main_score] for row in good], [row["group"] for row in good]
        low, high = statistics.interval(values, groups, seed=seed)
        counted = [row["kept"] * visual[row["sample"]] for row in good if row["sample"] in visual]
        lines.append(
            {
                "cell": cell.name,
                "method": cell.method or "all tokens",
                "keep": cell.keep_ratio if cell.keep_ratio is not None else cell.keep_tokens,
                "positions": cell.positions,
                "options": " ".join(f"{name}={value}" for name, value in sorted(cell.options.items())),
                "kept": plain.fmean(row["kept"] for row in good),
                "tokens": plain.fmean(counted) if counted else None,
                "score": float(np.mean(values)),
                "low": low,
                "high": high,
                "agreement": plain.fmean(row["agrees"] for row in good),
                "kl": plain.fmean(row["kl"] for row in good),
                "gflops": _mean(row["flops"] / 1e9 for row in good if row["flops"] is not None),
                "flops": _mean(row["flops_share"] for row in good if row["flops_share"] is not None),
                **{name: (times or {}).get(cell.name, {}).get(name) for name in FIGURES},
                "n": len(good),
                "broken": len(every) - len(good),
                **{f"task.{name}": value for name, value in task.summarise(good).items()},
            }
        )
    return pd.DataFrame(lines)


def unanswered(rows: Sequence[Row], cells: Sequence[Cell]) -> dict[str, str]:
    """Cells that have no line in `summary`, with the reason."""
    by_cell = in_groups(rows)
    return {
        cell.name: _why_not(by_cell.get(cell.name, []))
        for cell in cells
        if not any("error" not in row for row in by_cell.get(cell.name, []))
    }


def _why_not(every: Sequence[Row]) -> str:
    first = next((row["error"] for row in every), "no sample was run")
    return f"none of {len(every)} samples could be answered; the first: {first}"


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return plain.fmean(found) if found else None


def by_kind(rows: Sequence[Row], main: str) -> pd.DataFrame:
    """Mean score per cell (rows) and kind of question (columns); empty if the task has no kinds."""
    known = [row for row in rows if "error" not in row and "kind" in row]
    if not known:
        return pd.DataFrame()
    frame = pd.DataFrame({"cell": r["cell"], "kind": r["kind"], "score": r["scores"][main]} for r in known)
    order = list(in_groups(known))
    return frame.pivot_table(index="cell", columns="kind", values="score", sort=False).reindex(order)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("method", "method", str),
    ("keep", "keep", "{:g}".format),
    ("positions", "positions", str),
    ("options", "options", str),
    ("kept", "kept, mean of layers", _percent),
    ("tokens", "tokens", "{:.1f}".format),
    ("score", "score", "{:.3f}".format),
    ("interval", "95 %", str),
    ("agreement", "agreement", "{:.3f}".format),
    ("kl", "KL", "{:.3f}".format),
    ("flops", "FLOPs", _percent),
    ("speed_up", "TTFT speed-up", "{:.2f}x".format),
    ("ttft", "TTFT, s", "{:.3g}".format),
    ("decode_rate", "decode, tokens/s", "{:.1f}".format),
    ("selector_ms", "selector, ms", "{:.2f}".format),
    ("host_mib", "host peak, MiB", "{:.0f}".format),
    ("device_mib", "device peak, MiB", "{:.0f}".format),
    ("n", "n", str),
    ("broken", "broken", str),
)
_ONLY_IF_TOLD = {"options", *FIGURES, "flops", "tokens"}  # columns of nothing but blanks say nothing


def markdown(frame: pd.DataFrame) -> str:
    """The table for people: times, options and broken samples only where there are any to tell."""
    lines = frame.assign(
        interval=[
            "" if pd.isna(low) else f"{low:.3f} to {high:.3f}"
            for low, high in zip(frame["low"], frame["high"], strict=True)
        ]
    )

    def shown(name: str) -> bool:
        if name == "broken":
            return bool(lines[name].any())
        if name == "n":
            return lines[name].nunique() > 1
        return name not in _ONLY_IF_TOLD or bool((lines[name].notna() & (lines[name] != "")).any())

    columns = [column for column in _COLUMNS if shown(column[0])]
    return pipes(
        [title for _, title, _ in columns],
        [
            ["" if pd.isna(line[name]) else write(line[name]) for name, _, write in columns]
            for line in lines.to_dict("records")
        ],
    )


def pipes(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def pivot_markdown(frame: pd.DataFrame) -> str:
    """Scores by cell (index) and something else (columns), as of `by_kind`."""
    return pipes(
        ["", *map(str, frame.columns)],
        ([str(name), *("" if pd.isna(value) else f"{value:.3f}" for value in line)] for name, line in frame.iterrows()),
    )
