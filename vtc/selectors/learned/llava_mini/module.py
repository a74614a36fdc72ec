"""The modules of LLaVA-Mini: a resampler with C x C queries, and the projector behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ....errors import ConfigError
from .fusion import Fusion

__all__ = ["Compressor", "Projector", "Resampler", "sincos_2d"]


def sincos_2d(width: int, side: int) -> Tensor:
    """Compute positions of a `side` x `side` grid, (side^2, width): half of a vector codes the column, half the row.

    Each half is ``[sin(p w_i), cos(p w_i)]`` with ``w_i = 10000^(-4 i / width)``, i = 0 .. width / 4 - 1.
    """
    place = torch.arange(side, dtype=torch.float64)
    row, column = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    rate = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [axis[:, None] * rate for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


class Resampler(nn.Module):
    """Cross-attention of C^2 learnable queries to the features x of one picture or frame.

        out = MHA(LN(Q) + P_q, LN(x) + P_x, LN(x))

    with fixed positions P_q on the C x C grid and P_x, the same resized to the grid of x (bicubic). There is no
    residual, no norm behind and no MLP. With C = 1, P_x is one vector, so that where a feature stands is not known.

    Parameters
    ----------
    width
        Of the features; a multiple of `heads` and of 4.
    side
        C.
    heads
        Of the attention.

    Raises
    ------
    ConfigError
        The width cannot be divided.
    """

    def __init__(self, width: int, side: int, heads: int = 8) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ConfigError(f"llava-mini: a width of {width} is no multiple of 4 and of {heads} heads.")
        self.side = side
        self.query = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.positions: Tensor
        self.register_buffer("positions", sincos_2d(width, side), persistent=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Reduce features (B, h w, D) of a `grid` of h rows and w columns to (B, C^2, D)."""
        square = self.positions.T.view(1, -1, self.side, self.side)
        places = functional.interpolate(square, grid, mode="bicubic", align_corners=False).flatten(2).mT
        values = self.ln_kv(x)
        query = (self.ln_q(self.query) + self.positions).expand(len(x), -1, -1)
        out: Tensor = self.attn(query, values + places, values, need_weights=False)[0]
        return out


class Projector(nn.Module):
    """Two layers with a GELU between them, as in LLaVA 1.5, whose names of weights it has."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Project (..., D) to (..., d)."""
        out: Tensor = self.linear_2(functional.gelu(self.linear_1(x)))
        return out


class Compressor(nn.Module):
    """A resampler, where it reads the tower the projector, and on request the layers that fuse tokens and text.

    Parameters
    ----------
    source
        "tower": features before the projector; "projected": what the language model would get.
    width
        Of these.
    width_out
        Of the language model's embeddings.
    side, heads
        As in `Resampler`.
    fusion
        Arguments of `Fusion` besides the width; None: the text is not fused with the tokens.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(
        self,
        source: str,
        width: int,
        width_out: int,
        side: int,
        heads: int = 8,
        fusion: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if source not in ("tower", "projected"):
            raise ConfigError(f'llava-mini: source must be "tower" or "projected", got {source!r}.')
        for name, value in (("width", width), ("width_out", width_out), ("side", side), ("heads", heads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"llava-mini: {name} must be an integer of at least 1, got {value!r}.")
        if source == "projected" and width != width_out:
            raise ConfigError(f"llava-mini: projected features are {width_out} wide, not {width}.")
        self.source = source
        self.resampler = Resampler(width, side, heads)
        self.projector = Projector(width, width_out) if source == "tower" else None
        self.fusion = None if fusion is None else Fusion(width_out, **fusion)

    @property
    def side(self) -> int:
        """C."""
        return self.resampler.side

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Compute new tokens (B, C^2, d) of frames (B, h w, D), in float32."""
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.resampler(x.float(), grid)
            return out if self.projector is None else self.projector(out)

    def fuse(self, visual: Tensor, tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Fuse the tokens (B, C^2, d) of frames (B, h w, d) with the text (T, d) of a prompt, in float32.

        Returns
        -------
        tuple of Tensor
            (B, C^2, d) and, of each frame, (B, T, d).
        """
        if self.fusion is None:
            raise ConfigError("llava-mini: these modules have no fusion.")
        with torch.autocast(visual.device.type, enabled=False):
            words = text.float().expand(len(tokens), -1, -1)
            fused: tuple[Tensor, Tensor] = self.fusion(visual.float(), tokens.float(), words)
        return fused
