"""Prefill arithmetic and cache size of a decoder, computed from its configuration.

Conventions
-----------
* One multiply-accumulate (MAC) is two floating-point operations.
* Only matrix products count. Norms, activations, rotary embedding, softmax and biases are left out, as in the
  token-pruning papers: they are linear in the sequence length and two to three orders of magnitude smaller.
* Attention counts the whole n x n rectangle (n x min(n, window) in a sliding-window layer), which is what a dense
  kernel computes and what the papers report. A kernel that skips the upper triangle does about half of that part.
* The language-model head counts once per row: `generate` asks the prefill for the last position only.
* Vision tower and projector are not counted as long as compression leaves them as they are. Where patches leave inside
  the tower, `block_flops` counts its layers.

For multi-head attention and a plain two-matrix MLP one layer costs ``4nd^2 + 2n^2d + 2ndm`` MACs, with a gated MLP
``4nd^2 + 2n^2d + 3ndm`` (FastV, arXiv 2403.06764, section 4.2 writes the former). Which matrices a layer has is read
from the decoder that transformers builds from the configuration, without memory for its weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vtc.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class LayerShape:
    """The matrix sizes of one decoder layer.

    Attributes
    ----------
    attention_macs : int
        MACs per token of the four projections (query, key, value, output).
    mlp_macs : int
        MACs per token of the MLP; of a mixture, the router plus the experts one token is sent to.
    query_width : int
        H * head_dim.
    kv_width : int
        Hkv * head_dim; smaller than `query_width` under grouped-query attention.
    window : int or None
        Sliding window in tokens; None for full attention.
    """

    attention_macs: int
    mlp_macs: int
    query_width: int
    kv_width: int
    window: int | None = None

    def macs(self, n: int) -> int:
        """MACs of this layer on a prefill of `n` tokens of one row."""
        reach = n if self.window is None else min(n, self.window)
        return n * (self.attention_macs + self.mlp_macs) + 2 * n * reach * self.query_width

    def cached_values(self, n: int) -> int:
        """Count the numbers (keys and values together) in this layer's cache after `n` tokens of one row."""
        # A sliding layer's dynamic cache keeps the window without the next token.
        held = n if self.window is None else min(n, self.window - 1)
        return 2 * held * self.kv_width


@dataclass(frozen=True)
class DecoderShape:
    """The matrix sizes of a whole decoder: its layers in order and its head.

    Attributes
    ----------
    layers : tuple of LayerShape
    head_macs : int
        MACs of the language-model head on one position.
    """

    layers: tuple[LayerShape, ...]
    head_macs: int

    @classmethod
    def from_config(cls, text_config: PreTrainedConfig) -> DecoderShape:
        """Read the shape from the configuration of a text model.

        Parameters
        ----------
        text_config : transformers.PreTrainedConfig
            A text configuration (`model.config.get_text_config()`).

        Raises
        ------
        UnsupportedModelError
            transformers builds no decoder from the configuration, or one with layers (linear attention, convolution)
            or matrices that the formula does not cover.
        """
        windows = _windows(text_config)
        settings = text_config.to_dict()
        for name in ("dtype", "quantization_config"):  # transformers builds in a dtype by changing torch's default
            settings.pop(name, None)
        config_class: Any = type(text_config)
        matrices = _matrices(config_class, json.dumps(settings, sort_keys=True, default=str))
        return cls(
            layers=tuple(LayerShape(*sizes, window) for sizes, window in zip(matrices, windows, strict=True)),
            head_macs=text_config.hidden_size * text_config.vocab_size,
        )

    def layer_flops(self, layer: int, n: int) -> int:
        """FLOPs of decoder layer `layer` on a prefill of `n` tokens of one row."""
        return FLOPS_PER_MAC * self.layers[layer].macs(n)

    def head_flops(self) -> int:
        """FLOPs of the language-model head for one row."""
        return FLOPS_PER_MAC * self.head_macs

    def prefill_flops(self, n: int) -> int:
        """FLOPs of all layers and the head on a prefill of `n` tokens of one row, the same n in every layer."""
        return sum(self.layer_flops(i, n) for i in range(len(self.layers))) + self.head_flops()


