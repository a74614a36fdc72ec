"""From arguments to a folder of rows, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import vtc
from eval import journal, models, plots, runner, tables, tasks, timing
from eval.cells import Cell, fitting, sweep_cells
from eval.conditions import conditions, hardware
from eval.models import Loaded
from eval.tasks.base import Sample, Task

DRAWN = 200
"""Samples of a task that is drawn, where nobody says how many: it has no end of its own."""


_IDENTITY = ("task", "frames", "model", "dtype", "attention", "seed")


@dataclass(frozen=True)
class Job:
    """One task and how it is put to a model: all that a process needs to take part, as plain values.

    Attributes
    ----------
    task : str
    data : Path or None
    model, dtype, device : str
    attention : str or None
    methods : tuple of str
        Names, or "all".
    keep : tuple of float
    positions : tuple of str
    options : dict of str to dict
        By method.
    limit, frames : int or None
    batch_size, seed : int
    out : Path
    """

    task: str
    data: Path | None
    model: str
    dtype: str
    device: str
    attention: str | None
    methods: tuple[str, ...]
    keep: tuple[float, ...]
    positions: tuple[str, ...]
    options: dict[str, dict[str, Any]]
    limit: int | None
    frames: int | None
    batch_size: int
    seed: int
    out: Path

    def prepare(self) -> tuple[Task, Sequence[Sample], list[Cell]]:
        """Everything that can be wrong without a model.

        Raises
        ------
        ConfigError, InputError
            It is wrong.
        """
        if self.limit is not None and self.limit < 1:
            raise vtc.ConfigError(f"--limit must be at least 1, got {self.limit}")
        if self.batch_size < 1:
            raise vtc.ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")
        task = tasks.get_task(self.task, **self._task_options())
        cells = sweep_cells(
            self.methods, self.keep, positions=self.positions, bounds=task.knows_truth, options=self.options
        )
        limit = DRAWN if self.limit is None and task.knows_truth else self.limit
        samples = task.samples(self.data)[:limit]
        if not samples:
            raise vtc.InputError(f"{self.task}: no samples in {self.data}")
        return task, samples, cells

    def _task_options(self) -> dict[str, Any]:
        if self.frames is None:
            return {}
        if self.frames < 1:
            raise vtc.ConfigError(f"--frames must be at least 1, got {self.frames}")
        if not hasattr(tasks.get_task(self.task), "frames"):
            raise vtc.ConfigError(f"--frames was given, but {self.task} shows no video files")
        return {"frames": self.frames}

    def load(self) -> Loaded:
        """The model."""
        return models.load(self.model, dtype=self.dtype, device=self.device, attention=self.attention)

    def fitted(self, loaded: Loaded) -> tuple[Task, Sequence[Sample], list[Cell], dict[str, str]]:
        """As `prepare`, the cells those that this model can run, and why the others cannot.

        Raises
        ------
        UnsupportedModelError, UnsupportedMethodError, ConfigError
            The model takes no videos, or cannot run a method that was asked for by name.
        """
        task, samples, cells = self.prepare()
        models.check_modality(loaded, "video" if any(sample.video for sample in samples) else "image")
        return task, samples, *fitting(cells, loaded.model, self.methods)

    def identity(self, weights: str) -> dict[str, Any]:
        """What rows must share to stand in one table."""
        return {**{name: getattr(self, name) for name in _IDENTITY}, "weights": weights}

    def conditions(self, cells: Sequence[Cell], left_out: dict[str, str], **more: Any) -> dict[str, Any]:
        """Of one sitting."""
        config = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if name not in (*_IDENTITY, "out")
        }
        stated = conditions(**config, **more)
        return {**stated, "cells": [cell.to_dict() for cell in cells], "left_out": left_out}


def answer(job: Job, loaded: Loaded, *, retry: bool = False) -> None:
    """Append the rows that are missing; of several processes each takes its share."""
    task, samples, cells, left_out = job.fitted(loaded)
    rank, world = runner.shard()
    name = "rows.jsonl" if world == 1 else f"rows.{rank}-of-{world}.jsonl"
    stated = job.conditions(cells, left_out, processes=world)
    with journal.Journal(job.out / name, job.identity(loaded.weights), stated, retry=retry) as rows:
        runner.run(loaded, task, samples, cells, rows, batch_size=job.batch_size, seed=job.seed, progress=rank == 0)


def take_times(job: Job, loaded: Loaded, *, count: int, rounds: int, decode_tokens: int) -> None:
    """Append the times that are missing; another machine's are refused."""
    _, samples, cells, left_out = job.fitted(loaded)
    measured = {"timed": count, "rounds": rounds, "decode_tokens": decode_tokens}
    run = {**job.identity(loaded.weights), "decode_tokens": decode_tokens, **hardware()}
    with journal.Journal(job.out / "times.jsonl", run, job.conditions(cells, left_out, **measured)) as times:
        timing.measure(
            loaded,
            samples,
            cells,
            times,
            count=count,
            rounds=rounds,
            seed=job.seed,
            decode_tokens=decode_tokens,
        )


