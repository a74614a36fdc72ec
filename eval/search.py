"""How few tokens could answer: a search for the set of tokens with which the model says what it says with all of them.

For one question, hill climbing over sets of K tokens: replace a few at random, and keep the set if the answer that the
model gives with all tokens becomes more likely. No method could know what the search finds, since it asks the model
itself, over and over: it bounds what any method can do with K tokens of *this question*. Fitted to several questions
about a picture and tried on others, it bounds what can be done without reading the question.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch

import vtc
from eval import models, statistics
from eval.models import Loaded
from eval.tables import to_markdown_table
from eval.tasks.base import Media, Sample, Task

_SURE = -0.05
"""Mean log-probability of an answer's tokens above which the search ends."""

_chosen: ContextVar[list[torch.Tensor]] = ContextVar("chosen")


@dataclass(frozen=True)
class GivenSelector(vtc.Selector):
    """Keeps the tokens that `keeping` was given, row by row."""

    name: ClassVar[str] = "given"
    paper: ClassVar[str] = "none: what a search proposes"
    trained: ClassVar[bool] = True  # it needs more than the picture, whose choices a memory would give again

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        """Keep the next row's tokens."""
        return vtc.Selection.from_indices(ctx.n, _chosen.get().pop(0).to(ctx.features.device))


@functools.cache
def register() -> None:
    """Register the selector on first use, so that importing this module does not change the list of methods."""
    vtc.register_selector(GivenSelector)


@dataclass(frozen=True)
class Found:
    """What became of one question or picture.

    Attributes
    ----------
    kind : str
        "question": the search looked at this very question; "picture": at others about the same picture.
    group : str
        The picture.
    whole, start, found : float
        Score with all tokens, with the method's tokens, and with those that the search ended at.
    """

    kind: str
    group: str
    whole: float
    start: float
    found: float


