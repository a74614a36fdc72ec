"""A smaller picture: the baseline that saves the vision tower too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import largest_remainder
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.grids import Grid, evenly_spread
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.sites import Pixels, Site
from ..core.stage import ModelShape, Stage
from ..registry import register_selector

__all__ = ["ResizeSelector", "smaller_grid"]


@register_selector
@dataclass(frozen=True)
class ResizeSelector(Selector):
    """Make the picture smaller before the vision tower, so that it yields at most K tokens.

    A picture that yields h x w tokens becomes one that yields

        h' = floor(sqrt(K h / w)),   w' = floor(sqrt(K w / h)),

    each at least 1: the size that the processor of Qwen2-VL (`smart_resize`) gives a picture of this shape when K
    tokens are its limit. A picture so narrow that one side is 1 gets at most K on the other. The K of a video are dealt
    evenly to its steps of time, which stay; of fewer tokens than steps, every token is a whole step and the steps are
    spread evenly.

    The model is given the pixels that the processor made, and they are resampled there (bicubic, antialiased, in
    float32); the tower then gives exactly what it gives for the smaller picture. Two differences from a processor that
    makes the smaller picture itself: it would resample the original once, not twice, and round the pixels to 8 bits.

    The prompt has N placeholders for the picture, and the h' x w' tokens take an evenly spread grid of them: rows
    ``floor((i + 1/2) h / h')``, columns and steps of time alike. Each has the position of its placeholder, so that the
    picture reaches as far as before. ``positions="compact"`` gives them those of a smaller picture instead, rows 0 to
    h' - 1 and columns 0 to w' - 1, with the text behind them moved up: to rounding, the model then says what it says of
    a prompt that was made with the smaller picture.

    It works on towers that take pictures of any size (Qwen-VL and GLM-V). On others use `pool`.

    References
    ----------
    transformers, `smart_resize` of Qwen2-VL's image processor.
    """

    name: ClassVar[str] = "resize"
    paper: ClassVar[str] = "baseline; a smaller picture"
    cost: ClassVar[str] = "pixels"
    sites: ClassVar[tuple[type[Site], ...]] = (Pixels,)
    reads_features: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Resample once, at the pixels."""
        return (Stage(Pixels(), action=Action.RESAMPLE),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose the placeholders that the tokens of the smaller picture take: at most `ctx.budget`."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        sizes = [math.prod(grid) for grid in ctx.grids]
        parts, start = [], 0
        for grid, size, share in zip(ctx.grids, sizes, largest_remainder(ctx.budget, sizes), strict=True):
            if share:
                parts.append(start + evenly_spread(grid, smaller_grid(grid, share)))
            start += size
        return Selection(ctx.n, torch.cat(parts).to(ctx.features.device))


def smaller_grid(grid: Grid, budget: int) -> Grid:
    """Compute the (t, rows, columns) of at most `budget` tokens that a picture or video of `grid` gets."""
    t, h, w = grid
    steps = min(t, budget)
    tokens = min(budget // steps, h * w)
    rows = min(max(1, math.isqrt(tokens * h // w)), tokens)
    columns = min(max(1, math.isqrt(tokens * w // h)), tokens // rows)
    return steps, rows, columns
