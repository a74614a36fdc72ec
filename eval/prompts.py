"""The prompts of a batch as the model reads them, and what its encoders made of the pictures, kept for all runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import vtc
from eval import models, resizing
from eval.models import Loaded
from eval.runs import BLIND, Run
from eval.tasks.base import Media, Sample

Opened = tuple[int, Sample, Media]
"""Place, sample and its decoded media."""

_KEEP_ALL = [vtc.CompressionConfig("uniform", keep_ratio=1.0)]


@dataclass(eq=False)
class Encoded:
    """Model inputs of some samples.

    Attributes
    ----------
    loaded : Loaded
    inputs : mapping
        What the processor returned.
    memory : vtc.EncoderMemory
        Of the pictures in these inputs.
    lengths : list of int
        Tokens of each prompt.
    """

    loaded: Loaded
    inputs: Any
    memory: vtc.EncoderMemory
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [int(n) for n in self.inputs["attention_mask"].sum(dim=1)]

    @contextmanager
    def encoding(self, plan: list[vtc.CompressionConfig]) -> Iterator[Any]:
        """Compress the model by a plan, an empty one keeps all tokens, and let it use and fill the memory."""
        with vtc.compressed(self.loaded.model, plan or _KEEP_ALL) as model, vtc.remember(model, self.memory):
            yield model


class Prompts:
    """The prompts of one batch, made once for all runs that show the same pictures."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._made: dict[Any, Encoded] = {}
        self._grey: tuple[Any, vtc.EncoderMemory] | None = None

    def of(self, part: Sequence[Opened], run: Run) -> Encoded:
        """Return the prompts of some samples as a run shows them."""
        shows = run.name if run.resizes or run == BLIND else None
        key = (shows, *(order for order, _, _ in part))
        if key not in self._made:
            self._made[key] = self._make(part, run)
        return self._made[key]

    def forget(self) -> None:
        """Begin with another batch."""
        self._made.clear()

    def _make(self, part: Sequence[Opened], run: Run) -> Encoded:
        samples, media = [sample for _, sample, _ in part], [shown for _, _, shown in part]
        if run.resizes:
            media = [resizing.resized(self.loaded, sample, shown, run) for _, sample, shown in part]
        inputs = models.inputs(self.loaded, samples, media)
        rows = len(part) if all(sample.shown == samples[0].shown for sample in samples) else 1
        memory = vtc.EncoderMemory(rows=rows)
        if run == BLIND:
            inputs = models.blinded(inputs)
            memory = self._of_grey(inputs, memory)
        return Encoded(self.loaded, inputs, memory)

    def _of_grey(self, inputs: Any, memory: vtc.EncoderMemory) -> vtc.EncoderMemory:
        """Return the memory of the last batch if its grey pictures had the same number, sizes and order."""
        text = ("input_ids", "attention_mask", "mm_token_type_ids")
        looks = [
            (name, value.shape, None if value.is_floating_point() else value.tolist())
            for name, value in inputs.items()
            if name not in text
        ]
        if self._grey is None or self._grey[0] != (memory.rows, looks):
            self._grey = ((memory.rows, looks), memory)
        return self._grey[1]
