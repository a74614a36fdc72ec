"""VScan: tokens that stand out in their window or in the whole picture, the others merged into them; fewer inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.grids import Grid, grid_coords
from ..core.ranges import Float, Int, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import ClsAttention, ReceivedAttention, Signal, TextAttention, VisionSignal
from ..core.sites import DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..kernels.host import upload
from ..registry import register_selector
from .schedule import at_depth, check_fraction, check_layer

__all__ = ["VScanSelector"]

_SOURCES: dict[str, type[VisionSignal]] = {"cls": ClsAttention, "received": ReceivedAttention}
_SHALLOW = {"cls": (5, 24), "received": (7, 32)}  # CLIP's layer; Qwen2.5-VL's first that attends beyond windows
_ROWS = 4096
"""Tokens per block of cosines, which bounds the memory."""


@register_selector
@dataclass(frozen=True)
class VScanSelector(Selector):
    """Keep what stands out locally and globally, merge the others into it, and keep a part of that inside the decoder.

    Before the language model, half of the budget goes to tokens that an early layer of the vision tower attends to, as
    many from every window of the picture; the other half to those that the last layer attends to most, of the rest.
    Every other token is averaged, with equal weights, into the kept one whose features are most similar by cosine. On
    entering decoder layer `layer`, the tokens that the last token of the prompt attends to stay, `inner` of them.

    `keep_ratio` is what stays before the language model; 1 keeps everything, at both places. Positions keep their gaps.

    Where this differs from the released code: k being half of the budget, every window offers its ``ceil(k / windows)``
    best, of which the best k are taken, as the code for Qwen2.5-VL does (for LLaVA a window has ``k // 16``); where
    windows are too small for that, the best of the rest follow (theirs fails); scores inside the decoder have their
    rotary positions, which the code for Qwen2.5-VL leaves out; tiles and frames have windows of their own, and share
    one budget.

    Parameters
    ----------
    score_source
        "cls": attention of [CLS], as for LLaVA; or "received": attention that a token receives from all, as for
        Qwen2.5-VL, for towers without a [CLS] token. Never chosen silently.
    window
        Edge of a window in tokens; what is left over at the right and lower edges belongs to the last. None: as
        released, 4 by attention received, and a quarter of the edge of the grid (6 of 24) by [CLS].
    local_layer, global_layer
        Tower layers (0-based) whose attention counts; None: layer 5 of 24 by [CLS] and 7 of 32 by attention received,
        in proportion for other depths; and the layer that makes the features.
    layer
        Decoder layer (0-based) on entering which tokens leave; None: the middle, 16 of 32 and 14 of 28.
    inner
        Fraction that stays there; 1 switches it off.

    Raises
    ------
    ConfigError
        An option is invalid, or the model has no such layer.

    References
    ----------
    "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models", arXiv 2505.22654, and
    github.com/Tencent/SelfEvolvingAgent at a82450e1.
    """

    name: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "VScan, arXiv 2505.22654"
    cost: ClassVar[str] = "K N d"
    requires: ClassVar[tuple[Signal, ...]] = (ClsAttention(),)
    sites: ClassVar[tuple[type[Site], ...]] = ()
    instead: ClassVar[Mapping[type[Signal], str]] = {ClsAttention: 'score_source="received"'}

    score_source: str = "cls"
    window: int | None = None
    local_layer: int | None = None
    global_layer: int | None = None
    layer: int | None = None
    inner: float = 1 / 3

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the windows, and of the place and the share inside the decoder."""
        return {"window": Int(2, 8), "layer": Int(max(1, depth // 3), depth - 1), "inner": Float(0.1, 1.0)}

    def __post_init__(self) -> None:
        if self.score_source not in _SOURCES:
            raise ConfigError(f"vscan: score_source must be one of {sorted(_SOURCES)}, got {self.score_source!r}.")
        for option, least in (("window", 1), ("local_layer", 0), ("global_layer", 0), ("layer", 1)):
            if getattr(self, option) is not None:
                check_layer("vscan", option, getattr(self, option), least=least)
        check_fraction("vscan", "inner", self.inner)

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> VScanSelector:
        """Set the layers for this model."""
        if shape is None:
            return self
        settled: dict[str, Any] = {"layer": max(1, shape.decoder_layers // 2) if self.layer is None else self.layer}
        if shape.vision_layers is not None and shape.feature_layer is not None:
            at, of = _SHALLOW[self.score_source]
            local = min(at_depth(at, of, shape.vision_layers), shape.feature_layer)
            settled["local_layer"] = local if self.local_layer is None else self.local_layer
            settled["global_layer"] = shape.feature_layer if self.global_layer is None else self.global_layer
        return dataclasses.replace(self, **settled)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Select and merge before the language model, and drop more on entering `layer`."""
        it = self.resolve(shape, keep_ratio)
        layers = None
        if it.local_layer is not None and it.global_layer is not None:
            layers = (it.local_layer, it.global_layer)
        first = Stage(requires=(_SOURCES[self.score_source](layers),), action=Action.MERGE)
        if shape is None or keep_ratio == 1 or self.inner == 1:
            return (first,)
        return first, Stage(DecoderLayer(it.layer or 1), (TextAttention(),), keep=self.inner)

    def select(self, ctx: VisualContext) -> Selection:
        """Select and merge; inside the decoder only select."""
        if isinstance(ctx.site, DecoderLayer):
            scores = ctx[TextAttention][:, -1].float().mean(dim=0)
            return Selection.best(scores, max(1, ctx.budget))
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        attention = ctx[_SOURCES[self.score_source]].float().mean(dim=1)
        window = 4 if self.window is None and self.score_source == "received" else self.window
        local = best_of_windows(attention[0], windows(ctx.grids, window), ctx.budget // 2)
        rest = attention[-1].index_fill(0, local, -torch.inf)
        keep = torch.cat([local, kernels.topk_indices(rest, ctx.budget - len(local))]).sort().values
        return Selection(ctx.n, keep, nearest(ctx.features, keep))


@lru_cache(maxsize=32)
def windows(grids: tuple[Grid, ...], edge: int | None) -> Tensor:
    """(N,) long, on the host, for reading: number of the window of every token.

    `edge` is that of a window; None: a quarter of the grid's.
    """
    view, frame, row, column = grid_coords(grids).unbind(dim=1)
    sizes = torch.tensor([(h, w) for _, h, w in grids])[view]
    cell: Any = (sizes // 4).clamp(min=1) if edge is None else edge
    across = (sizes // cell).clamp(min=1)
    place = torch.minimum(torch.stack([row, column], dim=1) // cell, across - 1)
    table = torch.stack([view, frame, place[:, 0], place[:, 1]], dim=1)
    return table.unique(dim=0, return_inverse=True)[1]


def best_of_windows(scores: Tensor, window: Tensor, count: int) -> Tensor:
    """Choose the `count` best of the ``ceil(count / windows)`` best of every window, and then of the others.

    Parameters
    ----------
    scores
        (N,)
    window
        (N,) long, on the host: number of the window of every token.

    Returns
    -------
    Tensor (count,) long
    """
    sizes = torch.bincount(window)
    window, starts = upload(window, scores.device), upload(sizes.cumsum(dim=0) - sizes, scores.device)
    by_score = scores.sort(descending=True, stable=True).indices
    order = by_score[window[by_score].sort(stable=True).indices]  # window by window, best first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - starts[window[order]]
    offered = rank < -(-count // len(sizes))
    chosen = by_score[(~offered[by_score]).int().sort(stable=True).indices]  # those offered first, best first
    return chosen[:count]


def nearest(x: Tensor, keep: Tensor) -> Tensor:
    """(N,) long: slot of the kept token that is most similar to each token of (N, D), of a kept token its own."""
    unit = functional.normalize(x.float(), dim=1, eps=1e-12)
    slots = torch.cat([(part @ unit[keep].T).argmax(dim=1) for part in unit.split(_ROWS)])
    return slots.index_copy(0, keep, torch.arange(len(keep), device=keep.device))
