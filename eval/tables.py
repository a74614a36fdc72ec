"""Turns rows into tables."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

import vtc
from eval import statistics
from eval.cost import CostTable
from eval.results_log import Row
from eval.runner import rows_by_run
from eval.runs import FULL, Run
from eval.tasks.base import Task
from eval.timing import FIGURES

Timings = Mapping[str, Mapping[str, float]]


def summary(
    rows: Sequence[Row], runs: Sequence[Run], task: Task, times: Timings | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """Return one line per run that answered any sample; `unanswered` lists the others.

    Columns: ``score`` with ``low`` and ``high`` (95 %, clusters resampled as wholes), ``agreement`` and ``kl`` with the
    uncompressed model, ``kept`` (share of visual tokens, mean over layers and samples), ``tokens`` (the same as a
    number), ``gflops`` and ``flops`` (the decoder's prefill, and its share of the uncompressed one), time and memory
    (`timing.FIGURES`), ``n``, ``broken`` samples, and the task's own summary as ``task.*``.

    Raises
    ------
    InputError
        The uncompressed model answered no sample.
    """
    by_run = rows_by_run(rows)
    visual = {row["sample"]: row["visual"] for row in rows if row.get("visual") is not None}
    lines = []
    for run in runs:
        every = by_run.get(run.name, [])
        good = [row for row in every if "error" not in row]
        if not good:
            if run == FULL:
                raise vtc.InputError(f"{run.name}: {_why_not(every)}")
            continue
        values, groups = [row["scores"][task.main_score] for row in good], [row["group"] for row in good]
        low, high = statistics.interval(values, groups, seed=seed)
        counted = [row["kept"] * visual[row["sample"]] for row in good if row["sample"] in visual]
        lines.append(
            {
                "run": run.name,
                "method": run.stages or run.method or "all tokens",
                "keep": run.keep_ratio if run.keep_ratio is not None else run.keep_tokens,
                "positions": run.positions,
                "options": " ".join(f"{name}={value}" for name, value in sorted(run.options.items())),
                "kept": plain.fmean(row["kept"] for row in good),
                "tokens": plain.fmean(counted) if counted else None,
                "score": float(np.mean(values)),
                "low": low,
                "high": high,
                "agreement": plain.fmean(row["agrees"] for row in good),
                "kl": plain.fmean(row["kl"] for row in good),
                "gflops": _mean(row["flops"] / 1e9 for row in good if row["flops"] is not None),
                "flops": _mean(row["flops_share"] for row in good if row["flops_share"] is not None),
                **{name: (times or {}).get(run.name, {}).get(name) for name in FIGURES},
                "n": len(good),
                "broken": len(every) - len(good),
                **{f"task.{name}": value for name, value in task.summarise(good).items()},
            }
        )
    return pd.DataFrame(lines)


def with_cost(frame: pd.DataFrame, runs: Sequence[Run], cost: CostTable, tower_layers: int | None) -> pd.DataFrame:
    """Return the summary with what a call takes at a true shape: selector, whole call, how many times as fast."""
    by_name = {run.name: run for run in runs}
    seconds = [
        cost.seconds(by_name[name], kept, tower_layers) for name, kept in zip(frame["run"], frame["kept"], strict=True)
    ]
    whole = cost.seconds(FULL, 1.0, tower_layers)
    choosing = [cost.selector_seconds(by_name[name]) for name in frame["run"]]
    return frame.assign(
        call_selector=pd.Series([None if each is None else 1e3 * each for each in choosing], dtype=float),
        call=pd.Series(seconds, dtype=float),
        call_speed_up=pd.Series([None if each is None or not whole else whole / each for each in seconds], dtype=float),
    )


def unanswered(rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, str]:
    """Return the reasons of the runs that have no line in `summary`."""
    by_run = rows_by_run(rows)
    return {
        run.name: _why_not(by_run.get(run.name, []))
        for run in runs
        if not any("error" not in row for row in by_run.get(run.name, []))
    }


def _why_not(every: Sequence[Row]) -> str:
    first = next((row["error"] for row in every), "no sample was run")
    return f"none of {len(every)} samples could be answered; the first: {first}"


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return plain.fmean(found) if found else None


def by_kind(rows: Sequence[Row], main: str) -> pd.DataFrame:
    """Return the mean score by run (rows) and kind of question (columns); empty if the task has no kinds."""
    known = [row for row in rows if "error" not in row and "kind" in row]
    if not known:
        return pd.DataFrame()
    frame = pd.DataFrame({"run": r["run"], "kind": r["kind"], "score": r["scores"][main]} for r in known)
    order = list(rows_by_run(known))
    return frame.pivot_table(index="run", columns="kind", values="score", sort=False).reindex(order)


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
    ("call_selector", "selector at true shape, ms", "{:.2f}".format),
    ("call", "whole call at true shape, s", "{:.3g}".format),
    ("call_speed_up", "speed-up", "{:.2f}x".format),
    ("speed_up", "TTFT speed-up", "{:.2f}x".format),
    ("ttft", "TTFT, s", "{:.3g}".format),
    ("decode_rate", "decode, tokens/s", "{:.1f}".format),
    ("selector_ms", "selector, ms", "{:.2f}".format),
    ("host_mib", "host peak, MiB", "{:.0f}".format),
    ("device_mib", "device peak, MiB", "{:.0f}".format),
    ("n", "n", str),
    ("broken", "broken", str),
)
# Left out if all values are blank.
_ONLY_IF_KNOWN = {
    "options",
    *FIGURES,
    "flops",
    "tokens",
    "call_selector",
    "call",
    "call_speed_up",
}  # left out if all values are blank


def markdown(frame: pd.DataFrame) -> str:
    """Return the Markdown table; times, options and broken samples only if there are any."""
    lines = frame.assign(
        interval=[
            "" if pd.isna(low) else f"{low:.3f} to {high:.3f}"
            for low, high in zip(frame["low"], frame["high"], strict=True)
        ]
    )

    def shown(name: str) -> bool:
        if name not in lines:
            return False
        if name == "broken":
            return bool(lines[name].any())
        if name == "n":
            return lines[name].nunique() > 1
        return name not in _ONLY_IF_KNOWN or bool((lines[name].notna() & (lines[name] != "")).any())

    columns = [column for column in _COLUMNS if shown(column[0])]
    return to_markdown_table(
        [title for _, title, _ in columns],
        [
            ["" if pd.isna(line[name]) else write(line[name]) for name, _, write in columns]
            for line in lines.to_dict("records")
        ],
    )


def to_markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, the first column left-aligned, the others right-aligned."""
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def pivot_markdown(frame: pd.DataFrame) -> str:
    """Return scores by run (index) and kind or task (columns) as a Markdown table."""
    return to_markdown_table(
        ["", *map(str, frame.columns)],
        ([str(name), *("" if pd.isna(value) else f"{value:.3f}" for value in line)] for name, line in frame.iterrows()),
    )
