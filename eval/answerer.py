"""Answers a batch of questions in every run, and says what each answer was computed from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

import vtc
from eval import models
from eval.bounds import TruthSelector, register
from eval.models import Loaded
from eval.prompts import Opened, Prompts
from eval.results_log import Row
from eval.runs import BLIND, BOUNDS, FULL, Run
from eval.tasks.base import Sample, Task
from vtc.report.flops import DecoderShape

Has = Callable[[str, str], bool]
"""Returns whether the measurement of a run (name) on a sample (id) has been made."""

Numbered = Sequence[tuple[int, Sample]]
"""Samples with their places among all samples of the task."""


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


class Answerer:
    """Answers batches with the compressed and the uncompressed model and returns rows.

    All questions of a batch are answered by one call of `generate`, and what the encoders make of its pictures is kept
    for all runs: only other signals of the tower, or stages inside it, make them run again.

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
    checked : frozenset of int
        Places of the samples that plain `generate` answers as well, one by one.
    """

    def __init__(
        self, loaded: Loaded, task: Task, runs: Sequence[Run], seed: int = 0, checked: frozenset[int] = frozenset()
    ) -> None:
        if not runs or runs[0] != FULL:
            raise ValueError("the first run must be the one with all tokens: the others are compared with it")
        self.loaded, self.task, self.runs, self.seed, self.checked = loaded, task, list(runs), seed, checked
        text_config = loaded.model.config.get_text_config()
        self._depth: int = text_config.num_hidden_layers
        self._succeeded: set[str] = set()
        self._prompts = Prompts(loaded)
        try:
            self._shape: DecoderShape | None = DecoderShape.from_config(text_config)
        except vtc.UnsupportedModelError:  # rows then have no FLOPs
            self._shape = None

    def rows(self, batch: Numbered, has: Has) -> Iterator[Row]:
        """Yield the rows of the measurements that have not been made: first unreadable samples, then run by run.

        A run answers the whole batch even if only one sample is missing, so that an interrupted evaluation gives the
        same rows as an uninterrupted one.
        """
        wanted = [run for run in self.runs if any(not has(run.name, sample.id) for _, sample in batch)]
        if wanted:
            yield from (row for row in self._rows(batch, wanted) if not has(row["run"], row["sample"]))
            self._prompts.forget()

    def _rows(self, batch: Numbered, wanted: Sequence[Run]) -> Iterator[Row]:
        opened: list[Opened] = []
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
            for each, answer in answers:
                order, sample, _ = each
                if isinstance(answer, _Answer):
                    if order in self.checked:
                        self._check(run, each, answer.text)
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

    def _answers(self, run: Run, opened: Sequence[Opened]) -> Iterator[tuple[Opened, _Answer | Exception]]:
        """Yield each sample with its answer or error; a batch that fails is repeated one by one."""

        def together(each: Opened) -> Hashable:
            """Several families stack the videos of a batch, and a bound is a configuration for one truth."""
            video = each[2].video
            frames = None if video is None else len(video.frames)
            return frames, self.task.truth(each[1]) if run.method in BOUNDS else None

        for _, part_ in groupby(opened, key=together):
            part = list(part_)
            found = self._attempt(run, part)
            if isinstance(found[0], Exception) and len(part) > 1:
                found = [self._attempt(run, [each])[0] for each in part]
            failed = [each for each in found if isinstance(each, Exception)]
            if len(failed) < len(found):
                self._succeeded.add(run.name)
            elif run.name not in self._succeeded and run.method not in BOUNDS:
                raise failed[0]
            yield from zip(part, found, strict=True)

    def _attempt(self, run: Run, part: Sequence[Opened]) -> list[_Answer] | list[Exception]:
        try:
            return self._generate(run, part)
        except Exception as error:  # any error goes into the row of its sample, or is raised by the caller
            return [error] * len(part)

    def _generate(self, run: Run, part: Sequence[Opened]) -> list[_Answer]:
        prompts = self._prompts.of(part, run)
        with prompts.encoding(self._plan(run, part[0][1])) as model:
            texts, logp = models.answer(self.loaded, prompts.inputs, self.task.max_new_tokens)
            report = vtc.report(model) if run not in (FULL, BLIND) else None
        whole = prompts.lengths
        if report is None:
            layers = [[length] * self._depth for length in whole]
            return [_Answer(*each) for each in zip(texts, logp, layers, whole, strict=True)]
        layers = [[each[row] for each in report.lengths_per_layer] for row in range(len(part))]
        visual = [0] * len(part)
        for segment in report.segments:
            visual[segment.row] += segment.tokens_before
        if run.resizes:  # count against the picture as it was
            whole = self._prompts.of(part, FULL).lengths
            visual = [n + before - now for n, before, now in zip(visual, whole, prompts.lengths, strict=True)]
        return [_Answer(*each) for each in zip(texts, logp, layers, whole, visual, strict=True)]

    def _plan(self, run: Run, sample: Sample) -> list[vtc.CompressionConfig]:
        if run.method not in BOUNDS:
            return run.plan(self.seed)
        register()
        config = vtc.CompressionConfig(
            TruthSelector.name,
            keep_ratio=run.keep_ratio,
            keep_tokens=run.keep_tokens,
            positions=run.positions,
            options={**self.task.truth(sample)._asdict(), "first": run.method == "oracle"},
        )
        return [config]

    def _check(self, run: Run, opened: Opened, text: str) -> None:
        """Raise StateError unless plain `generate` gives this answer too."""
        plain = Prompts(self.loaded).of([opened], run)
        plan = self._plan(run, opened[1])
        if plan:
            with vtc.compressed(self.loaded.model, plan):
                (again,), _ = models.answer(self.loaded, plain.inputs, self.task.max_new_tokens)
        else:
            (again,), _ = models.answer(self.loaded, plain.inputs, self.task.max_new_tokens)
        if again != text:
            raise vtc.StateError(
                f"{run.name}, {opened[1].id}: {text!r} is the answer in a batch, {again!r} that of plain generate; the "
                "rounding of batches can do this in half precision, in float32 it is a bug"
            )


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
