"""The pre-fusion of LLaVA-Mini: a few layers of a decoder's shape let the text look at all visual tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import ConfigError

__all__ = ["Fusion"]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.q_proj = nn.Linear(width, heads * head_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_width, bias=bias)
        self.o_proj = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_width)
        query, key, value = (part(x).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        groups = self.heads // self.kv_heads
        query, key = _rotated(query, tables), _rotated(key, tables).repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    """A layer of Llama, under its names of weights."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_width: int, hidden: int, eps: float, bias: bool
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = _Attention(width, heads, kv_heads, head_width, bias)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = _Mlp(width, hidden)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], seen: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables, seen)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Fusion(nn.Module):
    """Layers of a decoder over [visual tokens V, compressed tokens C, text T], causal, at positions 0, 1, ...

        x' = x + W RMSNorm(layers([V; C; T]))        of the rows of C and T; those of V are not used further

    with W zero before training, so that tokens and text then come out as they went in.

    Parameters
    ----------
    width
        Of the tokens.
    layers
        How many.
    heads, kv_heads, head_width
        Of queries, of keys and values, and the width of each.
    hidden
        Width inside the MLP.
    theta, eps, bias
        Base of the rotation, epsilon of the norms, and whether queries, keys and values have biases.

    Raises
    ------
    ConfigError
        A size is no integer of at least 1, or the heads cannot be shared.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        hidden: int,
        theta: float = 10000.0,
        eps: float = 1e-6,
        bias: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_width": head_width, "hidden": hidden}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"llava-mini: {name} of the fusion must be an integer of at least 1, got {value!r}.")
        if heads % kv_heads or head_width % 2:
            raise ConfigError(
                f"llava-mini: {heads} heads of the fusion must be a multiple of the {kv_heads} of keys and values, and "
                f"their width even, got {head_width}."
            )
        self.theta, self.head_width = float(theta), head_width
        sizes_of_layer = (width, heads, kv_heads, head_width, hidden, eps, bias)
        self.layers = nn.ModuleList(_Layer(*sizes_of_layer) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def adopt(self, layers: Sequence[Mapping[str, Tensor]]) -> bool:
        """Begin with the weights of a decoder's first layers, if they are of this shape; tell whether they are."""
        pairs = list(zip(self.layers, layers, strict=False))
        own = [{name: value.shape for name, value in layer.state_dict().items()} for layer, _ in pairs]
        found = [{name: value.shape for name, value in weights.items()} for _, weights in pairs]
        if len(pairs) < len(self.layers) or own != found:
            return False
        for layer, weights in pairs:
            layer.load_state_dict({name: value.detach().float().cpu() for name, value in weights.items()})
        return True

    def forward(
        self,
        visual: Tensor,
        compressed: Tensor,
        text: Tensor,
        positions: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse (B, N, d), (B, K, d) and (B, T, d); return the new (B, K, d) and (B, T, d).

        `positions` (B, T) of the text and `seen` (B, 1, N + K + T, N + K + T) bool are for texts that are packed.
        """
        n, k = visual.shape[1], compressed.shape[1]
        before = torch.cat([visual, compressed, text], dim=1).float()
        place = torch.arange(before.shape[1], device=before.device).expand(len(before), -1)
        if positions is not None:
            place = torch.cat([place[:, : n + k], positions], dim=1)
        rate = self.theta ** (-torch.arange(0, self.head_width, 2, device=place.device).float() / self.head_width)
        angle = (place[..., None] * rate).repeat(1, 1, 2)[:, None]
        hidden, tables = before, (angle.cos(), angle.sin())
        for layer in self.layers:
            hidden = layer(hidden, tables, seen)
        after = before[:, n:] + self.out(self.norm(hidden[:, n:]))
        return after[:, :k], after[:, k:]


def _rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of every head against each other, as Llama does."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
