"""Answers every sample in every run and appends a row for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import groupby

from tqdm.auto import tqdm

from eval.answerer import Answerer, Has, Numbered
from eval.models import Loaded
from eval.results_log import ResultsLog, Row
from eval.runs import Run
from eval.tasks.base import Sample, Task

_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


def shard() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that `accelerate`, `torchrun` or `mpirun` started."""
    for rank, world in _LAUNCHERS:
        if world in os.environ:
            return int(os.environ.get(rank, "0")), int(os.environ[world])
    return 0, 1


def split(samples: Sequence[Sample], batch_size: int) -> list[Numbered]:
    """Return the batches, the same for any number of processes: rounding depends on which samples are batched.

    A batch holds questions about one picture or video, or several pictures with one question each, so that an encoder
    runs once for all questions about a picture.
    """
    batches: list[list[tuple[int, Sample]]] = []
    gathering = False  # the last batch holds pictures with one question each
    for _, each in groupby(enumerate(samples), key=lambda numbered: numbered[1].shown):
        same = list(each)
        if len(same) > 1:
            batches += [same[first : first + batch_size] for first in range(0, len(same), batch_size)]
        elif gathering and len(batches[-1]) < batch_size:
            batches[-1] += same
        else:
            batches.append(same)
        gathering = len(same) == 1
    return list(batches)


def spaced(total: int, count: int) -> frozenset[int]:
    """Return `count` places, or all, evenly spaced among `total`."""
    return (
        frozenset((2 * i + 1) * total // (2 * count) for i in range(count))
        if count < total
        else frozenset(range(total))
    )


def missing(batch: Numbered, runs: Sequence[Run], has: Has) -> int:
    """Count the measurements of a batch that have not been made."""
    return sum(not has(run.name, sample.id) for _, sample in batch for run in runs)


def answer_samples(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    runs: Sequence[Run],
    log: ResultsLog,
    *,
    batch_size: int = 10,
    seed: int = 0,
    check: int = 0,
    progress: bool = True,
) -> None:
    """Answer all samples in all runs, except those that the log has already.

    Of several processes each takes every n-th batch.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    samples : sequence of Sample
    runs : sequence of Run
        The uncompressed model first: agreement is measured against it.
    log : ResultsLog
    batch_size : int
        Largest number of questions that are answered together.
    seed : int
        For methods that draw random numbers.
    check : int
        So many samples, evenly spaced, are answered again by plain `generate`, one by one.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    StateError
        Plain `generate` gave another answer to a checked sample.
    """
    rank, world = shard()
    batches = split(samples, batch_size)[rank::world]
    total = sum(len(batch) for batch in batches) * len(runs)
    answerer = Answerer(loaded, task, runs, seed, checked=spaced(len(samples), check))
    done = total - sum(missing(batch, runs, log.has) for batch in batches)
    # Rows of earlier sessions are the initial count, so that they do not distort the estimate of the remaining time.
    with tqdm(total=total, initial=done, unit="answer", disable=not progress, dynamic_ncols=True) as bar:
        for batch in batches:
            for row in answerer.rows(batch, log.has):
                log.add(row)
                bar.update(1)


def rows_by_run(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by run, runs in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(row)
    return found
