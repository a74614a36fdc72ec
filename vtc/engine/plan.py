"""The stages that a compression plans on one model, and what they want to be told together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtc.budget import resolve_budget
from vtc.config import CompressionConfig
from vtc.core.context import Need
from vtc.errors import UnsupportedMethodError
from vtc.selectors.base import Selector


@dataclass(frozen=True)
class PlannedStage:
    """One stage of one configured method."""

    config: CompressionConfig
    selector: Selector
    layer: int | None
    requires: frozenset[Need]
    keep: float | None = None
    images_only: frozenset[Need] = frozenset()

    def budget(self, n: int) -> int:
        """How many of `n` tokens may stay; a method that plans its stages itself may plan to keep none."""
        if self.keep is not None:
            return max(round(n * self.keep), 1 if self.layer is None else 0)
        return resolve_budget(n, self.config.keep_ratio, self.config.keep_tokens)

    @property
    def keep_ratio(self) -> float | None:
        """Fraction behind `budget`, if it is one."""
        return self.config.keep_ratio if self.keep is None else self.keep

    def wants(self, modality: str) -> frozenset[Need]:
        """What it requires of an image or a video."""
        return self.requires if modality == "image" else self.requires - self.images_only


def wanted(stages: Sequence[PlannedStage], needs: frozenset[Need], modality: str | None = None) -> frozenset[Need]:
    """Those of `needs` that some stage requires, of this modality if one is named."""
    asked = (stage.requires if modality is None else stage.wants(modality) for stage in stages)
    return frozenset(need for some in asked for need in some if need in needs)


def parameters_of(stages: Sequence[PlannedStage], need: Need) -> dict[str, Any]:
    """How a value that is computed once for all stages is to be computed.

    Raises
    ------
    UnsupportedMethodError
        Two methods want it computed in different ways.
    """
    asked = [dict(stage.selector.parameters(need)) for stage in stages if need in stage.requires]
    if any(parameters != asked[0] for parameters in asked):
        raise UnsupportedMethodError(f"the composed methods want different kinds of {need.value}: {asked}")
    return asked[0]
