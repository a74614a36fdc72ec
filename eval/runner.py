"""Every sample through every cell, written down row by row."""

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
from eval.cells import BLIND, BOUNDS, FULL, Cell
from eval.journal import Journal, Row
from eval.models import Loaded
from eval.tasks.base import Media, Sample, Task
from vtc.report.flops import DecoderShape

Has = Callable[[str, str], bool]
"""Whether the measurement of a cell (name) on a sample (id) has been made."""

Numbered = Sequence[tuple[int, Sample]]
"""Samples with their places among all samples of the task."""


_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))


def shard() -> tuple[int, int]:
    """Number of this process and of all, as `accelerate launch`, `torchrun` or `mpirun` tells it."""
    for rank, world in _LAUNCHERS:
        if world in os.environ:
            return int(os.environ.get(rank, "0")), int(os.environ[world])
    return 0, 1


def split(samples: Sequence[Sample], batch_size: int) -> list[Numbered]:
    """The batches: the same ones however many processes share them, because rounding depends on who is batched."""
    numbered = list(enumerate(samples))
    return [numbered[first : first + batch_size] for first in range(0, len(numbered), batch_size)]


def missing(batch: Numbered, cells: Sequence[Cell], has: Has) -> int:
    """How many measurements of a batch have not been made."""
    return sum(not has(cell.name, sample.id) for _, sample in batch for cell in cells)


