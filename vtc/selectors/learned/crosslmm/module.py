"""The modules of CrossLMM: before some decoder layers, gated cross-attention to the original visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import ConfigError
from ..attention import check_layers, check_sizes, place_codes

__all__ = ["CrossAttentions", "GatedAttention"]


class GatedAttention(nn.Module):
    """Cross-attention of hidden states h to remembered tokens x, behind a gate.

        tanh(g) W_o MHA(W_q LN(h), W_k (LN(x) + P), W_v LN(x))

    with a learned number g, zero at first, and codes P of the rows and columns of x.

    Parameters
    ----------
    width
        D, of h and x.
    inner
        Of queries, keys and values: a multiple of `heads`.
    heads
    """

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def remember(self, x: Tensor, codes: Tensor) -> Tensor:
        """Compute keys and values (..., 2, N, inner) of tokens (..., N, D) with codes (N, D) of their places."""
        x = self.ln_kv(x)
        return torch.stack([self.key(x + codes), self.value(x)], dim=-3)

    def forward(self, hidden: Tensor, remembered: Tensor, sees: Tensor | None = None) -> Tensor:
        """Compute what is added to hidden states (..., T, D); `sees` (T, N) bool, None: all see all."""
        keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in remembered.unbind(-3))
        query = self.query(self.ln_q(hidden)).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=sees)
        out: Tensor = torch.tanh(self.gate) * self.out(mixed.transpose(-3, -2).flatten(-2))
        return out


class CrossAttentions(nn.Module):
    """Two gated attentions before every layer of `layers`: for the pooled tokens, and for text.

    Parameters
    ----------
    width
        Of the language model's embeddings; a multiple of 4.
    layers
        Decoder layers (0-based, at least 1) that they stand in front of.
    inner, heads
        As in `GatedAttention`.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(self, width: int, layers: Sequence[int], inner: int, heads: int = 4) -> None:
        super().__init__()
        check_sizes("crosslmm", width=width, inner=inner, heads=heads)
        self.layers = check_layers("crosslmm", "layers", layers, 1)
        if width % 4 or inner % heads:
            raise ConfigError(f"crosslmm: width {width} must be a multiple of 4, and inner {inner} of {heads} heads.")
        self.width = width
        self.visual = nn.ModuleList(GatedAttention(width, inner, heads) for _ in self.layers)
        self.text = nn.ModuleList(GatedAttention(width, inner, heads) for _ in self.layers)

    def remember(self, x: Tensor, coords: Tensor) -> dict[str, Tensor]:
        """Compute keys and values of original tokens (..., N, D) at `coords` (N, 4), for every attention."""
        with torch.autocast(x.device.type, enabled=False):
            x, codes = x.float(), place_codes(coords, self.width)
            kinds: Any = (("visual", self.visual), ("text", self.text))
            return {
                f"{kind} {layer}": attention.remember(x, codes)
                for kind, attentions in kinds
                for layer, attention in zip(self.layers, attentions, strict=True)
            }

    def forward(self, kind: str, layer: int, hidden: Tensor, remembered: Tensor, sees: Tensor | None = None) -> Tensor:
        """Compute what is added to hidden states of a `kind`, "visual" or "text", that enter a layer; in float32."""
        attention = (self.visual if kind == "visual" else self.text)[self.layers.index(layer)]
        with torch.autocast(hidden.device.type, enabled=False):
            out: Tensor = attention(hidden.float(), remembered, sees)
            return out
