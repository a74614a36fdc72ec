"""Attention masks for layers that store different keys, some of them no longer neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import blockwise_overlay, create_causal_mask

from vtc.engine.cache import CACHE
from vtc.kernels.dispatch import queues


class LayerTypes:
    """The types of attention of the decoder layers of a language model.

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
    types: LayerTypes,
    layer: int,
    hidden: torch.Tensor,
    source_index: torch.Tensor,
    cache: Any,
    *,
    blocks: torch.Tensor | None = None,
    seen: int = 0,
    complete: bool = False,
) -> Any:
    """The mask that decoder layer `layer` needs, in the form that the model's attention implementation takes.

    Parameters
    ----------
    types : LayerTypes
    layer : int
        Sizes are those of this layer's cache.
    hidden : Tensor (B, T, ...)
        Only its batch, length, dtype and device are used.
    source_index : LongTensor (B, P)
        Where every key, past and current, stands in the uncompressed conversation; -1 for padding. A window reaches as
        far back as it would without compression.
    cache : Cache or None
    blocks : LongTensor (B, T), optional
        Current tokens that see each other in both directions share a number >= 0.
    seen : int
        Length of the uncompressed conversation.
    complete : bool
        Whether it is known that no key is padding.
    """
    arguments: dict[str, Any] = {
        "config": types.config,
        "inputs_embeds": hidden,
        "attention_mask": (source_index >= 0).long(),
        CACHE: cache,
        "layer_idx": layer,
    }
    window = types.windows[layer]
    steps = hidden.shape[1] == 1 and blocks is None and cache is not None and not cache.is_compileable
    if steps and (window is None or seen <= window) and types.config._attn_implementation == "sdpa":
        # What the call below comes to for one query, at a tenth of its time: layers that keep other numbers of entries
        # need a mask each at every step.
        valid = source_index >= 0
        if complete or not (queues(valid) or bool(not valid.all())):  # a GPU is not waited for at every step
            return None
        return valid[:, None, None]
    if blocks is not None:
        blocks = nn.functional.pad(blocks, (source_index.shape[1] - blocks.shape[1], 0), value=-1)
    if window is None or seen <= window:
        return create_causal_mask(**arguments, block_sequence_ids=blocks)
    length = source_index.shape[1]
    if cache is not None:  # a static cache is longer than the keys that exist
        length = max(length, int(cache.get_max_length(layer)) + 1)
    if blocks is not None:
        arguments["or_mask_function"] = blockwise_overlay(_padded(blocks, length))
    return create_causal_mask(**arguments, and_mask_function=_window(_padded(source_index, length), window))


def _padded(table: torch.Tensor, length: int) -> torch.Tensor:
    """`table` (B, P) with -1 behind it, up to `length` keys."""
    return nn.functional.pad(table, (0, max(0, length - table.shape[1])), value=-1)


def _window(source_index: torch.Tensor, window: int) -> Callable[..., Any]:
    def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return source_index[batch, query] - source_index[batch, key] < window

    return near


def allowed_keys(mask: Any) -> torch.Tensor | None:
    """Convert any mask of an attention function to (B, 1, Lq or 1, M) bool: the keys that a query may attend to."""
    if mask is None or not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, None, None].bool()
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