class Searcher:
    """Searches sets of tokens for the questions about one picture.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    samples : sequence of Sample
        Questions about one picture.
    media : Media
        The picture.
    candidates : int
        Sets that are tried in one forward pass.
    steps : int
        Passes per search.
    rng : numpy Generator
    """

    def __init__(
        self,
        loaded: Loaded,
        task: Task,
        samples: Sequence[Sample],
        media: Media,
        *,
        candidates: int,
        steps: int,
        rng: np.random.Generator,
    ) -> None:
        register()
        self.loaded, self.task, self.samples, self.media = loaded, task, list(samples), media
        self.candidates, self.steps, self.rng = candidates, steps, rng
        self._memories: dict[int, vtc.EncoderMemory] = {}
        self.answers, _ = self._ask(range(len(samples)), None)
        self.whole = self._scores(range(len(samples)), self.answers)

    def start(self, config: vtc.CompressionConfig) -> tuple[torch.Tensor, int, list[float]]:
        """Return the tokens that a method keeps of the picture, of how many, and its scores."""
        numbers = range(len(self.samples))
        answers, report = self._ask(numbers, config)
        if len(report.segments) != len(self.samples):
            raise vtc.InputError(
                f"a search needs prompts of one picture in one piece, and these have {len(report.segments)} pieces in "
                f"{len(self.samples)} prompts"
            )
        first = report.segments[0]
        return first.kept.cpu(), first.tokens_before, self._scores(numbers, answers)

    def search(self, numbers: Sequence[int], kept: torch.Tensor, total: int) -> torch.Tensor:
        """Return the set, as large as `kept`, with which the whole model's answers to these questions are likeliest."""
        best = kept
        best_value = float(self._likelihood(numbers, [kept])[0])
        for step in range(self.steps):
            if best_value > _SURE:
                break
            most = max(1, round(len(kept) * 0.3 * (1 - step / self.steps)))
            tried = [self._changed(best, total, int(self.rng.integers(1, most + 1))) for _ in range(self.candidates)]
            values = self._likelihood(numbers, tried)
            if float(values.max()) > best_value:
                best, best_value = tried[int(values.argmax())], float(values.max())
        return best

    def scores(self, numbers: Sequence[int], kept: torch.Tensor) -> list[float]:
        """Return the scores of these questions with some tokens."""
        with _keeping([kept] * len(numbers)):
            answers, _ = self._ask(numbers, _given(len(kept)))
        return self._scores(numbers, answers)

    def _changed(self, kept: torch.Tensor, total: int, count: int) -> torch.Tensor:
        inside = np.isin(np.arange(total), kept.numpy())
        out = self.rng.choice(np.flatnonzero(inside), count, replace=False)
        new = self.rng.choice(np.flatnonzero(~inside), min(count, int((~inside).sum())), replace=False)
        inside[out[: len(new)]] = False
        inside[new] = True
        return torch.from_numpy(np.flatnonzero(inside))

    @torch.inference_mode()
    def _likelihood(self, numbers: Sequence[int], sets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return for every set the mean log-probability of a token of the whole model's answers to these questions."""
        tokenizer = self.loaded.processor.tokenizer
        total = torch.zeros(len(sets))
        for number in numbers:
            answer = tokenizer(self.answers[number], add_special_tokens=False, return_tensors="pt").input_ids[0]
            answer = torch.cat([answer, torch.tensor([tokenizer.eos_token_id])]).to(self.loaded.model.device)
            prompt = models.inputs(self.loaded, [self.samples[number]] * len(sets), [self.media] * len(sets))
            forced = answer[:-1].expand(len(sets), -1)
            prompt["input_ids"] = torch.cat([prompt["input_ids"], forced], dim=1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            if "mm_token_type_ids" in prompt:
                prompt["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(forced)], dim=1)
            with (
                _keeping(list(sets)),
                vtc.compressed(self.loaded.model, _given(len(sets[0]))) as model,
                vtc.remember(model, self._memory(len(sets))),
            ):
                logits = model(**prompt, logits_to_keep=len(answer)).logits.float().log_softmax(dim=-1)
            spoken = logits.gather(2, answer.expand(len(sets), -1)[..., None]).squeeze(-1)
            total += spoken.mean(dim=1).cpu() / len(numbers)
        return total

    def _memory(self, rows: int) -> vtc.EncoderMemory:
        return self._memories.setdefault(rows, vtc.EncoderMemory(rows=rows))

    def _ask(self, numbers: Sequence[int], config: vtc.CompressionConfig | None) -> tuple[list[str], Any]:
        asked = [self.samples[number] for number in numbers]
        prompt = models.inputs(self.loaded, asked, [self.media] * len(asked))
        config = config or vtc.CompressionConfig("uniform", keep_ratio=1.0)
        with (
            vtc.compressed(self.loaded.model, config) as model,
            vtc.remember(model, self._memory(len(asked))),
        ):
            answers, _ = models.answer(self.loaded, prompt, self.task.max_new_tokens)
            return answers, vtc.report(model)

    def _scores(self, numbers: Sequence[int], answers: Sequence[str]) -> list[float]:
        return [
            self.task.score(self.samples[number], answer)[self.task.main_score]
            for number, answer in zip(numbers, answers, strict=True)
        ]


@contextmanager
def _keeping(rows: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give `GivenSelector` its rows for the length of a block."""
    token = _chosen.set(list(rows))
    try:
        yield
    finally:
        _chosen.reset(token)


def _given(count: int) -> vtc.CompressionConfig:
    return vtc.CompressionConfig(GivenSelector.name, keep_tokens=count)


def bound(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    *,
    method: str,
    keep: float,
    candidates: int = 24,
    steps: int = 60,
    seed: int = 0,
) -> list[Found]:
    """Search for every question alone, and for every picture on all questions but its last two, which it is tried on.

    Parameters
    ----------
    loaded : Loaded
    task : Task
    samples : sequence of Sample
        Questions about single pictures; those about one picture follow each other.
    method : str
        Where the search begins, and what it is compared with.
    keep : float
        Share of the visual tokens.
    candidates, steps : int
        Sets per forward pass, and passes per search.
    seed : int

    Raises
    ------
    InputError
        A prompt shows no picture, or several.
    """
    config = vtc.CompressionConfig(method, keep_ratio=keep)
    rng = np.random.default_rng(seed)
    found: list[Found] = []
    for group, part in groupby(samples, key=lambda sample: sample.group or sample.id):
        asked = list(part)
        searcher = Searcher(loaded, task, asked, asked[0].open(), candidates=candidates, steps=steps, rng=rng)
        kept, total, scores = searcher.start(config)
        for number in range(len(asked)):
            best = searcher.search([number], kept, total)
            (score,) = searcher.scores([number], best)
            found.append(Found("question", group, searcher.whole[number], scores[number], score))
        if len(asked) > 3:
            best = searcher.search(range(len(asked) - 2), kept, total)
            held_out = range(len(asked) - 2, len(asked))
            for number, score in zip(held_out, searcher.scores(held_out, best), strict=True):
                found.append(Found("picture", group, searcher.whole[number], scores[number], score))
    return found


def to_markdown(found: Sequence[Found], method: str, keep: float) -> str:
    """Return the table of a search: a line for searches by question and one for searches by picture."""
    lines = []
    titles = {"question": "each question", "picture": "other questions about the picture, tried on two held out"}
    for kind, title in titles.items():
        part = [each for each in found if each.kind == kind]
        if not part:
            continue
        groups = [each.group for each in part]
        gain, (low, high), _ = statistics.paired([each.start for each in part], [each.found for each in part], groups)
        means = (np.mean([getattr(each, name) for each in part]) for name in ("whole", "start", "found"))
        lines.append(
            [
                title,
                *(f"{mean:.3f}" for mean in means),
                f"{gain:+.3f}",
                f"{low:+.3f} to {high:+.3f}",
                str(len(part)),
                str(len(set(groups))),
            ]
        )
    header = [
        "searched on",
        "all tokens",
        f"{method} {keep:g}",
        "found",
        "found - method",
        "95 %",
        "questions",
        "pictures",
    ]
    return to_markdown_table(header, lines)
