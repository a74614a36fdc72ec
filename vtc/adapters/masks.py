"""Attention masks for layers that store different numbers of keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def layer_type(config: Any, layer: int) -> str:
    """Kind of attention of a decoder layer, in the words of the configuration."""
    types = getattr(config, "layer_types", None)
    return types[layer] if types else "full_attention"


def causal_mask(config: Any, layer: int, hidden: torch.Tensor, keys: torch.Tensor | None, cache: Any) -> Any:
    """The mask that decoder layer `layer` needs, in the form that the model's attention implementation takes.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the language model.
    layer : int
        Sizes are those of this layer's cache.
    hidden : Tensor (B, T, ...)
        Only its batch, length, dtype and device are used.
    keys : Tensor (B, P) or None
        Keys that exist, past and current.
    cache : Cache or None
    """
    sliding = layer_type(config, layer) == "sliding_attention"
    create = create_sliding_window_causal_mask if sliding else create_causal_mask
    return create(
        config=config,
        inputs_embeds=hidden,
        attention_mask=None if keys is None else keys.long(),
        past_key_values=cache,
        layer_idx=layer,
    )
