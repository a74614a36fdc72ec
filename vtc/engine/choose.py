"""Choosing: one stage of a method, shown what is left of one image or video."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from vtc.core.actions import Action
from vtc.core.context import VisualContext
from vtc.core.selection import Selection
from vtc.core.signals import Signal
from vtc.core.sites import BeforeDecoder
from vtc.core.updating import UpdatingSelector
from vtc.engine.plan import PlannedStage
from vtc.engine.prompt import Segment
from vtc.errors import UnsupportedMethodError

__all__ = ["choose"]


def choose(
    stage: PlannedStage,
    segment: Segment,
    extra: Mapping[Signal, torch.Tensor] | None = None,
    *,
    structural: str = "keep",
    known: Selection | None = None,
) -> float:
    """Let a stage choose among the tokens that are left of a segment, and apply its answer.

    Parameters
    ----------
    stage, segment
    extra
        Signals that are not on the segment: those of its text, and of the decoder, (K, ...) where they are per token.
    structural
        Whether structural tokens stay beside the scored ones.
    known
        The answer, where it is remembered.

    Returns
    -------
    float
        Milliseconds that the method took.
    """
    if not len(segment.kept):  # an earlier stage has dropped the whole image
        segment.apply(stage.site, Selection.full(0, segment.kept.device))
        return 0.0
    if known is not None:
        segment.apply(stage.site, known)
        return 0.0
    raw = {**segment.signals, **(extra or {})}
    context = VisualContext(
        features=segment.features,
        budget=stage.budget(len(segment.kept)),
        generator=torch.Generator().manual_seed(stage.config.seed),
        grids=segment.grids,
        modality=segment.modality,
        site=stage.site,
        keep_ratio=stage.keep_ratio,
        structural=int(segment.structural.sum()) if structural == "keep" else 0,
        other_visuals=segment.other_visuals,
        tokens_at_input=None if isinstance(stage.site, BeforeDecoder) else segment.tokens_at_input,
        signals={signal: signal.present(raw[signal]) for signal in stage.stage.requires if signal in raw},
    )
    replaces = stage.stage.action is Action.REPLACE
    updates = isinstance(stage.selector, UpdatingSelector)
    memory = None
    with torch.set_grad_enabled((replaces or updates) and torch.is_grad_enabled()):  # modules may be in training
        began = time.perf_counter()
        selection = stage.selector.select(context.check())
        if isinstance(stage.selector, UpdatingSelector):
            memory = stage.selector.remember(context, selection)
        spent = 1e3 * (time.perf_counter() - began)
    merges = isinstance(stage.site, BeforeDecoder) or stage.stage.action is Action.MERGE
    if selection.assign is not None and not merges:
        raise UnsupportedMethodError(
            f"{stage.selector.name} merged tokens at {str(stage.site)!r} though its stage declares {stage.stage.action}"
        )
    if selection.features is not None and not replaces:
        raise UnsupportedMethodError(
            f"{stage.selector.name} made new tokens at {str(stage.site)!r} though its stage declares "
            f"{stage.stage.action}"
        )
    segment.apply(stage.site, selection)
    if memory is not None and segment.kept.numel():
        segment.memories.append((stage.config, segment.columns[segment.kept], memory))
    return spent
