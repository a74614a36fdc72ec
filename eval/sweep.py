"""Runs a job from its arguments to a folder of rows, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

import vtc
from eval import models, plots, resizing, results_log, runner, seeds, tables, tasks, timing
from eval.conditions import conditions, hardware
from eval.cost import CostTable
from eval.models import Loaded
from eval.results_log import ResultsLog, Row
from eval.runs import Run, supported_runs, sweep_runs
from eval.tasks.base import Sample, Task
from vtc.files import write_text

GENERATED_LIMIT = 200
"""Default number of samples of a generated task, which could go on without end."""

_IDENTITY = ("task", "frames", "model", "dtype", "attention", "seed")


@dataclass(frozen=True)
class Job:
    """One task on one model: the arguments that a process needs to take part, as plain values.

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
    settings : tuple of str
        Runs of several stages, in the notation of `vtc.notation`.
    pictures, per_picture : int or None
        Of generated tasks: number of pictures or clips, and of questions about each at most.
    draw : str
        Which of them are drawn: a name of `eval.seeds`, and a number.
    check : int
        Samples that plain `generate` answers again.
    confirms : bool
        Whether `draw` is a confirming one, which nothing else may draw.
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
    settings: tuple[str, ...] = ()
    pictures: int | None = None
    per_picture: int | None = None
    draw: str = seeds.DEFAULT
    check: int = 0
    confirms: bool = False

    def confirming(self, draw: str) -> Job:
        """Return the job for a confirming draw."""
        return replace(self, draw=draw, confirms=True)

    def prepare(self) -> tuple[Task, Sequence[Sample], list[Run]]:
        """Return task, samples and runs; finds every mistake that can be found without a model.

        Raises
        ------
        ConfigError, InputError
            An argument or a file is wrong.
        """
        if self.limit is not None and self.limit < 1:
            raise vtc.ConfigError(f"--limit must be at least 1, got {self.limit}")
        if self.batch_size < 1:
            raise vtc.ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")
        task = tasks.get_task(self.task, **self._task_options())
        runs = sweep_runs(
            self.methods,
            self.keep,
            positions=self.positions,
            bounds=task.knows_truth and not self.settings,
            options=self.options,
            settings=self.settings,
        )
        sized = self.pictures is not None or self.per_picture is not None
        limit = GENERATED_LIMIT if self.limit is None and task.generated and not sized else self.limit
        samples = task.samples(self.data)[:limit]
        if not samples:
            raise vtc.InputError(f"{self.task}: no samples in {self.data}")
        return task, samples, runs

    def _task_options(self) -> dict[str, Any]:
        task, found = tasks.get_task(self.task), {}
        if self.frames is not None:
            if self.frames < 1:
                raise vtc.ConfigError(f"--frames must be at least 1, got {self.frames}")
            if not hasattr(task, "frames"):
                raise vtc.ConfigError(f"--frames was given, but {self.task} shows no video files")
            found["frames"] = self.frames
        for name, value in (("pictures", self.pictures), ("per_picture", self.per_picture)):
            if value is not None:
                if value < 1:
                    raise vtc.ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
                found[name] = value
        if self.draw != seeds.DEFAULT:
            found["seed"] = seeds.seed_of(self.draw, confirm=self.confirms)
        if set(found) - {"frames"} and not task.generated:
            raise vtc.ConfigError(f"--pictures, --per-picture and --draw are for generated tasks, not for {self.task}")
        return found

    def load(self) -> Loaded:
        """Load the model."""
        return models.load(self.model, dtype=self.dtype, device=self.device, attention=self.attention)

    def supported(self, loaded: Loaded) -> tuple[Task, Sequence[Sample], list[Run], dict[str, str]]:
        """Return what `prepare` does with the runs that this model supports, and the reasons against the others.

        Raises
        ------
        UnsupportedModelError, UnsupportedMethodError, ConfigError
            The model takes no videos, or does not support a method that was requested by name.
        """
        task, samples, runs = self.prepare()
        models.check_modality(loaded, "video" if any(sample.video for sample in samples) else "image")
        refusal = resizing.refusal(loaded, samples) if any(run.resizes for run in runs) else None
        # A rule is the same for all models, and says which of the others one cannot run.
        requested = self.settings if self.confirms else (*self.methods, *self.settings)
        return task, samples, *supported_runs(runs, loaded.model, requested, refusal)

    def identity(self, weights: str) -> dict[str, Any]:
        """Return what rows must share to be put into one table."""
        drawn = {} if self.draw == seeds.DEFAULT else {"draw": self.draw}
        return {**{name: getattr(self, name) for name in _IDENTITY}, **drawn, "weights": weights}

    def conditions(self, runs: Sequence[Run], left_out: dict[str, str], **more: Any) -> dict[str, Any]:
        """Return the conditions of one session."""
        config = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if name not in (*_IDENTITY, "out")
        }
        stated = conditions(**config, **more)
        return {**stated, "runs": [run.to_dict() for run in runs], "left_out": left_out}


