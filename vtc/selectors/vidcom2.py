"""VidCom2: frames that stand out get more tokens, and in each frame the least typical tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Origin, Signal
from ..errors import ConfigError
from ..kernels.dispatch import queues
from ..registry import register_selector
from .frames import frames_of, lowest_per_group

__all__ = ["VidCom2Selector"]

_BANDWIDTHS = tuple(2.0**power for power in range(-3, 2))
_BLOCK = {False: 2**18, True: 2**24}  # numbers that are looked at at a time: as a cache holds, and on a GPU
_HELD = 2**24  # normalised numbers that are kept for the second look


@register_selector
@dataclass(frozen=True)
class VidCom2Selector(Selector):
    """Keep the tokens least like the mean of the video and of their frame; more of them in frames that stand out.

    Similarity is a sum of Gaussian kernels over the half of the channels that varies least, rows normalised. The
    budget of a frame is the kept fraction of it, raised or lowered by a softmax over how unlike the video its tokens
    are on average, at least one token. The frames' budgets are rounded one by one; the total is then made exact by
    dropping the most or adding the least typical tokens of the whole video, as the variant in vLLM does, so that the
    count is known before the pixels are. A budget below one token per frame is held too.

    Parameters
    ----------
    temperature
        Of the softmax over frames.

    Raises
    ------
    ConfigError
        The temperature is not positive.

    References
    ----------
    "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
    arXiv 2505.14454.
    """

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "VidCom2, arXiv 2505.14454"
    cost: ClassVar[str] = "N d"
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    requires: ClassVar[tuple[Signal, ...]] = (Origin(),)

    temperature: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not self.temperature > 0:
            raise ConfigError(f"vidcom2: temperature must be positive, got {self.temperature!r}.")

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        budget = min(ctx.budget, ctx.n)
        frames = frames_of(ctx)
        frame = frames.number
        to_video, to_frame = typicality(ctx.features, frame, len(frames.sizes))
        scores = to_video + to_frame
        keep = budget / ctx.n if ctx.keep_ratio is None else ctx.keep_ratio
        shares = frame_budgets(to_video, frame, len(frames.sizes), keep, self.temperature)
        chosen = lowest_per_group(scores, frame, shares)
        # Chosen tokens before the others, each by score: cutting this order at the budget drops or adds as it must.
        by_score = torch.argsort(scores, stable=True)
        order = by_score[torch.argsort((~chosen[by_score]).long(), stable=True)]
        return Selection.from_indices(ctx.n, order[:budget])


def typicality(x: Tensor, frame: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Compute the similarity of every token to the mean of the video and to the mean of its frame.

    Tokens are processed in blocks of fixed size to bound memory, which is that of a block and of the frames' means;
    normalised rows of up to `_HELD` numbers are kept between the two looks at them.

    Parameters
    ----------
    x : Tensor (N, D)
    frame : LongTensor (N,)
        0..T-1.
    frames : int
        T.

    Returns
    -------
    Two tensors (N,) float32 in 0..5.
    """
    # In the order of the channels, in which they are gathered much faster.
    quiet = _variance(x).sort(stable=True).indices[: max(1, x.shape[1] // 2)].sort().values
    blocks = list(zip(x.split(_rows(x)), frame.split(_rows(x)), strict=True))
    held: list[Tensor] = []
    sums = x.new_zeros(frames, len(quiet), dtype=torch.float32)
    for block, of in blocks:
        unit = _unit(block, quiet)
        sums.index_add_(0, of, unit)
        if len(x) * len(quiet) <= _HELD:
            held.append(unit)
    count = torch.zeros_like(sums[:, 0]).index_add_(0, frame, torch.ones_like(frame, dtype=torch.float32))
    means, centre = sums / count[:, None], sums.sum(dim=0) / len(x)
    to_video, to_frame = [], []
    for number, (block, of) in enumerate(blocks):
        unit = held[number] if held else _unit(block, quiet)
        to_video.append(_kernel(unit - centre))
        to_frame.append(_kernel(unit.sub_(means.index_select(0, of))))
    return torch.cat(to_video), torch.cat(to_frame)


def _rows(x: Tensor) -> int:
    """Tokens of `x` (N, D) in a block."""
    return max(1, _BLOCK[queues(x)] // x.shape[1])


def _variance(x: Tensor) -> Tensor:
    """(D,) float32: of each channel; 0 of a single token."""
    blocks, none = x.split(_rows(x)), x.new_zeros(x.shape[1], dtype=torch.float32)
    mean = sum((block.sum(dim=0, dtype=torch.float32) for block in blocks), none) / len(x)
    squares = sum(((block - mean).square_().sum(dim=0) for block in blocks), none)
    return squares / max(1, len(x) - 1)


def _unit(x: Tensor, channels: Tensor) -> Tensor:
    """Rows of `x` in these channels, normalised, in float32, in memory of their own."""
    return F.normalize(x.index_select(1, channels).float(), dim=-1)


def _kernel(apart: Tensor) -> Tensor:
    """(N,) sum of the Gaussians of differences (N, C), which are written over."""
    distance = apart.square_().sum(dim=-1)
    return torch.stack([torch.exp(-distance / (2 * alpha)) for alpha in _BANDWIDTHS]).sum(dim=0)


def frame_budgets(to_video: Tensor, frame: Tensor, frames: int, keep: float, temperature: float = 0.01) -> Tensor:
    """(T,) long: tokens per frame before the total is made exact; `keep` is the fraction of the whole."""
    count = torch.zeros(frames, dtype=torch.long, device=frame.device).index_add_(0, frame, torch.ones_like(frame))
    unlike = -to_video.new_zeros(frames).index_add(0, frame, to_video) / count
    excess = torch.softmax((unlike - unlike.max()) / temperature, dim=0)
    scale = (keep * (1 + excess - excess.mean())).clamp(max=1.0)
    return (scale * count).round().long().clamp(min=1).minimum(count)
