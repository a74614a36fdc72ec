"""Rows to tables and pictures."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import vtc
from eval import statistics
from eval.cells import BASELINES, BLIND, BOUNDS, FULL, Cell
from eval.journal import Row
from eval.runner import in_groups
from eval.tasks.base import Task

Timings = Mapping[str, Mapping[str, float]]


def summary(
    rows: Sequence[Row], cells: Sequence[Cell], task: Task, times: Timings | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """One line per cell.

    Columns: ``score`` with ``low`` and ``high`` (95 %, clusters drawn as wholes), ``agreement`` and ``kl`` with the
    model that sees all tokens, ``kept`` (share of visual tokens, mean over layers and samples), ``flops`` (share of the
    decoder's prefill), ``speed_up`` and ``selector_share`` where times were taken, ``n``, ``broken`` samples, and the
    task's own aggregate numbers as ``task.*``.

    Raises
    ------
    InputError
        A cell has no rows, or none that could be read.
    """
    by_cell, lines = in_groups(rows), []
    for cell in cells:
        every = by_cell.get(cell.name, [])
        good = [row for row in every if "error" not in row]
        if not good:
            first = next((row["error"] for row in every), "no sample was run")
            raise vtc.InputError(f"{cell.name}: none of {len(every)} samples could be read; the first: {first}")
        main = task.main_score
        values, groups = [row["scores"][main] for row in good], [row["group"] for row in good]
        low, high = statistics.interval(values, groups, seed=seed)
        flops = [row["flops_share"] for row in good if row.get("flops_share") is not None]
        lines.append(
            {
                "cell": cell.name,
                "method": cell.method or "all tokens",
                "keep": cell.keep_ratio if cell.keep_ratio is not None else cell.keep_tokens,
                "positions": cell.positions,
                "kept": plain.fmean(row["kept"] for row in good),
                "score": float(np.mean(values)),
                "low": low,
                "high": high,
                "agreement": plain.fmean(row["agrees"] for row in good),
                "kl": plain.fmean(row["kl"] for row in good),
                "flops": plain.fmean(flops) if flops else (1.0 if cell in (FULL, BLIND) else None),
                **_timed(cell, times),
                "n": len(good),
                "broken": len(every) - len(good),
                **{f"task.{name}": value for name, value in task.summarise(good).items()},
            }
        )
    return pd.DataFrame(lines)


def _timed(cell: Cell, times: Timings | None) -> dict[str, float | None]:
    known = (times or {}).get(cell.name, {})
    return {name: known.get(name) for name in ("ttft", "speed_up", "selector_share")}


def by_kind(rows: Sequence[Row], main: str) -> pd.DataFrame:
    """Mean score per cell (rows) and kind of question (columns); empty if the task has no kinds."""
    known = [row for row in rows if "error" not in row and "kind" in row]
    if not known:
        return pd.DataFrame()
    frame = pd.DataFrame({"cell": r["cell"], "kind": r["kind"], "score": r["scores"][main]} for r in known)
    order = list(in_groups(rows))
    return frame.pivot_table(index="cell", columns="kind", values="score", sort=False).reindex(order)


def markdown(frame: pd.DataFrame) -> str:
    """The table for people: positions, times and broken samples only where there are any to tell."""
    drop = [name for name in ("positions", "speed_up", "selector_share") if frame[name].nunique(dropna=False) <= 1]
    header = ["method", "keep", *(["positions"] if "positions" not in drop else []), "kept, mean of layers", "score"]
    header += ["95 %", "agreement", "KL", "FLOPs"]
    header += [title for name, title in _TIMES if name not in drop]
    broken = bool(frame["broken"].any())
    header += ["broken"] * broken
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for line in frame.to_dict("records"):
        cells = [line["method"], "" if pd.isna(line["keep"]) else f"{line['keep']:g}"]
        cells += [line["positions"]] if "positions" not in drop else []
        cells += [f"{100 * line['kept']:.1f} %", f"{line['score']:.3f}"]
        cells.append("" if pd.isna(line["low"]) else f"{line['low']:.3f} to {line['high']:.3f}")
        cells += [f"{line['agreement']:.3f}", f"{line['kl']:.3f}", _percent(line["flops"])]
        if "speed_up" not in drop:
            cells.append("" if pd.isna(line["speed_up"]) else f"{line['speed_up']:.2f}x")
        if "selector_share" not in drop:
            cells.append(_percent(line["selector_share"]))
        cells += [str(line["broken"])] * broken
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_TIMES = (("speed_up", "TTFT speed-up"), ("selector_share", "of TTFT selecting"))


def _percent(value: Any) -> str:
    return "" if pd.isna(value) else f"{100 * value:.1f} %"


def kinds_markdown(frame: pd.DataFrame) -> str:
    """`by_kind` as Markdown."""
    lines = ["| | " + " | ".join(map(str, frame.columns)) + " |", "|---|" + "---:|" * len(frame.columns)]
    for name, line in frame.iterrows():
        lines.append(f"| {name} | " + " | ".join("" if pd.isna(v) else f"{v:.3f}" for v in line) + " |")
    return "\n".join(lines)


def pareto(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats (cheaper and at least as good, or as cheap and better)."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -gain[i]))
    front, best = [], -np.inf
    for i in order:
        if gain[i] > best:
            front.append(i)
            best = gain[i]
    return front


def plots(frame: pd.DataFrame, kinds: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Score against kept tokens, score against measured time with the Pareto front marked, and bars by kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    full = frame[frame["method"] == "all tokens"].iloc[0]
    for column, label, name in (
        ("kept", "visual tokens kept, mean over layers", "score-by-tokens.png"),
        ("ttft", "time to first token, s", "score-by-ttft.png"),
    ):
        known = frame[frame[column].notna() & ~frame["method"].isin(("all tokens", BLIND.name))]
        if known.empty:
            continue
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for method, lines in known.groupby("method", sort=False):
            frameless = method in BASELINES or method in BOUNDS
            ordered = lines.sort_values(column)
            style = {"linestyle": "--", "alpha": 0.7} if frameless else {}
            axes.plot(ordered[column], ordered["score"], marker="o", markersize=4, label=method, **style)
        axes.axhline(full["score"], color="black", linewidth=0.8, label="all tokens")
        for floor in frame[frame["method"] == BLIND.name]["score"]:
            axes.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label=BLIND.name)
        if column == "ttft":
            points = known[~known["method"].isin(BOUNDS)]
            best = points.iloc[pareto(points["ttft"].tolist(), points["score"].tolist())]
            axes.scatter(best["ttft"], best["score"], s=110, facecolors="none", edgecolors="black", label="front")
        else:
            axes.set_xscale("log")
        axes.set(xlabel=label, ylabel="score", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2)
        written.append(folder / name)
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    if not kinds.empty:
        budgets = sorted(frame["keep"].dropna().unique())
        middle = budgets[(len(budgets) - 1) // 2]  # one budget: bars of all would be unreadable
        chosen = frame[(frame["method"] == "all tokens") | (frame["keep"] == middle)]["cell"]
        axes = kinds.loc[chosen].T.plot.bar(figsize=(12, 4.5), width=0.85, colormap="tab20")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set(ylabel="score", title=title, xlabel="")
        axes.figure.tight_layout()
        written.append(folder / "score-by-kind.png")
        axes.figure.savefig(written[-1], dpi=120)
        plt.close(axes.figure)
    return written
