"""FlowCut: patches leave between the layers of the vision tower, as fast as the attention of [CLS] is concentrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.observations import Observation, VisionAttention
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Origin, Signal, VisionSignal
from ..core.sites import BeforeDecoder, Site, VisionLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_layer

__all__ = ["FlowCutSelector"]


@dataclass(frozen=True)
class InformationFlow(VisionSignal):
    """Share of the attention of [CLS] that every token gets, and its score, in each layer, (layers, 2, N).

    Both were normalised over the patches that were there in the layer. Without `layers` all that have run are read.
    """

    name: ClassVar[str] = "information_flow"
    reads: ClassVar[type[Observation]] = VisionAttention
    axes: ClassVar[tuple[str, ...]] = ("layers", "2", "N")
    needs_cls: ClassVar[bool] = True

    def vision_layers(self, depth: int, feature_layer: int) -> tuple[int, ...]:
        """Return `layers` from the front, or all up to `feature_layer`."""
        return tuple(range(feature_layer + 1)) if self.layers is None else super().vision_layers(depth, feature_layer)

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M, 2)."""
        raw = raw.biased()
        there = _there(raw)
        mask = None if raw.mask is None else raw.mask[:, :, :1]
        attention = kernels.attention_rows(raw.queries[:, :, :1], raw.keys, raw.scaling, mask, reduce="mean")[:, 0]
        return flow(attention, raw.values.float()[:, :, :1], raw.values, there, raw.prefix)

    def present(self, values: Tensor) -> Tensor:
        """(N, L, 2) to (L, 2, N)."""
        return values.permute(1, 2, 0)


@dataclass(frozen=True)
class ReceivedFlow(InformationFlow):
    """`InformationFlow` where there is no [CLS]: attention received from all, and likeness to the mean value.

    Shares are relative to the mean of the sequence (image, frame or window) in which a patch attends.
    """

    name: ClassVar[str] = "received_flow"
    needs_cls: ClassVar[bool] = False

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M, 2)."""
        parts = []
        for one in raw.biased().sequences():
            there = _there(one)
            received = kernels.attention_received(one.queries, one.keys, one.scaling, one.mask).mean(dim=1)
            weight = (there / there.sum(dim=1, keepdim=True))[:, None, None]
            patches = there.clone()
            patches[:, : one.prefix] = False
            count = patches.sum(dim=1)[:, None, None]
            parts.append(count * flow(received, weight @ one.values.float(), one.values, there, one.prefix))
        return torch.cat(parts, dim=1)


def _there(raw: VisionAttention) -> Tensor:
    """(B, M) bool: tokens that some query attends to, and so are no padding."""
    batch, _, length, _ = raw.keys.shape
    if raw.mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=raw.keys.device)
    return raw.mask.any(dim=2)[:, 0].expand(batch, -1)


def flow(attention: Tensor, pooled: Tensor, values: Tensor, there: Tensor, prefix: int) -> Tensor:
    """Compute shares of attention and scores of one layer.

    Parameters
    ----------
    attention
        (B, M) attention that every token gets, averaged over heads.
    pooled
        (B, H, 1, d) float32: value vector of [CLS], or what stands for it.
    values
        (B, H, M, d).
    there
        (B, M) bool: tokens that are no padding.
    prefix
        Leading tokens that are no patches.

    Returns
    -------
    Tensor (B, M, 2), float32
        0 for what is no patch.
    """
    values = values.float()
    logits = (pooled @ values.transpose(2, 3))[:, :, 0].masked_fill(~there[:, None], -torch.inf)
    semantic = logits.softmax(dim=-1).mean(dim=1)
    strength = values.mean(dim=1).abs().sum(dim=-1)
    patches = there.clone()
    patches[:, :prefix] = False
    share = _shares(attention, patches)
    return torch.stack([share, (share + _shares(semantic, patches)) * strength * patches], dim=-1)


def _shares(x: Tensor, patches: Tensor) -> Tensor:
    x = x * patches
    total = x.sum(dim=1, keepdim=True)
    count = patches.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, x / total.clamp(min=torch.finfo(x.dtype).tiny), patches / count)


def accumulated(scores: Tensor) -> Tensor:
    """(N,): half of every layer's score and half of what there was before it, of scores (layers, N)."""
    total = scores[0]
    for score in scores[1:]:
        total = 0.5 * total + 0.5 * score
    return total


def dropped(share: Tensor, target: int, remaining: int) -> int:
    """Count the tokens that leave behind a layer.

    With H the entropy of the shares (n,), it is ``round((n - target) / sqrt(remaining) * (1 - (H / ln n) ** 2))``, and
    all above the target if no layer remains.
    """
    n = len(share)
    if n <= target:
        return 0
    if not remaining:
        return n - target
    p = share.double() / share.double().sum().clamp(min=1e-300)
    entropy = float(-torch.xlogy(p, p).sum())
    spread = min(1.0, entropy / math.log(n)) if n > 1 else 1.0
    return min(n - target, round((n - target) / math.sqrt(remaining) * (1 - spread**2)))


