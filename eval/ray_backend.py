"""Distributes the samples over workers of a Ray cluster; the driver writes the same rows as one process.

Each worker loads the model once and answers batches. The driver hands out the missing ones and appends rows as they
arrive, so an interrupted evaluation continues like any other. Workers read the checkout, the model and the task's files
under the paths that the driver uses, so several machines need a shared file system. `RAY_ADDRESS` names a
cluster; without it one is started on this machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import vtc
from eval import models, runner
from eval.answerer import Answerer, Numbered
from eval.conditions import command_line
from eval.results_log import ResultsLog
from eval.runs import Run
from eval.sweep import Job

ROOT = Path(__file__).parent.parent
_LOCAL = {"num_cpus": os.cpu_count(), "include_dashboard": False, "object_store_memory": 10**8}  # rows are small


def answer(job: Job, *, workers: int = 2, retry: bool = False) -> None:
    """Append the rows that are missing, answered by `workers` copies of the model.

    Every worker gets an equal share of the cluster's cores, and a GPU if the job runs on GPUs.

    Raises
    ------
    ConfigError
        Ray is not installed, or `workers` is not positive or more than the cluster has room for.
    """
    ray = _ray()
    if workers < 1:
        raise vtc.ConfigError(f"--workers must be at least 1, got {workers}")
    _, samples, _ = job.prepare()
    with _Session(ray):
        share = _share(ray, workers, job.device)
        described: Any = ray.remote(**share)(_describe)
        try:
            weights, stated = ray.get(described.remote(job, workers))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, vtc.VtcError) else error from error
        stated["command"] = command_line()  # instead of that of Ray's worker process
        runs = [Run.from_dict(run) for run in stated["runs"]]
        with ResultsLog(job.out / "rows.jsonl", job.identity(weights), stated, retry=retry) as log:
            batches = runner.split(samples, job.batch_size)
            missing = [runner.missing(batch, runs, log.has) for batch in batches]
            total = len(samples) * len(runs)
            tasks = [
                {"batch": number, "done": json.dumps(_done(batches[number], runs, log))}
                for number, count in enumerate(missing)
                if count
            ]
            with tqdm(total=total, initial=total - sum(missing), unit="answer", dynamic_ncols=True) as bar:
                for row in _rows(ray, job, runs, tasks, workers, share) if tasks else ():
                    log.add(row)
                    bar.update(1)


def _rows(ray: Any, job: Job, runs: list[Run], tasks: list[dict[str, Any]], workers: int, share: dict[str, Any]) -> Any:
    data = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    answered = data.map_batches(
        _Worker,
        fn_constructor_args=(job, [run.to_dict() for run in runs]),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **share,
    )
    return (json.loads(line["row"]) for line in answered.iter_rows())


class _Worker:
    """A process with a model."""

    def __init__(self, job: Job, runs: list[dict[str, Any]]) -> None:
        task, samples, _ = job.prepare()
        self.batches = runner.split(samples, job.batch_size)
        checked = runner.spaced(len(samples), job.check)
        self.answerer = Answerer(job.load(), task, [Run.from_dict(run) for run in runs], job.seed, checked)

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        rows = []
        for number, text in zip(asked["batch"], asked["done"], strict=True):
            done = {tuple(each) for each in json.loads(text)}
            rows += self.answerer.rows(self.batches[number], lambda run, sample, done=done: (run, sample) in done)
        return {"row": [json.dumps(row) for row in rows]}


def _done(batch: Numbered, runs: list[Run], log: ResultsLog) -> list[tuple[str, str]]:
    return [(run.name, s.id) for _, s in batch for run in runs if log.has(run.name, s.id)]


def _describe(job: Job, workers: int) -> tuple[str, dict[str, Any]]:
    """Return the fingerprint of the weights, and hardware and supported runs as the worker sees them."""
    loaded = job.load()
    _, _, runs, left_out = job.supported(loaded)
    return loaded.weights, job.conditions(
        runs, left_out, backend="ray", workers=workers, tower_layers=models.tower_layers(loaded)
    )


def _share(ray: Any, workers: int, device: str) -> dict[str, Any]:
    there = ray.cluster_resources()
    cores = int(there.get("CPU", 0)) // workers
    wants_gpu = device.startswith("cuda")
    if cores < 1 or (wants_gpu and there.get("GPU", 0) < workers):
        raise vtc.ConfigError(
            f"--workers {workers}: the cluster has {there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs, and "
            "every worker needs one of each that it runs on"
        )
    return {"num_cpus": cores, **({"num_gpus": 1} if wants_gpu else {})}


class _Session:
    """A connection to Ray as a context manager; one that the caller has opened is used and left open."""

    def __init__(self, ray: Any) -> None:
        self.ray, self.owned = ray, not ray.is_initialized()

    def __enter__(self) -> None:
        if not self.owned:
            return
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        local = {} if "RAY_ADDRESS" in os.environ else _LOCAL
        self.ray.init(runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False, **local)

    def __exit__(self, *_: object) -> None:
        if self.owned:
            self.ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise vtc.ConfigError('--backend ray needs Ray: pip install "vtc[ray]"') from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
