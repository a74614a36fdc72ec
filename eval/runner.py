"""Answers every sample in every run and appends a row for each."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tqdm.auto import tqdm

import vtc
from eval import models
from eval.bounds import TruthSelector, register
from eval.models import Loaded
from eval.results_log import ResultsLog, Row
from eval.runs import BLIND, BOUNDS, FULL, Run
from eval.tasks.base import Media, Sample, Task
from vtc.report.flops import DecoderShape

Has = Callable[[str, str], bool]
"""Returns whether the measurement of a run (name) on a sample (id) has been made."""

Numbered = Sequence[tuple[int, Sample]]
"""Samples with their places among all samples of the task."""

_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


def shard() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that `accelerate`, `torchrun` or `mpirun` started."""
    for rank, world in _LAUNCHERS:
        if world in os.environ:
            return int(os.environ.get(rank, "0")), int(os.environ[world])
    return 0, 1


def split(samples: Sequence[Sample], batch_size: int) -> list[Numbered]:
    """Return the batches, the same for any number of processes: rounding depends on which samples are batched."""
    numbered = list(enumerate(samples))
    return [numbered[first : first + batch_size] for first in range(0, len(numbered), batch_size)]


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
    batch_size: int = 8,
    seed: int = 0,
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
        The runs in `BOUNDS` take one sample at a time regardless.
    seed : int
        For methods that draw random numbers.
    progress : bool
        Whether to show a progress bar.
    """
    rank, world = shard()
    batches = split(samples, batch_size)[rank::world]
    total = sum(len(batch) for batch in batches) * len(runs)
    answerer = Answerer(loaded, task, runs, seed)
    done = total - sum(missing(batch, runs, log.has) for batch in batches)
    # Rows of earlier sessions are the initial count, so that they do not distort the estimate of the remaining time.
    with tqdm(total=total, initial=done, unit="answer", disable=not progress, dynamic_ncols=True) as bar:
        for batch in batches:
            for row in answerer.rows(batch, log.has):
                log.add(row)
                bar.update(1)


@dataclass(frozen=True, eq=False)
class _Answer:
    """The answer to one sample of a batch, and the tokens it was computed from.

    Attributes
    ----------
    text : str
    logp : torch.Tensor
        (V,) log-probabilities of the first token.
    layers : list of int
        Number of tokens, text and visual, in every decoder layer.
    whole : int
        Number of tokens of the prompt.
    visual : int or None
        Number of visual tokens of the prompt; None for the uncompressed model, where nothing counts them.
    """

    text: str
    logp: torch.Tensor
    layers: list[int]
    whole: int
    visual: int | None = None

    @property
    def kept(self) -> float:
        """Share of the visual tokens, averaged over decoder layers as in the papers."""
        if not self.visual:
            return 1.0
        return (statistics.fmean(self.layers) - (self.whole - self.visual)) / self.visual


_Opened = tuple[int, Sample, Media]
"""Place, sample and its decoded media."""


class Answerer:
    """Answers batches with the compressed and the uncompressed model and returns rows.

    A sample that cannot be read, or on which the model fails, becomes a row with its error: in every run if the
    uncompressed model fails, otherwise in the run that failed. If no sample of a run has ever succeeded, the cause is
    the configuration rather than the sample, and the error is raised.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    runs : sequence of Run
        The uncompressed model first.
    seed : int
    """

    def __init__(self, loaded: Loaded, task: Task, runs: Sequence[Run], seed: int = 0) -> None:
        if not runs or runs[0] != FULL:
            raise ValueError("the first run must be the one with all tokens: the others are compared with it")
        self.loaded, self.task, self.runs, self.seed = loaded, task, list(runs), seed
        text_config = loaded.model.config.get_text_config()
        self._depth: int = text_config.num_hidden_layers
        self._succeeded: set[str] = set()
        try:
            self._shape: DecoderShape | None = DecoderShape.from_config(text_config)
        except vtc.UnsupportedModelError:  # rows then have no FLOPs
            self._shape = None

    def rows(self, batch: Numbered, has: Has) -> Iterator[Row]:
        """Yield the rows of the measurements that have not been made: first unreadable samples, then run by run.

        A run answers the whole batch even if only one sample is missing, so that an interrupted evaluation gives the
        same rows as an uninterrupted one.
        """
        wanted = [run for run in self.runs if missing(batch, [run], has)]
        if wanted:
            yield from (row for row in self._rows(batch, wanted) if not has(row["run"], row["sample"]))

    def _rows(self, batch: Numbered, wanted: Sequence[Run]) -> Iterator[Row]:
        opened: list[_Opened] = []
        for order, sample in batch:
            try:
                opened.append((order, sample, sample.open()))
            except vtc.InputError as error:
                yield from (_broken(order, sample, run, str(error)) for run in self.runs)
        whole: dict[int, _Answer] = {}
        for (order, sample, _), answer in self._answers(FULL, opened):
            if isinstance(answer, _Answer):
                whole[order] = answer
            else:
                yield from (_broken(order, sample, run, f"all tokens: {_cause(answer)}") for run in self.runs)
        opened = [each for each in opened if each[0] in whole]
        for run in wanted:
            answers = self._answers(run, opened) if run != FULL else ((each, whole[each[0]]) for each in opened)
            for (order, sample, _), answer in answers:
                if isinstance(answer, _Answer):
                    yield self._row(order, sample, run, answer, whole[order])
                else:
                    yield _broken(order, sample, run, _cause(answer))

    def _row(self, order: int, sample: Sample, run: Run, answer: _Answer, whole: _Answer) -> Row:
        kl = (whole.logp.exp() * (whole.logp - answer.logp)).nan_to_num(0.0).sum()
        return {
            **_key(order, sample, run),
            "prediction": answer.text,
            "scores": self.task.score(sample, answer.text),
            "agrees": answer.text == whole.text,
            "kl": max(0.0, float(kl)),
            "visual": answer.visual,
            "kept": 0.0 if run == BLIND else answer.kept,
            "flops": self._flops(answer.layers),
            "flops_share": self._share(answer),
        }

    def _flops(self, layers: Sequence[int]) -> int | None:
        """Return the FLOPs of one row's prefill with so many tokens per layer; None without a known formula."""
        if self._shape is None:
            return None
        return sum(self._shape.layer_flops(i, n) for i, n in enumerate(layers)) + self._shape.head_flops()

    def _share(self, answer: _Answer) -> float | None:
        before, after = self._flops([answer.whole] * self._depth), self._flops(answer.layers)
        return None if before is None or after is None else after / before

    def _answers(self, run: Run, opened: Sequence[_Opened]) -> Iterator[tuple[_Opened, _Answer | Exception]]:
        """Yield each sample with its answer or error; a batch that fails is repeated one by one."""
        alone = run.method in BOUNDS
        for _, together in groupby(opened, key=lambda each: each[0] if alone else _frame_count(each)):
            part = list(together)
            found = self._attempt(run, part)
            if isinstance(found[0], Exception) and len(part) > 1:
                found = [self._attempt(run, [each])[0] for each in part]
            failed = [each for each in found if isinstance(each, Exception)]
            if len(failed) < len(found):
                self._succeeded.add(run.name)
            elif run.name not in self._succeeded and run.method not in BOUNDS:
                raise failed[0]
            yield from zip(part, found, strict=True)

    def _attempt(self, run: Run, part: Sequence[_Opened]) -> list[_Answer] | list[Exception]:
        try:
            return self._generate(run, part)
        except Exception as error:  # any error goes into the row of its sample, or is raised by the caller
            return [error] * len(part)

    def _generate(self, run: Run, part: Sequence[_Opened]) -> list[_Answer]:
        samples = [sample for _, sample, _ in part]
        encoded = models.inputs(self.loaded, samples, [media for _, _, media in part])
        lengths = [int(n) for n in encoded["attention_mask"].sum(dim=1)]
        if run in (FULL, BLIND):
            shown = encoded if run == FULL else models.blinded(encoded)
            texts, logp = models.answer(self.loaded, shown, self.task.max_new_tokens)
            return [
                _Answer(text, logp[row], [lengths[row]] * self._depth, lengths[row]) for row, text in enumerate(texts)
            ]
        with vtc.compressed(self.loaded.model, self._config(run, samples[0])):
            texts, logp = models.answer(self.loaded, encoded, self.task.max_new_tokens)
            report = vtc.report(self.loaded.model)
        visual = [0] * len(part)
        for segment in report.segments:
            visual[segment.row] += segment.tokens_before
        return [
            _Answer(text, logp[row], [each[row] for each in report.lengths_per_layer], lengths[row], visual[row])
            for row, text in enumerate(texts)
        ]

    def _config(self, run: Run, sample: Sample) -> vtc.CompressionConfig:
        if run.method not in BOUNDS:
            return run.config(self.seed)
        register()
        return vtc.CompressionConfig(
            TruthSelector.name,
            keep_ratio=run.keep_ratio,
            keep_tokens=run.keep_tokens,
            positions=run.positions,
            options={**self.task.truth(sample)._asdict(), "first": run.method == "oracle"},
        )


def _frame_count(opened: _Opened) -> int | None:
    """Return the number of frames: several families stack the videos of a batch."""
    video = opened[2].video
    return None if video is None else len(video.frames)


def _key(order: int, sample: Sample, run: Run) -> Row:
    kind = sample.meta.get("kind")
    return {
        "run": run.name,
        "sample": sample.id,
        "order": order,
        "group": sample.group if sample.group is not None else sample.id,
        **({"kind": kind} if kind is not None else {}),
    }


def _broken(order: int, sample: Sample, run: Run, cause: str) -> Row:
    return {**_key(order, sample, run), "error": cause}


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, vtc.VtcError) else f"{type(error).__name__}: {error}"


def rows_by_run(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by run, runs in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["run"], []).append(row)
    return found
