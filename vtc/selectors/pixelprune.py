"""PixelPrune: blocks of pixels that their neighbours predict never enter the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.context import VisualContext
from ..core.observations import Observation, PatchPixels
from ..core.ranges import Choice, Float, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Origin, Signal
from ..core.sites import Pixels, Site, VisionLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_number

__all__ = ["PixelPruneSelector"]

Distance = Callable[[Tensor, Tensor], Tensor]


def _furthest(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().amax(dim=-1)


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean(dim=-1)


def _rms(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(dim=-1).sqrt()


_DISTANCES: dict[str, Distance] = {"max": _furthest, "mean": _mean, "rms": _rms}


@dataclass(frozen=True)
class BlockPixels(Signal):
    """The pixels of the block that becomes a token, as the tower is given them, (N, P)."""

    name: ClassVar[str] = "block_pixels"
    reads: ClassVar[type[Observation]] = PatchPixels
    axes: ClassVar[tuple[str, ...]] = ("N", "P")
    per_patch: ClassVar[bool] = True

    def compute(self, raw: PatchPixels) -> Tensor:
        """(B, M, P): B crops, or all crops as one where they enter the tower as one sequence."""
        if raw.size is None:
            patches = [crop.flatten(1) for crop in raw.crops]
        else:
            height, width = raw.size
            tiles = (crop.unfold(1, height, height).unfold(2, width, width) for crop in raw.crops)
            patches = [tile.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1) for tile in tiles]
        return torch.cat(patches)[None] if raw.packed else torch.stack(patches)

    def present(self, values: Tensor) -> Tensor:
        """(N, p, P) to (N, p * P)."""
        return values.flatten(1)


@register_selector
@dataclass(frozen=True)
class PixelPruneSelector(Selector):
    """Keep the blocks of pixels that cannot be predicted from the blocks beside them, before the vision tower.

    A block is what becomes one token. With A to its left, B above it and C above A, its prediction is B if C is similar
    to A and not to B, and otherwise A; in the first row it is A, in the first column B. It leaves if it is similar to
    its prediction. Similar are blocks at a distance of at most `tau`. The first block has no prediction and stays, in
    every frame of a video.

    With ``over="time"``, for videos, the prediction is the block at the same place one step of time earlier, and the
    block of a frame that differs most stays if all of them would leave.

    How many stay depends on the picture: plain areas of documents and screens leave, of photographs hardly a block does
    at ``tau=0``. The budget is a ceiling: where more blocks would stay, those furthest from their predictions do. With
    ``keep_ratio=1`` everything stays; a `keep_tokens` of more than there are leaves `tau` alone.

    Where this goes further than the paper: the ceiling; the mode over time; and after a stage that dropped blocks,
    neighbours that left are as if beyond the edge, and over time the last block that is there counts. The released code
    computes the anchored order block by block; here the blocks of an anti-diagonal, which do not depend on each other,
    are computed together.

    Parameters
    ----------
    similarity
        Distance of two blocks: "max", the largest difference of two pixels, "mean", the mean absolute difference, or
        "rms", the root of the mean squared one.
    tau
        Largest distance of similar blocks, in units of the normalised pixels that the tower is given. With 0 only
        repetitions leave, and every one could be put back exactly.
    anchored
        Whether neighbours are taken as they would be put back, so that the error of a block never exceeds `tau`; or as
        they are, so that small steps can add up. None: yes if `tau` is above 0, where it makes a difference.
    over
        "space" or "time". Time needs a tower that takes the frames of a video together (Qwen-VL and its like, where one
        step is two frames); others are shown one frame at a time, of which everything stays.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "PixelPrune", github.com/OPPO-Mente-Lab/PixelPrune at a870e31b: `Pred2DSelector`.
    """

    name: ClassVar[str] = "pixelprune"
    paper: ClassVar[str] = "PixelPrune, github.com/OPPO-Mente-Lab/PixelPrune"
    cost: ClassVar[str] = "pixels"
    requires: ClassVar[tuple[Signal, ...]] = (BlockPixels(), Origin())
    sites: ClassVar[tuple[type[Site], ...]] = (Pixels, VisionLayer)
    reads_features: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    similarity: str = "max"
    tau: float = 0.0
    anchored: bool | None = None
    over: str = "space"

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return the distances, and thresholds up to about a tenth of the range of normalised pixels."""
        return {"similarity": Choice(tuple(_DISTANCES)), "tau": Float(0.0, 0.4)}

    def __post_init__(self) -> None:
        if self.similarity not in _DISTANCES:
            raise ConfigError(f"pixelprune: similarity must be one of {sorted(_DISTANCES)}, got {self.similarity!r}.")
        check_number("pixelprune", "tau", self.tau, 0)
        if self.anchored is not None and not isinstance(self.anchored, bool):
            raise ConfigError(f"pixelprune: anchored must be True, False or None, got {self.anchored!r}.")
        if self.over not in ("space", "time"):
            raise ConfigError(f'pixelprune: over must be "space" or "time", got {self.over!r}.')

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Work once, at the pixels."""
        return (Stage(Pixels(), self.requires),)

    def select(self, ctx: VisualContext) -> Selection:
        """Keep what is not predicted."""
        if ctx.keep_ratio == 1:
            return Selection.full(ctx.n, ctx.features.device)
        pixels, origin = ctx[BlockPixels].float(), ctx[Origin].to(ctx[BlockPixels].device)
        anchored = self.tau > 0 if self.anchored is None else self.anchored
        distance, keep = pixels.new_empty(ctx.n), torch.ones(ctx.n, dtype=torch.bool, device=pixels.device)
        for view in origin[:, 0].unique().tolist():
            here = (origin[:, 0] == view).nonzero()[:, 0]
            _, frame, row, column, rows, columns = origin[here].unbind(dim=1)
            shape = (int(frame.max()) + 1, int(rows[0]), int(columns[0]))
            blocks = pixels.new_zeros(*shape, pixels.shape[1])
            there = torch.zeros(shape, dtype=torch.bool, device=pixels.device)
            blocks[frame, row, column], there[frame, row, column] = pixels[here], True
            predict = over_space if self.over == "space" else over_time
            away, stays = predict(blocks, there, _DISTANCES[self.similarity], self.tau, anchored)
            distance[here], keep[here] = away[frame, row, column], stays[frame, row, column]
        count = min(int(keep.sum()), ctx.budget)
        return Selection.best(distance.masked_fill(~keep, -1.0), count)


def over_space(blocks: Tensor, there: Tensor, distance: Distance, tau: float, anchored: bool) -> tuple[Tensor, Tensor]:
    """Predict every block from those to the left and above.

    Parameters
    ----------
    blocks
        (T, H, W, P) pixels of the blocks of T frames.
    there
        (T, H, W) bool: which of them there are.
    distance, tau, anchored
        As in `PixelPruneSelector`.

    Returns
    -------
    (T, H, W) float32 distance of every block from its prediction, inf where there is none; and (T, H, W) bool: stays.
    """
    _, height, width = there.shape
    value = torch.nn.functional.pad(blocks, (0, 0, 1, 0, 1, 0))  # one row above and one column to the left
    known = torch.nn.functional.pad(there, (1, 0, 1, 0))
    away = blocks.new_full(there.shape, torch.inf)
    for r, c in _waves(height, width, anchored, blocks.device):
        block, left, up, corner = blocks[:, r, c], value[:, r + 1, c], value[:, r, c + 1], value[:, r, c]
        has_left, has_up, has_corner = known[:, r + 1, c], known[:, r, c + 1], known[:, r, c]
        vertical = has_corner & (distance(corner, left) <= tau) & (distance(corner, up) > tau)
        prediction = torch.where((has_up & (~has_left | vertical))[..., None], up, left)
        far = distance(block, prediction).masked_fill(~(has_left | has_up), torch.inf)
        away[:, r, c] = far
        if anchored:
            value[:, r + 1, c + 1] = torch.where((far <= tau)[..., None], prediction, block)
    return away, there & (away > tau)


def over_time(blocks: Tensor, there: Tensor, distance: Distance, tau: float, anchored: bool) -> tuple[Tensor, Tensor]:
    """Predict every block from the one at its place in the frame before; parameters and results as in `over_space`."""
    away, stays = blocks.new_full(there.shape, torch.inf), there.clone()
    value, known = blocks[0].clone(), there[0].clone()
    for t in range(1, len(blocks)):
        far = distance(blocks[t], value).masked_fill(~known, torch.inf)
        stay = there[t] & (far > tau)
        if bool(there[t].any()) and not bool(stay.any()):
            stay.view(-1)[far.masked_fill(~there[t], -1.0).flatten().argmax()] = True
        away[t], stays[t] = far, stay
        taken = stay if anchored else there[t]
        value, known = torch.where(taken[..., None], blocks[t], value), known | there[t]
    return away, stays


def _waves(height: int, width: int, anchored: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows and columns of blocks that can be computed together: anti-diagonals, or everything at once."""
    if not anchored:
        cells = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
        yield cells[:, 0], cells[:, 1]
        return
    for diagonal in range(height + width - 1):
        row = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=device)
        yield row, diagonal - row
