"""Plots the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval.runs import BASELINES, BLIND, BOUNDS, FULL
from vtc.files import replacing

_AXES = (
    ("kept", "visual tokens kept, mean over layers", "score-by-tokens.png"),
    ("ttft", "measured time to first token, s", "score-by-ttft.png"),
    ("call", "whole call at the shape of a checkpoint, s", "score-by-call.png"),
)


def pareto(cost: Sequence[float], gain: Sequence[float]) -> list[int]:
    """Return the indices of the points that no other point dominates."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], -gain[i]))
    front, best = [], -np.inf
    for i in order:
        if gain[i] > best:
            front.append(i)
            best = gain[i]
    return front


def against_cost(frame: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Plot score against kept tokens and, where they are known, against times with the Pareto front marked.

    Parameters
    ----------
    frame : DataFrame
        The result of `tables.summary`.
    folder : Path
    title : str
    """
    written = []
    for column, label, name in _AXES:
        if column in frame and _known(frame, column).any():
            written.append(_against(frame, column, label, folder / name, title))
    return written


def against_call(frame: pd.DataFrame, path: Path, title: str) -> Path:
    """Plot score against the seconds of a whole call, with the Pareto front marked.

    Parameters
    ----------
    frame : DataFrame
        The result of `tables.with_cost`.
    path : Path
    title : str
    """
    column, label, _ = _AXES[-1]
    return _against(frame, column, label, path, title)


def _known(frame: pd.DataFrame, column: str) -> pd.Series:
    return frame[column].notna() & ~frame["run"].isin((FULL.name, BLIND.name))


def _against(frame: pd.DataFrame, column: str, label: str, path: Path, title: str) -> Path:
    plt = _pyplot()
    full = frame[frame["run"] == FULL.name].iloc[0]
    known = frame[_known(frame, column)]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    # Stages at other budgets are points of one line.
    known = known.assign(line=known["method"].str.replace(r"=[^+]*", "", regex=True))
    colours = {line: plt.get_cmap("tab20")(i % 20) for i, line in enumerate(known["line"].unique())}
    for (method, positions), lines in known.groupby(["line", "positions"], sort=False):
        ordered = lines.sort_values(column)
        compact = positions == "compact"
        axes.plot(
            ordered[column],
            ordered["score"],
            marker="s" if compact else "o",
            markersize=4,
            markerfacecolor="none" if compact else None,
            linestyle="--" if method in BASELINES or method in BOUNDS else ":" if compact else "-",
            color=colours[method],
            label=f"{method}, compact" if compact else method,
        )
    axes.axhline(full["score"], color="black", linewidth=0.8, label=FULL.name)
    for floor in frame[frame["run"] == BLIND.name]["score"]:
        axes.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label=BLIND.name)
    if column != "kept":
        points = frame[frame[column].notna()]  # the uncompressed model is one of the points
        best = points.iloc[pareto(points[column].tolist(), points["score"].tolist())]
        axes.plot(best[column], best["score"], drawstyle="steps-post", color="black", linewidth=0.8, alpha=0.6)
        axes.scatter(best[column], best["score"], s=110, facecolors="none", edgecolors="black", label="front")
    else:
        axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="score", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return _saved(figure, path)


def bars(scores: pd.DataFrame, frame: pd.DataFrame, path: Path, title: str) -> Path:
    """Plot scores by kind of question or by task, for every method at the middle budget; all would be unreadable.

    Parameters
    ----------
    scores : DataFrame
        Runs by kinds or tasks, as `tables.by_kind` returns.
    frame : DataFrame
        The result of `tables.summary`; has the budget of each run.
    path : Path
    title : str
    """
    plt = _pyplot()
    budgets = sorted(frame["keep"].dropna().unique())
    middle = budgets[(len(budgets) - 1) // 2] if budgets else None
    plain = (frame["keep"] == middle) & (frame["positions"] == "original")
    chosen = [run for run in frame[(frame["run"] == FULL.name) | plain]["run"] if run in scores.index]
    figure, axes = plt.subplots(figsize=(12, 4.5), layout="constrained")
    scores.loc[chosen].T.plot.bar(ax=axes, width=0.85, colormap="tab20", rot=20)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set(ylabel="score", title=title, xlabel="")
    return _saved(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _saved(figure: Any, path: Path) -> Path:
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
    _pyplot().close(figure)
    return path
