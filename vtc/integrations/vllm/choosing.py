"""One picture or video that vLLM has encoded: how many rows stay, and which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.core.grids import Grid, count_tokens
from vtc.core.signals import Signal
from vtc.engine.choose import choose
from vtc.engine.plan import PlannedStage
from vtc.engine.prompt import Segment
from vtc.errors import InputError

__all__ = ["Visual", "choose_rows", "kept_count"]


@dataclass(frozen=True, eq=False)
class Visual:
    """How the rows of one encoded picture or video lie.

    Attributes
    ----------
    modality
        "image" or "video".
    grids
        Views (t, h, w) of the rows that are patches.
    structural
        (n,) bool: rows that are none, newlines above all; None: there are none.
    """

    modality: str
    grids: tuple[Grid, ...]
    structural: Tensor | None = None


def kept_count(stage: PlannedStage, rows: int, structural: int = 0) -> int:
    """Return how many of `rows` rows stay, `structural` of which are no patches."""
    return stage.budget(rows - structural) + (structural if stage.config.structural == "keep" else 0)


def choose_rows(
    stage: PlannedStage,
    visual: Visual,
    rows: Tensor,
    width: int | None = None,
    signals: Mapping[Signal, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Let a method choose, and merge where it merges.

    Parameters
    ----------
    stage
    visual
    rows : Tensor (n, D)
        The features, and behind the first `width` columns what belongs to them (the planes of deepstack): it is not
        looked at, and never merged.
    width
        None: all columns are features.
    signals
        Those of the tower, (n, ...) each.

    Returns
    -------
    Which rows stay, (K,) long and ascending; and the rows, (K, D).

    Raises
    ------
    InputError
        Grids and rows contradict each other, or a feature is not finite.
    """
    n, width = len(rows), rows.shape[1] if width is None else width
    structural = visual.structural
    structural = torch.zeros(n, dtype=torch.bool) if structural is None else structural
    structural = structural.to(rows.device)
    scorable = (~structural).nonzero()[:, 0]
    if count_tokens(visual.grids) != len(scorable):
        raise InputError(f"grids {visual.grids} do not hold the {len(scorable)} tokens that vLLM's encoder gave.")
    segment = Segment(
        row=0,
        index=0,
        modality=visual.modality,
        columns=torch.arange(n, device=rows.device),
        grids=visual.grids,
        structural=structural,
        features=rows[scorable, :width],
        signals={signal: value[scorable.to(value.device)] for signal, value in (signals or {}).items()},
        kept=scorable,
    )
    segment.add_grid_signals(stage.stage.requires)
    choose(stage, segment, structural=stage.config.structural)
    stays = structural.clone() if stage.config.structural == "keep" else torch.zeros_like(structural)
    stays[segment.kept] = True
    kept = stays.nonzero()[:, 0]
    if segment.merged:
        rows = rows.clone()
        rows[segment.kept, :width] = segment.features
    return kept, rows[kept]
