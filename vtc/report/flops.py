"""Prefill arithmetic and cache size of a decoder, computed from its configuration.

Conventions
-----------
* One multiply-accumulate (MAC) is two floating-point operations.
* Only matrix products count. Norms, activations, rotary embedding, softmax and biases are left out, as in the
  token-pruning papers: they are linear in the sequence length and two to three orders of magnitude smaller.
* Attention counts the whole n x n rectangle (n x min(n, window) in a sliding-window layer), which is what a dense
  kernel computes and what the papers report. A kernel that skips the upper triangle does about half of that part.
* The language-model head counts once per row: `generate` asks the prefill for the last position only.
* Vision tower and projector are not counted. Compression leaves them as they are.

For multi-head attention and a plain two-matrix MLP one layer costs ``4nd^2 + 2n^2d + 2ndm`` MACs, with a gated MLP
``4nd^2 + 2n^2d + 3ndm`` (FastV, arXiv 2403.06764, section 4.2 writes the former).

Papers that count otherwise have a function of their own: `llm_viewer_prefill_flops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtc.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOPS_PER_MAC = 2

# Text configurations whose MLP is down(act(gate(x)) * up(x)): three matrices.
_GATED_MLP = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_vl_text",
        "smollm3",
    }
)
# Text configurations whose MLP is down(act(up(x))): two matrices.
_PLAIN_MLP = frozenset({"phi", "starcoder2"})
# Mixtures of experts with a gated expert and no shared expert.
_MIXTURE = frozenset({"mixtral", "qwen3_moe", "qwen3_vl_moe_text"})


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
        """Numbers (keys and values together) that this layer's cache holds after `n` tokens of one row."""
        # A sliding layer's dynamic cache keeps the window without the token to come.
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
            The configuration belongs to an architecture whose arithmetic this module does not know, or has layers
            (linear attention, convolution) whose cost is not that of attention.
        """
        mlp_macs = _mlp_macs_per_layer(text_config)
        d = text_config.hidden_size
        heads = text_config.num_attention_heads
        kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
        head_dim = getattr(text_config, "head_dim", None) or d // heads
        query_width, kv_width = heads * head_dim, kv_heads * head_dim
        layers = tuple(
            LayerShape(
                attention_macs=2 * d * query_width + 2 * d * kv_width,
                mlp_macs=mlp,
                query_width=query_width,
                kv_width=kv_width,
                window=window,
            )
            for mlp, window in zip(mlp_macs, _windows(text_config), strict=True)
        )
        return cls(layers=layers, head_macs=d * text_config.vocab_size)

    def layer_flops(self, layer: int, n: int) -> int:
        """FLOPs of decoder layer `layer` on a prefill of `n` tokens of one row."""
        return FLOPS_PER_MAC * self.layers[layer].macs(n)

    def head_flops(self) -> int:
        """FLOPs of the language-model head for one row."""
        return FLOPS_PER_MAC * self.head_macs

    def prefill_flops(self, n: int) -> int:
        """FLOPs of all layers and the head on a prefill of `n` tokens of one row, the same n in every layer."""
        return sum(self.layer_flops(i, n) for i in range(len(self.layers))) + self.head_flops()


def llm_viewer_prefill_flops(text_config: PreTrainedConfig, tokens_per_layer: Sequence[int]) -> int:
    """FLOPs of a prefill in the convention of LLM-Viewer, for comparison with papers that used it (AIM, 2412.03248).

    Unlike `DecoderShape` it also counts what is linear in the tokens: five operations per entry of the softmax, seven
    per value of each norm, one per value of each addition and two of the activation; it counts one, not two, per weight
    of the head. Reproduces the tool exactly for Qwen2 and LLaMA, where its description of Qwen2 leaves out one of the
    two residual additions.

    Parameters
    ----------
    text_config : transformers.PreTrainedConfig
        Of a decoder with a gated MLP.
    tokens_per_layer : sequence of int
        Tokens of one row that every layer sees.

    Raises
    ------
    UnsupportedModelError
        The decoder is of an unknown kind, or has no gated MLP.
    ConfigError
        There are not as many numbers as layers.
    """
    config: Any = text_config
    if config.model_type not in _GATED_MLP:
        raise UnsupportedModelError(
            f"LLM-Viewer's convention is known for decoders with a gated MLP ({', '.join(sorted(_GATED_MLP))}), got "
            f"{config.model_type!r}."
        )
    shape = DecoderShape.from_config(text_config)
    if len(tokens_per_layer) != len(shape.layers):
        raise ConfigError(f"Got {len(tokens_per_layer)} token counts for {len(shape.layers)} layers.")
    d, heads = config.hidden_size, config.num_attention_heads
    additions = 1 if config.model_type.startswith("qwen2") else 2
    linear = (14 + additions + 2) * d
    layers = (
        FLOPS_PER_MAC * layer.macs(n) + 5 * heads * n * n + linear * n
        for layer, n in zip(shape.layers, tokens_per_layer, strict=True)
    )
    return sum(layers) + shape.head_macs


def _mlp_macs_per_layer(config: Any) -> list[int]:
    """MACs per token of every layer's MLP."""
    depth, d = config.num_hidden_layers, config.hidden_size
    if config.model_type in _GATED_MLP:
        return [3 * d * config.intermediate_size] * depth
    if config.model_type in _PLAIN_MLP:
        return [2 * d * config.intermediate_size] * depth
    if config.model_type == "mixtral":
        active = d * config.num_local_experts + config.num_experts_per_tok * 3 * d * config.intermediate_size
        return [active] * depth
    if config.model_type in _MIXTURE:
        active = d * config.num_experts + config.num_experts_per_tok * 3 * d * config.moe_intermediate_size
        dense = 3 * d * config.intermediate_size
        return [active if _is_sparse(config, i) else dense for i in range(depth)]
    known = ", ".join(sorted(_GATED_MLP | _PLAIN_MLP | _MIXTURE))
    raise UnsupportedModelError(
        f"The FLOPs of a text model of type {config.model_type!r} were asked for; the formula is known for: {known}."
    )


def _is_sparse(config: Any, layer: int) -> bool:
    """Whether layer `layer` of a Qwen3 mixture is one of experts (the others have a dense MLP)."""
    return layer not in (config.mlp_only_layers or ()) and (layer + 1) % config.decoder_sparse_step == 0


def _windows(config: Any) -> list[int | None]:
    """Sliding window of every layer, None where attention is full."""
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
