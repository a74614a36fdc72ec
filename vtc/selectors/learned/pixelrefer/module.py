"""The modules of PixelRefer-Lite: where an object stands, and what is around it, go into its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .... import kernels
from ....errors import ConfigError
from ..llava_mini.module import Projector

__all__ = ["ObjectEncoder", "grouped", "position_grid"]


def position_grid(grid: tuple[int, int], box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """Compute where each cell of a crop stands in its picture, (h, w, 2): x and y from 0 to 1.

        x_j = (j / w * box width + left) / (W - 1)        and y alike

    Parameters
    ----------
    grid
        h and w, of the crop's features.
    box
        Left, top, right and bottom of the crop, in pixels.
    size
        W and H of the picture.
    """
    (height, width), (left, top, right, bottom) = grid, box
    x = (torch.arange(width, dtype=torch.float64) / width * (right - left) + left) / max(1, size[0] - 1)
    y = (torch.arange(height, dtype=torch.float64) / height * (bottom - top) + top) / max(1, size[1] - 1)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).float()


def grouped(x: Tensor, k: int, iterations: int) -> Tensor:
    """Assign rows (N, D) to at most `k` groups by Lloyd's algorithm: (N,) long, the numbers of the groups.

    It begins with rows that are far from each other (`kernels.farthest_point`), so that nothing is drawn. A group that
    becomes empty keeps its centre.
    """
    with torch.no_grad():
        x = x.float()
        centres = x[kernels.farthest_point(x, k)]
        assign = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for _ in range(iterations):
            assign = (centres.square().sum(dim=1) - 2 * x @ centres.T).argmin(dim=1)
            count = torch.bincount(assign, minlength=k)[:, None]
            sums = torch.zeros_like(centres).index_add(0, assign, x)
            centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return assign


class ObjectEncoder(nn.Module):
    """From the features x of the tokens of an object to its tokens.

        o = mean of x + W (x-coordinate, y-coordinate) over each group of alike tokens
        o = o + MHA(LN(o), box, box);  o = o + MHA(LN(o), picture, picture);  tokens = projector(o)

    with the features of all tokens in the rectangle around the object, and of the whole picture.

    Parameters
    ----------
    source
        "tower": features before the projector; "projected": what the language model would get, and nothing is projected
        behind.
    width
        Of these.
    width_out
        Of the language model's embeddings.
    heads
        Of both attentions.
    iterations
        Of the grouping.
    tokens
        Most tokens of an object.

    Raises
    ------
    ConfigError
        An argument is invalid.
    """

    def __init__(
        self, source: str, width: int, width_out: int, heads: int = 8, iterations: int = 3, tokens: int = 16
    ) -> None:
        super().__init__()
        if source not in ("tower", "projected"):
            raise ConfigError(f'pixelrefer: source must be "tower" or "projected", got {source!r}.')
        sizes = {"width": width, "width_out": width_out, "heads": heads, "iterations": iterations, "tokens": tokens}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"pixelrefer: {name} must be an integer of at least 1, got {value!r}.")
        if width % heads:
            raise ConfigError(f"pixelrefer: a width of {width} is no multiple of {heads} heads.")
        if source == "projected" and width != width_out:
            raise ConfigError(f"pixelrefer: projected features are {width_out} wide, not {width}.")
        self.source, self.iterations, self.tokens = source, iterations, tokens
        self.position = nn.Linear(2, width)
        self.ln_local, self.ln_global = nn.LayerNorm(width), nn.LayerNorm(width)
        self.local = nn.MultiheadAttention(width, heads, batch_first=True)
        self.around = nn.MultiheadAttention(width, heads, batch_first=True)
        self.projector = Projector(width, width_out) if source == "tower" else None

    def place(self, x: Tensor, corners: Tensor) -> Tensor:
        """Add to features (n, D) where they stand, (n, 2)."""
        placed: Tensor = x.float() + self.position(corners.float())
        return placed

    def forward(self, objects: Tensor, box: Tensor, picture: Tensor) -> Tensor:
        """Compute tokens (K, d) of objects (K, D), the features (n, D) of their box and those (N, D) of the picture."""
        with torch.autocast(objects.device.type, enabled=False):
            out, box, picture = objects.float()[None], box.float()[None], picture.float()[None]
            out = out + self.local(self.ln_local(out), box, box, need_weights=False)[0]
            out = out + self.around(self.ln_global(out), picture, picture, need_weights=False)[0]
            return out[0] if self.projector is None else self.projector(out)[0]