def block_flops(block: nn.Module, tokens: int, squares: int) -> int:
    """FLOPs of one layer of a vision tower.

    Parameters
    ----------
    block : nn.Module
    tokens : int
        Tokens of all sequences together.
    squares : int
        Sum of the squares of the lengths of the sequences that attention is computed in.
    """
    matrices = {name: each for name, each in block.named_modules() if isinstance(each, nn.Linear)}
    width = next(
        (each.out_features // (3 if name.endswith("qkv") else 1) for name, each in matrices.items()
         if name.endswith(("q_proj", "qkv", "query"))), 0,
    )  # fmt: skip
    return FLOPS_PER_MAC * (
        tokens * sum(each.in_features * each.out_features for each in matrices.values()) + 2 * squares * width
    )


@functools.lru_cache(maxsize=32)
def _matrices(config_class: Any, settings: str) -> tuple[tuple[int, int, int, int], ...]:
    """Return what `_layer_matrices` finds in every layer of the decoder with these settings."""
    from transformers import AutoModel

    config = config_class.from_dict(json.loads(settings))
    try:
        with torch.device("meta"):
            decoder: Any = AutoModel.from_config(config, attn_implementation="eager")
    except ValueError as error:  # not an architecture of transformers
        raise _unsupported(config) from error
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise _unsupported(config)
    return tuple(_layer_matrices(config, layer) for layer in decoder.layers)


def _layer_matrices(config: Any, layer: nn.Module) -> tuple[int, int, int, int]:
    """Return MACs per token of a layer's attention projections and of its MLP, and its query and key-value width.

    Raises
    ------
    UnsupportedModelError
        The layer is more or other than four projections and one MLP, or mixture of experts.
    """
    d, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    query, kv = heads * head_dim, kv_heads * head_dim
    parts = {name: dict(_weights(module)) for name, module in layer.named_children()}
    parts = {name: weights for name, weights in parts.items() if weights}
    attention = parts.pop("self_attn", {})
    shapes = {name: tuple(weight.shape) for name, weight in attention.items()}
    projections = {"q_proj.weight": (query, d), "k_proj.weight": (kv, d), "v_proj.weight": (kv, d)}
    if len(shapes) != 4 or not projections.items() <= shapes.items() or (d, query) not in shapes.values():
        raise _unsupported(config)
    if len(parts) != 1 or any(isinstance(module, nn.ModuleList) for module in layer.modules()):
        raise _unsupported(config)
    (mlp,) = parts.values()
    return (
        sum(weight.numel() for weight in attention.values()),
        sum(_macs_per_token(config, weight) for weight in mlp.values()),
        query,
        kv,
    )


def _weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of a module, and its stacks of matrices, which are those of experts."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.dim() > 1)


def _macs_per_token(config: Any, weight: torch.Tensor) -> int:
    """Count a matrix whole, and of a stack of experts' matrices those that a token is sent to."""
    if weight.dim() == 2:
        return weight.numel()
    if weight.dim() != 3 or not getattr(config, "num_experts_per_tok", None):
        raise _unsupported(config)
    active: int = config.num_experts_per_tok
    return active * weight[0].numel()


def _unsupported(config: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The FLOPs of a text model of type {config.model_type!r} were asked for; the formula covers decoders of "
        "transformers whose layers have a query, a key, a value and an output projection and one MLP or mixture of "
        "experts."
    )


def _windows(config: Any) -> list[int | None]:
    """Return the sliding window of every layer, None where attention is full."""
    depth = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        # Without a list of types the window, if there is one, holds for all layers (Mistral, Mixtral); the Qwen3
        # mixtures carry the field but apply it only when `use_sliding_window` says so.
        return [window if getattr(config, "use_sliding_window", True) else None] * depth
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"The FLOPs of a text model of type {config.model_type!r} were asked for; its layers of type "
            f"{', '.join(unknown)} are not attention over all tokens, and the formula covers only such layers."
        )
    return [window if kind == "sliding_attention" else None for kind in types]
