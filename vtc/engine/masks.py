"""Attention masks for layers that store different keys, some of them no longer neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import blockwise_overlay, create_causal_mask

from vtc.engine.cache import CACHE


class LayerKinds:
    """What kinds of attention the decoder layers of a language model have.

    Attributes
    ----------
    config : PreTrainedConfig
        Of the language model.
    names : tuple of str
        Per layer, in the words of the configuration.
    windows : tuple of (int or None)
        Per layer the length of its sliding window in tokens, None for a layer that sees everything.
    shortest : int or None
        The shortest window.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        window = getattr(config, "sliding_window", None)
        usual = "sliding_attention" if window else "full_attention"
        self.names = tuple(getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers)
        self.windows = tuple(window if name == "sliding_attention" else None for name in self.names)
        self.shortest = min((length for length in self.windows if length is not None), default=None)


def causal_mask(
    kinds: LayerKinds,
    layer: int,
    hidden: torch.Tensor,
    columns: torch.Tensor,
    cache: Any,
    *,
    blocks: torch.Tensor | None = None,
    seen: int = 0,
) -> Any:
    """The mask that decoder layer `layer` needs, in the form that the model's attention implementation takes.

    Parameters
    ----------
    kinds : LayerKinds
    layer : int
        Sizes are those of this layer's cache.
    hidden : Tensor (B, T, ...)
        Only its batch, length, dtype and device are used.
    columns : LongTensor (B, P)
        Where every key, past and current, stands in the uncompressed conversation; -1 for padding. A window reaches as
        far back as it would without compression.
    cache : Cache or None
    blocks : LongTensor (B, T), optional
        Current tokens that see each other in both directions share a number >= 0.
    seen : int
        Length of the uncompressed conversation.
    """
    arguments: dict[str, Any] = {
        "config": kinds.config,
        "inputs_embeds": hidden,
        "attention_mask": (columns >= 0).long(),
        CACHE: cache,
        "layer_idx": layer,
    }
    if blocks is not None:
        blocks = nn.functional.pad(blocks, (columns.shape[1] - blocks.shape[1], 0), value=-1)
    window = kinds.windows[layer]
    if window is None or seen <= window:
        return create_causal_mask(**arguments, block_sequence_ids=blocks)
    room = columns.shape[1] if cache is None else max(columns.shape[1], int(cache.get_max_length(layer)) + 1)
    if blocks is not None:
        arguments["or_mask_function"] = blockwise_overlay(_padded(blocks, room))
    return create_causal_mask(**arguments, and_mask_function=_window(_padded(columns, room), window))


def _padded(table: torch.Tensor, room: int) -> torch.Tensor:
    """`table` (B, P), as long as the keys a static cache has room for."""
    return nn.functional.pad(table, (0, max(0, room - table.shape[1])), value=-1)


def _window(columns: torch.Tensor, window: int) -> Callable[..., Any]:
    def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return columns[batch, query] - columns[batch, key] < window

    return near