def answer(job: Job, loaded: Loaded, *, retry: bool = False) -> None:
    """Append the rows that are missing; of several processes each takes its share."""
    task, samples, runs, left_out = job.supported(loaded)
    rank, world = runner.shard()
    name = "rows.jsonl" if world == 1 else f"rows.{rank}-of-{world}.jsonl"
    stated = job.conditions(runs, left_out, processes=world, tower_layers=models.tower_layers(loaded))
    with ResultsLog(job.out / name, job.identity(loaded.weights), stated, retry=retry) as log:
        runner.answer_samples(
            loaded,
            task,
            samples,
            runs,
            log,
            batch_size=job.batch_size,
            seed=job.seed,
            check=job.check,
            progress=rank == 0,
        )


def take_times(job: Job, loaded: Loaded, *, count: int, rounds: int, decode_tokens: int) -> None:
    """Append the times that are missing.

    Raises
    ------
    InputError
        The folder has times of another machine.
    """
    _, samples, runs, left_out = job.supported(loaded)
    measured = {"timed": count, "rounds": rounds, "decode_tokens": decode_tokens}
    identity = {**job.identity(loaded.weights), "decode_tokens": decode_tokens, **hardware()}
    with ResultsLog(job.out / "times.jsonl", identity, job.conditions(runs, left_out, **measured)) as log:
        timing.measure(
            loaded, samples, runs, log, count=count, rounds=rounds, seed=job.seed, decode_tokens=decode_tokens
        )


