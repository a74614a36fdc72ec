"""The modules of Vision Remember: before some decoder layers, every token attends to tower features of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import ConfigError
from ..attention import check_layers, check_sizes, place_codes

__all__ = ["LocalAttention", "Resamplers"]


class LocalAttention(nn.Module):
    """Cross-attention of the hidden state h of every token to those features x that are its own.

        W_o MHA(W_q LN(h), W_k (x + P), W_v x),        W_o zero at first

    with codes P of the rows and columns of x.

    Parameters
    ----------
    width
        D, of h.
    width_kv
        D', of x; a multiple of 4.
    inner
        Of queries, keys and values: a multiple of `heads`.
    heads
    """

    def __init__(self, width: int, width_kv: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_q = nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.key, self.value = (nn.Linear(width_kv, inner, bias=False) for _ in range(2))
        nn.init.zeros_(self.out.weight)

    def remember(self, x: Tensor, codes: Tensor) -> Tensor:
        """Compute keys and values (2, N, inner) of features (N, D') with codes (N, D') of their places."""
        return torch.stack([self.key(x + codes), self.value(x)])

    def forward(self, hidden: Tensor, remembered: Tensor, owner: Tensor) -> Tensor:
        """Compute what is added to hidden states (T, D), where `owner` (N,) long says who looks at each feature.

        Features that nobody owns (-1) are left out. Every token owns some.
        """
        mine = owner >= 0
        owner, remembered = owner[mine], remembered[:, mine]
        keys, values = (part.unflatten(-1, (self.heads, -1)) for part in remembered)  # (N, heads, d)
        query = self.query(self.ln_q(hidden)).unflatten(-1, (self.heads, -1))
        scores = (query[owner] * keys).sum(dim=-1) * keys.shape[-1] ** -0.5
        index = owner[:, None].expand_as(scores)
        largest = scores.new_full((len(hidden), self.heads), -torch.inf).scatter_reduce(
            0, index, scores.detach(), "amax"
        )
        share = (scores - largest[owner]).exp()
        total = torch.zeros_like(largest).index_add(0, owner, share)
        mixed = torch.zeros_like(query).index_add(0, owner, (share / total[owner])[..., None] * values)
        out: Tensor = self.out(mixed.flatten(1))
        return out


class Resamplers(nn.Module):
    """One local attention before every layer of `layers`, to features of several `levels` of the tower side by side.

    Parameters
    ----------
    width
        Of the language model's embeddings.
    vision_width
        Of the hidden states of the tower.
    levels
        Layers of the tower (0-based).
    layers
        Decoder layers (0-based, at least 1) that they stand in front of.
    inner, heads
        As in `LocalAttention`.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(
        self, width: int, vision_width: int, levels: Sequence[int], layers: Sequence[int], inner: int, heads: int = 4
    ) -> None:
        super().__init__()
        check_sizes("vision-remember", width=width, vision_width=vision_width, inner=inner, heads=heads)
        self.layers = check_layers("vision-remember", "layers", layers, 1)
        self.levels = check_layers("vision-remember", "levels", levels, 0)
        self.width_kv = vision_width * len(self.levels)
        if self.width_kv % 4 or inner % heads:
            raise ConfigError(
                f"vision-remember: {self.width_kv} features must be a multiple of 4, inner {inner} of {heads} heads."
            )
        self.norms = nn.ModuleList(nn.LayerNorm(vision_width) for _ in self.levels)
        self.attentions = nn.ModuleList(LocalAttention(width, self.width_kv, inner, heads) for _ in self.layers)

    def remember(self, x: Tensor, coords: Tensor) -> dict[str, Tensor]:
        """Compute keys and values of features (N, levels, vision_width) at `coords` (N, 4), for every layer."""
        with torch.autocast(x.device.type, enabled=False):
            levels = zip(self.norms, x.float().unbind(1), strict=True)
            features = torch.cat([norm(level) for norm, level in levels], dim=-1)
            codes = place_codes(coords, self.width_kv)
            pairs: Any = zip(self.layers, self.attentions, strict=True)
            return {f"layer {layer}": attention.remember(features, codes) for layer, attention in pairs}

    def forward(self, layer: int, hidden: Tensor, remembered: Tensor, owner: Tensor) -> Tensor:
        """Compute what is added to hidden states (T, D) that enter a layer, as in `LocalAttention`; in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            attention = self.attentions[self.layers.index(layer)]
            out: Tensor = attention(hidden.float(), remembered, owner)
            return out
