"""Appending a piece of a conversation that is already shortened to a cache.

The engine shortens a prompt while the model reads it, so the model has embedded all of it by then. A long video is
encoded and selected from in windows instead; what is left of it comes here, with a note of where each token stands in
the full prompt. The cache then looks as it would after a compressed prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtc.engine.cache import CACHE, CacheRecord, record_of
from vtc.engine.engine import Engine
from vtc.engine.state import ForwardState, Mode

__all__ = ["append"]


def append(
    engine: Engine,
    cache: Any,
    embeds: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor,
    *,
    visual: torch.Tensor | None = None,
    deepstack: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Read K tokens of a piece of P columns into `cache`, behind what it holds.

    Parameters
    ----------
    engine : Engine
        Installed.
    cache : transformers Cache
        New, or the result of an earlier compressed prefill.
    embeds : Tensor (1, K, D)
        What the kept columns hold.
    keep : BoolTensor (1, P)
        K of the piece's columns.
    positions : LongTensor (..., 1, P)
        Position ids of all of its columns.
    visual : BoolTensor (1, K), optional
        Which of the kept are visual, where `deepstack` has planes (K', D) for them.

    Returns
    -------
    Tensor (1, K, D)
        Last hidden states.
    """
    record = record_of(cache)
    if record is None:
        record = CacheRecord(0, [(0, keep.new_zeros(1, 0, dtype=torch.long))])
    source_index = torch.arange(record.logical, record.logical + keep.shape[1], device=embeds.device)[None]
    forward = ForwardState(engine.layer_types, cache, source_index, record.logical, record, Mode.APPEND)
    (positions,), _ = forward.pack(keep, [positions], [positions.dim() - 1])
    forward.write_record(engine.owner, record.shift)
    arguments: dict[str, Any] = {
        "inputs_embeds": embeds,
        "attention_mask": forward.valid_keys(0).long(),
        "position_ids": positions,
        CACHE: cache,
        "use_cache": True,
    }
    if deepstack:
        arguments |= {"visual_pos_masks": visual, "deepstack_visual_embeds": list(deepstack)}
    with engine.appending(forward):
        hidden: torch.Tensor = engine.adapter.text_model(**arguments).last_hidden_state
    return hidden