_SOURCES: dict[str, type[InformationFlow]] = {"cls": InformationFlow, "received": ReceivedFlow}


@register_selector
@dataclass(frozen=True)
class FlowCutSelector(Selector):
    """Drop what information flows to least, behind every other layer of the vision tower.

    In a layer, with a the attention of [CLS] averaged over heads, s the softmax over all tokens of the products of
    their values with the value of [CLS], averaged over heads, and v the value averaged over heads, the score of a patch
    is ``(a / sum a + s / sum s) * |v|_1``. From layer to layer half of it and half of what was there before add up.
    Behind every second layer ``(n - T) / sqrt(layers that remain) * (1 - (H / ln n) ** 2)`` of n patches leave, H being
    the entropy of a / sum a: many where [CLS] looks at few. Behind the layer that makes the features the T best stay, T
    being the budget.

    Differences from the released code: the number that leaves is that of the picture itself, not the largest of the
    batch, so that an answer does not depend on what else is in the batch; tiles are not cut a second time inside the
    language model but, together, behind the tower; sums run in float32. Where several patches become one token,
    n counts tokens, and their values are averaged. T is the budget itself, without the [CLS] token that theirs counts.

    Parameters
    ----------
    layers
        Tower layers (0-based) behind which patches leave, the last of which leaves T; None: the one that makes the
        features and every second before it.
    score_source
        "cls", the method; or "received", a stand-in for towers without a [CLS] token: a is the attention that a patch
        receives, s compares with the mean value, and shares are relative to the mean of the image, frame or window
        within which a layer attends. Never chosen silently.

    Raises
    ------
    ConfigError
        An option is invalid, or the tower has no such layers.

    References
    ----------
    "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536, and
    github.com/TungChintao/FlowCut at a2ecd247.
    """

    name: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = "FlowCut, arXiv 2505.19536"
    cost: ClassVar[str] = "N d"
    requires: ClassVar[tuple[Signal, ...]] = (InformationFlow(), Origin())
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False
    instead: ClassVar[Mapping[type[Signal], str]] = {InformationFlow: 'score_source="received"'}

    layers: tuple[int, ...] | None = None
    score_source: str = "cls"

    def __post_init__(self) -> None:
        if self.score_source not in _SOURCES:
            raise ConfigError(f"flowcut: score_source must be one of {sorted(_SOURCES)}, got {self.score_source!r}.")
        if self.layers is not None:
            if not isinstance(self.layers, (list, tuple)):
                raise ConfigError(f"flowcut: layers must be tower layers, got {self.layers!r}.")
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                check_layer("flowcut", "layers", layer)
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ConfigError(f"flowcut: layers must be ascending tower layers, got {self.layers}.")

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> FlowCutSelector:
        """Set `layers` for this tower."""
        if shape is None or shape.feature_layer is None:
            return self
        last = shape.feature_layer
        layers = tuple(range(last % 2, last + 1, 2)) if self.layers is None else self.layers
        if layers[-1] > last:
            raise ConfigError(f"flowcut: layers={layers}, but the features come from tower layer {last}.")
        return dataclasses.replace(self, layers=layers)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Drop patches behind each of `layers`, and without a model once, before the language model."""
        signal = _SOURCES[self.score_source]()
        if shape is None or shape.feature_layer is None:
            return (Stage(requires=(signal, Origin())),)
        if keep_ratio == 1:
            return ()
        layers = self.resolve(shape, keep_ratio).layers or ()
        inside = (Stage(VisionLayer(layer + 1), (signal,)) for layer in layers if layer < shape.feature_layer)
        last = (Stage(requires=(signal, Origin())),) if layers[-1] == shape.feature_layer else ()
        return *inside, *last

    def select(self, ctx: VisualContext) -> Selection:
        """Keep what the rule leaves of these tokens."""
        values = ctx[_SOURCES[self.score_source]].float()
        target, remaining = self._target(ctx), 0
        if isinstance(ctx.site, VisionLayer) and self.layers is not None:
            remaining = self.layers[-1] + 1 - ctx.site.layer
        count = ctx.n - dropped(values[-1, 0], target, remaining)
        return Selection.best(accumulated(values[:, 1]), count)

    def _target(self, ctx: VisualContext) -> int:
        """Tokens that are to be left in the end."""
        if ctx.keep_ratio is None:
            return min(ctx.budget, ctx.n)
        before = ctx.tokens_at_input or ctx.n
        if isinstance(ctx.site, BeforeDecoder):  # every view and frame has tokens left
            origin = ctx[Origin]
            views = torch.cat([origin[:, :2], origin[:, 4:]], dim=1).unique(dim=0)
            before = int((views[:, 2] * views[:, 3]).sum())
        return min(ctx.n, max(1, round(ctx.keep_ratio * before)))
