"""Updating hidden states on entering decoder layers, by what was remembered of the pictures in front of them.

What is remembered stands beside the key-value cache: on its record, where it follows the rows, and is there for every
later pass. Without a cache the prompt comes again and has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtc.config import CompressionConfig
from vtc.core.updating import HiddenContext
from vtc.engine.plan import PlannedStage
from vtc.errors import InputError

__all__ = ["PictureMemory", "update_hidden"]


@dataclass(frozen=True, eq=False)
class PictureMemory:
    """What a method remembered of one image or video.

    Attributes
    ----------
    config
        Of the method.
    start
        Where the picture begins in the uncompressed conversation.
    columns
        (K,) where the tokens stand there that the method kept, ascending.
    values
        What it remembered.
    rows
        (B,) bool, on the CPU: rows of the batch that show the picture.
    """

    config: CompressionConfig
    start: int
    columns: torch.Tensor
    values: Mapping[str, torch.Tensor]
    rows: torch.Tensor

    def map(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> PictureMemory:
        """Follow rows of the batch that are copied, reordered or left out."""
        return replace(self, rows=rows(self.rows))


@torch.compiler.disable
def update_hidden(
    stages: Sequence[PlannedStage],
    memories: Sequence[PictureMemory],
    layer: int,
    hidden: torch.Tensor,
    source_index: torch.Tensor,
    visual: torch.Tensor | None,
) -> torch.Tensor:
    """Return hidden states (B, T, D) as the `stages` on entering `layer` update them, row by row.

    Parameters
    ----------
    stages, memories, layer, hidden
    source_index : LongTensor (B, T)
        Where each token stands in the uncompressed conversation, -1 for padding.
    visual : BoolTensor (B, T), optional
        Which of them are tokens of pictures; None: none.

    Raises
    ------
    InputError
        A method returned something else than hidden states.
    """
    for stage in stages:
        selector: Any = stage.selector  # an UpdatingSelector: the plan has seen to it
        known = [memory for memory in memories if memory.config == stage.config]
        shown = [[memory for memory in known if memory.rows[row]] for row in range(len(hidden))]
        if not any(shown):
            continue
        updated = hidden.clone()
        for row, pictures in enumerate(shown):
            here = (source_index[row] >= 0).nonzero()[:, 0]
            if not pictures or not len(here):
                continue
            source, there = source_index[row, here], here.to(hidden.device)
            text = torch.ones_like(here, dtype=torch.bool) if visual is None else ~visual[row, here]
            # The modules are where the picture was, which in a model on several devices need not be the layer's.
            device = next((value.device for value in pictures[0].values.values()), hidden.device)
            context = _context(layer, hidden[row, there].to(device), source.to(device), text.to(device), pictures)
            states = selector.update(context)
            if states.shape != context.hidden.shape:
                raise InputError(
                    f"{selector.name} returned {tuple(states.shape)} for hidden states {tuple(context.hidden.shape)}."
                )
            updated[row, there] = states.to(hidden.device, hidden.dtype)
        hidden = updated
    return hidden


def _context(
    layer: int, hidden: torch.Tensor, source: torch.Tensor, text: torch.Tensor, pictures: Sequence[PictureMemory]
) -> HiddenContext:
    """Describe the tokens (T, D) at `source` (T,) of one row, of which `text` (T,) are."""
    picture, slot = torch.full_like(source, -1), torch.full_like(source, -1)
    for number, memory in enumerate(pictures):
        columns = memory.columns.to(source.device)
        at = torch.searchsorted(columns, source).clamp(max=len(columns) - 1)
        found = columns[at] == source
        picture, slot = picture.masked_fill(found, number), torch.where(found, at, slot)
    starts = torch.tensor([memory.start for memory in pictures], device=source.device)
    return HiddenContext(
        layer=layer,
        hidden=hidden,
        text=text,
        picture=picture,
        slot=slot,
        sees=source[:, None] >= starts,
        memories=tuple(memory.values for memory in pictures),
    )