@dataclass(frozen=True, eq=False)
class Results:
    """What a folder of rows comes to.

    Attributes
    ----------
    title : str
    frame : DataFrame
        As of `tables.summary`.
    kinds : DataFrame
        As of `tables.by_kind`.
    left_out : dict of str to str
        Cells without a line, and why.
    told : dict
        The conditions, flat.
    """

    title: str
    frame: pd.DataFrame
    kinds: pd.DataFrame
    left_out: dict[str, str]
    told: dict[str, Any]

    def markdown(self) -> str:
        """Table, scores by kind, what is missing, and under which conditions."""
        parts = [f"# {self.title}", tables.markdown(self.frame)]
        if not self.kinds.empty:
            parts += ["## By kind of question", tables.pivot_markdown(self.kinds)]
        if self.left_out:
            parts += ["## Left out", "\n".join(f"- {name}: {reason}" for name, reason in self.left_out.items())]
        parts += ["## Conditions", "\n".join(f"- {key}: {value}" for key, value in self.told.items())]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """table.md, table.csv and pictures."""
        self.frame.to_csv(folder / "table.csv", index=False, float_format="%.6g")
        (folder / "table.md").write_text(self.markdown(), encoding="utf-8")
        plots.against_cost(self.frame, folder, self.title)
        if not self.kinds.empty:
            plots.bars(self.kinds, self.frame, folder / "score-by-kind.png", self.title)


def results(folder: Path) -> Results:
    """Read what `answer` and `take_times` left in a folder, in however many sittings.

    Raises
    ------
    InputError
        There are no rows, or rows of different runs.
    """
    headers, rows = journal.read(folder)
    run = headers[-1]["run"]
    cells = _cells(headers)
    task = tasks.get_task(run["task"])
    times, about_times = None, {}
    if (folder / "times.jsonl").exists():
        timed, measured = journal.read(folder, "times")
        times = timing.summary(measured)
        about_times = {"times": _about_times(timed[-1], measured)}
    frame = tables.summary(rows, cells, task, times, seed=run["seed"])
    left_out = {name: why for header in headers for name, why in header["conditions"]["left_out"].items()}
    told = {**run, **_shared(headers), "samples": int(frame["n"].max()), **about_times}
    return Results(
        f"{run['task']}, {run['model']}",
        frame,
        tables.by_kind(rows, task.main_score),
        {**left_out, **tables.unanswered(rows, cells)},
        {key: value for key, value in told.items() if value is not None},
    )


def _cells(headers: Sequence[journal.Row]) -> list[Cell]:
    """Those of all sittings: a method's together, larger budgets first."""
    found = {cell["name"]: Cell.from_dict(cell) for header in headers for cell in header["conditions"]["cells"]}
    methods = list(dict.fromkeys(cell.method for cell in found.values()))

    def place(cell: Cell) -> tuple[Any, ...]:
        return methods.index(cell.method), cell.positions != "original", -(cell.keep_ratio or cell.keep_tokens or 0)

    return sorted(found.values(), key=place)


def _shared(headers: Sequence[journal.Row]) -> dict[str, str]:
    """The conditions of all sittings; where they differ, every value. What was asked for is told by the commands."""
    found: dict[str, dict[str, None]] = {}
    for stated in (header["conditions"] for header in headers):
        plain = {key: value for key, value in stated.items() if key not in ("config", "cells", "left_out")}
        config = {name: stated["config"][name] for name in ("data", "device", "batch_size")}
        for key, value in {**plain, **config}.items():
            if value is not None:
                found.setdefault(key, {})[str(value)] = None
    return {key: "; ".join(values) for key, values in found.items()}


def _about_times(header: journal.Row, rows: Sequence[journal.Row]) -> str:
    run, config = header["run"], header["conditions"]["config"]
    samples = len({row["order"] for row in rows})
    where = run["gpu"] or f"{run['cpu']}, {run['threads']} of {run['cores']} threads"
    return (
        f"medians over {samples} samples x {config['rounds']} rounds that went through all cells in turns after one "
        f"that did not count; batch 1, vision tower included, {run['decode_tokens']} tokens each; speed-up: median of "
        f"ratios within a round; {where}"
    )


def overview(parts: Sequence[Results], folder: Path) -> str:
    """Several tasks side by side: scores of every cell in table.md and table.csv, and bars by task."""
    scores = pd.DataFrame({part.told["task"]: part.frame.set_index("cell")["score"] for part in parts})
    scores = scores.reindex(dict.fromkeys(cell for part in parts for cell in part.frame["cell"]))
    frame = pd.concat([part.frame for part in parts]).drop_duplicates("cell")
    folder.mkdir(parents=True, exist_ok=True)
    scores.to_csv(folder / "table.csv", float_format="%.6g")
    links = "\n".join(f"- [{task}]({task}/table.md), with intervals, times and conditions" for task in scores.columns)
    text = f"# {parts[0].told['model']}: scores by task\n\n{tables.pivot_markdown(scores)}\n\n{links}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    plots.bars(scores, frame, folder / "score-by-task.png", parts[0].told["model"])
    return text
