"""What methods share that start from the attention of the vision tower's feature layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.actions import Action
from ..core.context import VisualContext
from ..core.selector import Selector
from ..core.signals import ClsAttention, ReceivedAttention, Signal
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError

__all__ = ["SOURCES", "SaliencySelector", "check_source"]

SOURCES: dict[str, type[ClsAttention] | type[ReceivedAttention]] = {"cls": ClsAttention, "received": ReceivedAttention}
"""Where scores can come from: [CLS], or for towers without it the attention that a token receives from all others."""


def check_source(method: str, source: str) -> None:
    """Raise ConfigError unless `source` is one of `SOURCES`."""
    if source not in SOURCES:
        raise ConfigError(f"{method}: score_source must be one of {sorted(SOURCES)}, got {source!r}.")


@dataclass(frozen=True)
class SaliencySelector(Selector):
    """A method of one stage before the decoder that reads the attention of the layer that makes the features.

    Class attributes
    ----------------
    beside
        Signals that it requires beside the attention.
    action
        Of its stage.
    """

    instead: ClassVar[Mapping[type[Signal], str]] = {ClsAttention: 'score_source="received"'}
    beside: ClassVar[tuple[Signal, ...]] = ()
    action: ClassVar[Action] = Action.KEEP

    score_source: str = "cls"

    def __post_init__(self) -> None:
        check_source(self.name, self.score_source)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=(SOURCES[self.score_source](), *self.beside), action=self.action),)

    def saliency(self, ctx: VisualContext) -> Tensor:
        """(N,) float32: the attention of every token, averaged over heads."""
        return ctx[SOURCES[self.score_source]][-1].float().mean(dim=0)
