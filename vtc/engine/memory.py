"""What is remembered of the pictures of one prompt, so that it need not be made again for another call about them.

An encoder's output is remembered for every plan whose towers see whole pictures. Where stages make pictures smaller, or
drop patches inside the tower, it is remembered for the plan that has these very stages. A choice before the language
model is remembered if it, and every choice before it, was made of the pictures alone: the same stages then choose the
same whatever is asked.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vtc.core.observations import Observation
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.engine.in_tower import TowerPass
from vtc.engine.plan import Plan, PlannedStage

if TYPE_CHECKING:
    from vtc.engine.encoder import Encoded
    from vtc.engine.prompt import Segment

__all__ = ["MEMORY", "Changed", "Choices", "EncoderMemory", "Place", "Run"]

Place = tuple[type[Observation], int]
"""An observation and a layer."""


@dataclass(eq=False)
class Run:
    """The output of an encoder, the signals read from it, and observations of its layers and its input."""

    output: Any
    pixels: list[torch.Tensor] = field(default_factory=list)
    observed: dict[Place, list[Observation]] = field(default_factory=dict)
    values: dict[Signal, torch.Tensor] = field(default_factory=dict)
    tower: TowerPass | None = None


@dataclass(eq=False)
class Changed:
    """What an encoder gave whose pictures, or patches, became fewer: the stages that did it, and the signals read."""

    stages: tuple[PlannedStage, ...]
    signals: tuple[Signal, ...]
    output: Any
    encoded: Encoded


@dataclass(eq=False)
class EncoderMemory:
    """Results of the encoders for the images and videos of one prompt, by modality.

    Pass it to `vtc.remember`.

    Attributes
    ----------
    rows
        How many rows of the prompt show the same images, in the same order: the encoder runs on those of the first.
    observations
        Keep also the observations of the layers that were read, so that signals with other parameters can be computed
        without running the encoder again. They are as large as the tower's queries, keys and values.
    """

    rows: int = 1
    observations: bool = False
    runs: dict[str, Run] = field(default_factory=dict)
    changed: dict[str, Changed] = field(default_factory=dict, init=False)
    choices: dict[tuple[int, int, int], tuple[Any, Selection]] = field(default_factory=dict, init=False)


MEMORY: ContextVar[tuple[Any, EncoderMemory] | None] = ContextVar("vtc_encoder_memory", default=None)
"""The encoder that this thread or task remembers for, and its memory."""


class Choices:
    """The choices of one stage before the language model that a memory holds.

    Parameters
    ----------
    memory : EncoderMemory or None
        None: there is nothing, and nothing is kept.
    plan : Plan
    stage : PlannedStage
        One that looks at more than the pictures has its choices neither kept nor found.
    """

    def __init__(self, memory: EncoderMemory | None, plan: Plan, stage: PlannedStage) -> None:
        self.place = plan.before_decoder.index(stage)
        self.made_by = plan.of_pictures(stage)
        self.memory = None if self.made_by is None else memory
        self.structural = plan.structural

    def get(self, segment: Segment) -> Selection | None:
        """Return what was chosen of this image or video by the same stages, or None."""
        if self.memory is None:
            return None
        made_by, selection = self.memory.choices.get(self._where(segment, self.memory.rows), (None, None))
        return selection if made_by == self._made_by(segment) else None

    def put(self, segment: Segment) -> None:
        """Keep what was just chosen; one choice is kept for each stage and picture."""
        if self.memory is not None:
            where = self._where(segment, self.memory.rows)
            self.memory.choices[where] = self._made_by(segment), segment.selections[-1][1]

    def _where(self, segment: Segment, rows: int) -> tuple[int, int, int]:
        return segment.row if rows == 1 else 0, segment.index, self.place  # several rows show the same pictures

    def _made_by(self, segment: Segment) -> tuple[Any, ...]:
        return self.made_by, self.structural, segment.modality, segment.other_visuals