def run(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    cells: Sequence[Cell],
    journal: Journal,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Answer all samples in all cells; what the journal holds already is passed over.

    Of several processes each takes every n-th batch.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    samples : sequence of Sample
    cells : sequence of Cell
        All tokens first: agreement is measured against them.
    journal : Journal
    batch_size : int
        Cells that know the truth go one by one whatever it is.
    seed : int
        For methods that draw.
    progress : bool
        Whether to show a bar.
    """
    rank, world = shard()
    batches = split(samples, batch_size)[rank::world]
    total = sum(len(batch) for batch in batches) * len(cells)
    answerer = Answerer(loaded, task, cells, seed)
    done = total - sum(missing(batch, cells, journal.has) for batch in batches)
    # What earlier sittings did counts as there from the start, not as fast: the time that is left stays true.
    with tqdm(total=total, initial=done, unit="answer", disable=not progress, dynamic_ncols=True) as bar:
        for batch in batches:
            for row in answerer.rows(batch, journal.has):
                journal.add(row)
                bar.update(1)


@dataclass(frozen=True, eq=False)
class _Answer:
    """What one row of a batch said, and what it was made of.

    Attributes
    ----------
    text : str
    logp : torch.Tensor
        (V,) log-probabilities of the first token.
    layers : list of int
        Tokens, text and visual, in every decoder layer.
    whole : int
        Tokens of the prompt.
    visual : int or None
        Visual tokens of the prompt; None where nobody counted: with all tokens.
    """

    text: str
    logp: torch.Tensor
    layers: list[int]
    whole: int
    visual: int | None = None

    @property
    def kept(self) -> float:
        """Share of the visual tokens, averaged over the decoder layers as the papers do."""
        if not self.visual:
            return 1.0
        return (statistics.fmean(self.layers) - (self.whole - self.visual)) / self.visual


_Opened = tuple[int, Sample, Media]
"""Place, sample, and what it shows."""


class Answerer:
    """Puts batches to a model, compressed and not, and makes rows of the answers.

    A sample that cannot be read, or on which the model fails, becomes a row with its error: in every cell where all
    tokens fail, else in the cell that failed. If nothing has ever worked in a cell, its set-up is at fault rather than
    the samples, and the error is raised.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    cells : sequence of Cell
        All tokens first.
    seed : int
    """

    def __init__(self, loaded: Loaded, task: Task, cells: Sequence[Cell], seed: int = 0) -> None:
        if not cells or cells[0] != FULL:
            raise ValueError("the first cell must be the one with all tokens: the others are compared with it")
        self.loaded, self.task, self.cells, self.seed = loaded, task, list(cells), seed
        text_config = loaded.model.config.get_text_config()
        self._depth: int = text_config.num_hidden_layers
        self._worked: set[str] = set()
        try:
            self._shape: DecoderShape | None = DecoderShape.from_config(text_config)
        except vtc.UnsupportedModelError:  # rows then say nothing of FLOPs
            self._shape = None

    def rows(self, batch: Numbered, has: Has) -> Iterator[Row]:
        """Rows of the measurements that have not been made: samples that cannot be read, then cell by cell.

        Cells are asked with the whole batch even if only one of its samples is missing, so that an interrupted run
        gives the same rows.
        """
        wanted = [cell for cell in self.cells if missing(batch, [cell], has)]
        if wanted:
            yield from (row for row in self._rows(batch, wanted) if not has(row["cell"], row["sample"]))

    def _rows(self, batch: Numbered, wanted: Sequence[Cell]) -> Iterator[Row]:
        opened: list[_Opened] = []
        for order, sample in batch:
            try:
                opened.append((order, sample, sample.open()))
            except vtc.InputError as error:
                yield from (_broken(order, sample, cell, str(error)) for cell in self.cells)
        whole: dict[int, _Answer] = {}
        for (order, sample, _), answer in self._answers(FULL, opened):
            if isinstance(answer, _Answer):
                whole[order] = answer
            else:
                yield from (_broken(order, sample, cell, f"all tokens: {_cause(answer)}") for cell in self.cells)
        opened = [each for each in opened if each[0] in whole]
        for cell in wanted:
            answers = self._answers(cell, opened) if cell != FULL else ((each, whole[each[0]]) for each in opened)
            for (order, sample, _), answer in answers:
                if isinstance(answer, _Answer):
                    yield self._row(order, sample, cell, answer, whole[order])
                else:
                    yield _broken(order, sample, cell, _cause(answer))

    def _row(self, order: int, sample: Sample, cell: Cell, answer: _Answer, whole: _Answer) -> Row:
        kl = (whole.logp.exp() * (whole.logp - answer.logp)).nan_to_num(0.0).sum()
        return {
            **_place(order, sample, cell),
            "prediction": answer.text,
            "scores": self.task.score(sample, answer.text),
            "agrees": answer.text == whole.text,
            "kl": max(0.0, float(kl)),
            "visual": answer.visual,
            "kept": 0.0 if cell == BLIND else answer.kept,
            "flops": self._flops(answer.layers),
            "flops_share": self._share(answer),
        }

    def _flops(self, layers: Sequence[int]) -> int | None:
        """Of the prefill of one row with so many tokens in the layers; None where the formula is not known."""
        if self._shape is None:
            return None
        return sum(self._shape.layer_flops(i, n) for i, n in enumerate(layers)) + self._shape.head_flops()

    def _share(self, answer: _Answer) -> float | None:
        before, after = self._flops([answer.whole] * self._depth), self._flops(answer.layers)
        return None if before is None or after is None else after / before

    def _answers(self, cell: Cell, opened: Sequence[_Opened]) -> Iterator[tuple[_Opened, _Answer | Exception]]:
        """For each sample the answer, or what prevented it: a batch that fails is asked again one by one."""
        alone = cell.method in BOUNDS
        for _, together in groupby(opened, key=lambda each: each[0] if alone else _frames(each)):
            part = list(together)
            found = self._attempt(cell, part)
            if isinstance(found[0], Exception) and len(part) > 1:
                found = [self._attempt(cell, [each])[0] for each in part]
            failed = [each for each in found if isinstance(each, Exception)]
            if len(failed) < len(found):
                self._worked.add(cell.name)
            elif cell.name not in self._worked and cell.method not in BOUNDS:
                raise failed[0]
            yield from zip(part, found, strict=True)

    def _attempt(self, cell: Cell, part: Sequence[_Opened]) -> list[_Answer] | list[Exception]:
        try:
            return self._ask(cell, part)
        except Exception as error:  # whatever it is: it goes into the row of its sample, or is raised by the caller
            return [error] * len(part)

    def _ask(self, cell: Cell, part: Sequence[_Opened]) -> list[_Answer]:
        samples = [sample for _, sample, _ in part]
        encoded = models.inputs(self.loaded, samples, [media for _, _, media in part])
        lengths = [int(n) for n in encoded["attention_mask"].sum(dim=1)]
        if cell in (FULL, BLIND):
            shown = encoded if cell == FULL else models.blinded(encoded)
            texts, logp = models.answer(self.loaded, shown, self.task.max_new_tokens)
            return [
                _Answer(text, logp[row], [lengths[row]] * self._depth, lengths[row]) for row, text in enumerate(texts)
            ]
        with vtc.compressed(self.loaded.model, self._config(cell, samples[0])):
            texts, logp = models.answer(self.loaded, encoded, self.task.max_new_tokens)
            report = vtc.report(self.loaded.model)
        visual = [0] * len(part)
        for segment in report.segments:
            visual[segment.row] += segment.tokens_before
        return [
            _Answer(text, logp[row], [each[row] for each in report.lengths_per_layer], lengths[row], visual[row])
            for row, text in enumerate(texts)
        ]

    def _config(self, cell: Cell, sample: Sample) -> vtc.CompressionConfig:
        if cell.method not in BOUNDS:
            return cell.config(self.seed)
        register()
        return vtc.CompressionConfig(
            TruthSelector.name,
            keep_ratio=cell.keep_ratio,
            keep_tokens=cell.keep_tokens,
            positions=cell.positions,
            options={**self.task.truth(sample)._asdict(), "first": cell.method == "oracle"},
        )


def _frames(opened: _Opened) -> int | None:
    """Frames of the sample's video: several families stack the videos of a batch."""
    video = opened[2].video
    return None if video is None else len(video.frames)


def _place(order: int, sample: Sample, cell: Cell) -> Row:
    kind = sample.meta.get("kind")
    return {
        "cell": cell.name,
        "sample": sample.id,
        "order": order,
        "group": sample.group if sample.group is not None else sample.id,
        **({"kind": kind} if kind is not None else {}),
    }


def _broken(order: int, sample: Sample, cell: Cell, cause: str) -> Row:
    return {**_place(order, sample, cell), "error": cause}


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, vtc.VtcError) else f"{type(error).__name__}: {error}"


def in_groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by cell, cells in the order in which they appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cell"], []).append(row)
    return found