@dataclass(frozen=True, eq=False)
class Results:
    """The tables of a folder of rows.

    Attributes
    ----------
    title : str
    frame : DataFrame
        The result of `tables.summary`.
    kinds : DataFrame
        The result of `tables.by_kind`.
    left_out : dict of str to str
        Runs without a line, and the reasons.
    conditions : dict
        Identity and conditions, flat.
    """

    title: str
    frame: pd.DataFrame
    kinds: pd.DataFrame
    left_out: dict[str, str]
    conditions: dict[str, Any]

    def markdown(self) -> str:
        """Return the table, scores by kind, runs left out, and conditions."""
        parts = [f"# {self.title}", tables.markdown(self.frame)]
        if not self.kinds.empty:
            parts += ["## By kind of question", tables.pivot_markdown(self.kinds)]
        if self.left_out:
            parts += ["## Left out", "\n".join(f"- {name}: {reason}" for name, reason in self.left_out.items())]
        parts += ["## Conditions", "\n".join(f"- {key}: {value}" for key, value in self.conditions.items())]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write table.md, table.csv and plots."""
        write_text(folder / "table.csv", self.frame.to_csv(index=False, float_format="%.6g"))
        write_text(folder / "table.md", self.markdown())
        plots.against_cost(self.frame, folder, self.title)
        if not self.kinds.empty:
            plots.bars(self.kinds, self.frame, folder / "score-by-kind.png", self.title)


def results(folder: Path, cost: CostTable | None = None) -> Results:
    """Read what `answer` and `take_times` wrote into a folder, in any number of sessions.

    Parameters
    ----------
    folder : Path
    cost : CostTable, optional
        Adds what each run would cost at a true shape.

    Raises
    ------
    InputError
        There are no rows, or rows of different evaluations.
    """
    headers, rows = results_log.read(folder)
    identity = headers[-1]["identity"]
    runs = _runs(headers)
    task = tasks.get_task(identity["task"])
    times, about_times = None, {}
    if (folder / "times.jsonl").exists():
        timed, measured = results_log.read(folder, "times")
        times = timing.summary(measured)
        about_times = {"times": _about_times(timed[-1], measured)}
    frame = tables.summary(rows, runs, task, times, seed=identity["seed"])
    about_cost = {}
    if cost is not None:
        layers = headers[-1]["conditions"]["config"].get("tower_layers")
        frame = tables.with_cost(frame, runs, cost, layers)
        about_cost = {"whole call": cost.described()}
    left_out = {name: why for header in headers for name, why in header["conditions"]["left_out"].items()}
    stated = {**identity, **_merged(headers), "samples": int(frame["n"].max()), **about_times, **about_cost}
    return Results(
        f"{identity['task']}, {identity['model']}",
        frame,
        tables.by_kind(rows, task.main_score),
        {**left_out, **tables.unanswered(rows, runs)},
        {key: value for key, value in stated.items() if value is not None},
    )


def _runs(headers: Sequence[Row]) -> list[Run]:
    """Return the runs of all sessions, grouped by method, larger budgets first."""
    found = {run["name"]: Run.from_dict(run) for header in headers for run in header["conditions"]["runs"]}
    methods = list(dict.fromkeys(run.method for run in found.values()))

    def place(run: Run) -> tuple[Any, ...]:
        return methods.index(run.method), run.positions != "original", -(run.keep_ratio or run.keep_tokens or 0)

    return sorted(found.values(), key=place)


def _merged(headers: Sequence[Row]) -> dict[str, str]:
    """Merge the conditions of all sessions; where they differ, list every value. The commands contain the arguments."""
    found: dict[str, dict[str, None]] = {}
    for stated in (header["conditions"] for header in headers):
        plain = {key: value for key, value in stated.items() if key not in ("config", "runs", "left_out")}
        config = {name: stated["config"][name] for name in ("data", "device", "batch_size")}
        for key, value in {**plain, **config}.items():
            if value is not None:
                found.setdefault(key, {})[str(value)] = None
    return {key: "; ".join(values) for key, values in found.items()}


def _about_times(header: Row, rows: Sequence[Row]) -> str:
    machine, config = header["identity"], header["conditions"]["config"]
    samples = len({row["order"] for row in rows})
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads"
    return (
        f"medians over {samples} samples x {config['rounds']} rounds, each through all runs in random order, after one "
        f"untimed round; batch 1, vision tower included, {machine['decode_tokens']} tokens each; speed-up: median of "
        f"ratios within a round; {where}"
    )


def overview(parts: Sequence[Results], folder: Path) -> str:
    """Write the scores of several tasks side by side as table.md and table.csv, and bars by task; return the text."""
    scores = pd.DataFrame({part.conditions["task"]: part.frame.set_index("run")["score"] for part in parts})
    scores = scores.reindex(dict.fromkeys(run for part in parts for run in part.frame["run"]))
    frame = pd.concat([part.frame for part in parts]).drop_duplicates("run")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.csv", scores.to_csv(float_format="%.6g"))
    links = "\n".join(f"- [{task}]({task}/table.md), with intervals, times and conditions" for task in scores.columns)
    model = parts[0].conditions["model"]
    text = f"# {model}: scores by task\n\n{tables.pivot_markdown(scores)}\n\n{links}\n"
    write_text(folder / "table.md", text)
    plots.bars(scores, frame, folder / "score-by-task.png", model)
    return text
