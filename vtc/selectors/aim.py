"""AIM: merge similar tokens before the language model, then prune more of them at every layer inside."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..budget import largest_remainder
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.observations import DecoderAttention, Observation
from ..core.ranges import Float, Int, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Signal, VisionKeys
from ..core.sites import BeforeDecoder, DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..kernels.host import upload
from ..registry import register_selector
from .schedule import at_depth, check_layer, check_number

__all__ = ["AimSelector", "retained"]


@dataclass(frozen=True)
class PageRank(Signal):
    """Stationary importance of every token in one decoder layer, (N,): a random walk along sharpened attention.

    Parameters
    ----------
    temperature, iterations, damping
        As in `kernels.pagerank`.
    """

    name: ClassVar[str] = "pagerank"
    reads: ClassVar[type[Observation]] = DecoderAttention

    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T)."""
        return kernels.pagerank(
            raw.queries,
            raw.keys,
            raw.scaling,
            raw.visibility,
            raw.valid,
            known=raw.key_length,
            temperature=self.temperature,
            iterations=self.iterations,
            damping=self.damping,
        )


@register_selector
@dataclass(frozen=True)
class AimSelector(Selector):
    """Merge down to the budget, then thin out linearly between decoder layers `l1` and `l2`.

    Merging: within every frame (or tile, or image) tokens at even places flow into their most similar neighbour at odd
    places, a half of them per round at most, until the budget is met; a merged token is the plain mean of its parts,
    however many tokens those stand for. The last round may merge a part only.

    Pruning: behind layer l1, l1 + 1, ... the tokens with the most importance stay, measured by a random walk along that
    layer's sharpened attention (`kernels.pagerank`): of the tokens that entered the language model a fraction of
    ``1 - (l - l1 + 1) / (l2 - l1)``, so that none is left from layer l2 on. Dropped tokens are really gone, which the
    released code, that masks them, does not achieve; they also give no weight to others any more. Text, and the newline
    tokens of an image that still has tokens, are never dropped.

    The budget is what merging leaves. ``keep_ratio=1`` keeps everything, without pruning; a `keep_tokens` of more than
    there are leaves pruning alone. Images are merged behind the projector (the released code for LLaVA-1.5 merges
    before it), so that every family is treated alike.

    Parameters
    ----------
    metric
        What similarity is measured on: "features", the tokens themselves; "keys", those of the vision tower; or
        "released", keys for images and features for videos.
    key_layer
        Tower layer (0-based) of the keys; None: the layer that reads the features, or the feature layer if it is the
        last.
    prune
        Whether to prune inside the language model.
    l1, l2
        First layer behind which tokens are pruned, and first layer without any; None: as released, 14 and 22 of 28
        layers, 13 and 21 of 32, and in proportion to 28 for other depths.
    temperature, iterations, damping
        Of the random walk.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", arXiv 2412.03248.
    """

    name: ClassVar[str] = "aim"
    paper: ClassVar[str] = "AIM, arXiv 2412.03248"
    cost: ClassVar[str] = "N^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    metric: str = "released"
    key_layer: int | None = None
    prune: bool = True
    l1: int | None = None
    l2: int | None = None
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the walk's parameters; the schedule follows from the budget."""
        return {"temperature": Float(0.01, 1.0, log=True), "iterations": Int(1, 10), "damping": Float(0.0, 0.3)}

    def __post_init__(self) -> None:
        if self.metric not in ("released", "features", "keys"):
            raise ConfigError(f'aim: metric must be "released", "features" or "keys", got {self.metric!r}.')
        if not isinstance(self.prune, bool):
            raise ConfigError(f"aim: prune must be True or False, got {self.prune!r}.")
        for option in ("key_layer", "l1", "l2"):
            if getattr(self, option) is not None:
                check_layer("aim", option, getattr(self, option))
        if self.l1 is not None and self.l2 is not None and self.l1 >= self.l2:
            raise ConfigError(f"aim: l1 must be less than l2, got l1={self.l1} and l2={self.l2}.")
        check_layer("aim", "iterations", self.iterations)
        check_number("aim", "temperature", self.temperature, 1e-6)
        check_number("aim", "damping", self.damping, 0, 1)

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> AimSelector:
        """Set `l1` and `l2` for a decoder of this depth."""
        if shape is None or (self.l1 is not None and self.l2 is not None):
            return self
        depth = shape.decoder_layers
        released = {28: (14, 22), 32: (13, 21)}
        l1, l2 = released.get(depth, (at_depth(14, 28, depth), at_depth(22, 28, depth)))
        l1 = l1 if self.l1 is None else self.l1
        l2 = max(l2, l1 + 1) if self.l2 is None else self.l2
        return dataclasses.replace(self, l1=l1, l2=l2)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Merge before the language model, and prune behind every layer from `l1` to `l2` - 1."""
        first = Stage(requires=self._keys(shape), action=Action.MERGE)
        if shape is None or keep_ratio == 1 or not self.prune:
            return (first,)
        depth = shape.decoder_layers
        it = self.resolve(shape, keep_ratio)
        l1, l2 = it._schedule()
        walk = PageRank(self.temperature, self.iterations, self.damping)
        if l1 >= depth:
            raise ConfigError(f"aim: l1={l1}, but the decoder has layers 0 to {depth - 1}.")
        inside = (
            Stage(DecoderLayer(layer + 1), (walk,), keep=it.rate(layer) / it.rate(layer - 1))
            for layer in range(l1, min(l2, depth - 1))
        )
        return first, *inside

    def _keys(self, shape: ModelShape | None) -> tuple[Signal, ...]:
        """Require the keys of `key_layer`, if they are the metric."""
        if self.metric == "features":
            return ()
        layer = self.key_layer
        if shape is not None and shape.vision_layers is not None and shape.feature_layer is not None:
            depth = shape.vision_layers
            layer = min(shape.feature_layer + 1, depth - 1) if layer is None else layer
            if layer >= depth:
                raise ConfigError(f"aim: key_layer={layer}, but the tower has layers 0 to {depth - 1}.")
        of = ("image",) if self.metric == "released" else ("image", "video")
        return (VisionKeys(None if layer is None else (layer,), modalities=of),)

    def rate(self, layer: int) -> float:
        """Return the fraction of the tokens at the input of the language model that stays behind `layer`."""
        l1, l2 = self._schedule()
        return 1.0 if layer < l1 else max(0.0, 1 - (layer - l1 + 1) / (l2 - l1))

    def select(self, ctx: VisualContext) -> Selection:
        """Merge before the language model, prune inside."""
        if not isinstance(ctx.site, DecoderLayer):
            return self._merge(ctx)
        entered = ctx.n if ctx.tokens_at_input is None else ctx.tokens_at_input
        count = min(ctx.n, retained(entered, self.rate(ctx.site.layer - 1)))
        return Selection.best(ctx[PageRank].float(), count)

    def _schedule(self) -> tuple[int, int]:
        if self.l1 is None or self.l2 is None:
            raise ConfigError("aim: the schedule depends on the decoder's depth; give l1 and l2, or call resolve().")
        return self.l1, self.l2

    def _merge(self, ctx: VisualContext) -> Selection:
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        by_keys = self.metric == "keys" or (self.metric == "released" and ctx.modality == "image")
        metric = ctx[VisionKeys] if by_keys else ctx.features
        sizes = [h * w for t, h, w in ctx.grids for _ in range(t)]
        shares = largest_remainder(ctx.budget, sizes)
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()[:-1]
        # The token that each token ends up in, itself at first; -1: dropped with a frame that has no share.
        tokens = torch.arange(ctx.n, device=metric.device)
        anchor = tokens.clone()
        weight = torch.ones(ctx.n, device=metric.device)
        for size, share in sorted(set(zip(sizes, shares, strict=True))):
            frames = [start for start, *pair in zip(starts, sizes, shares, strict=True) if pair == [size, share]]
            places = upload(torch.tensor(frames)[:, None] + torch.arange(size), metric.device)
            if share == 0:
                anchor[places], weight[places] = -1, 0.0
            elif share < size:
                into, weight[places] = _shrink(metric[places], share)
                anchor[places] = places.gather(1, into)
        keep = torch.nonzero_static(anchor == tokens, size=ctx.budget)[:, 0]
        assign = torch.searchsorted(keep, anchor).masked_fill(anchor < 0, -1)
        return Selection(ctx.n, keep, assign, weight)


def retained(entered: int, rate: float) -> int:
    """Compute how many of `entered` tokens a rate keeps: truncated, not rounded.

    The released code adds the number of protected tokens before it cuts, which swallows the last bits of the product;
    the small addend does the same.
    """
    return int(entered * rate + 1e-9)


def _shrink(metric: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Merge (B, n, d) down to `target` tokens each: (B, n) token that each one ends up in, and its share of that."""
    batch, n, width = metric.shape
    metric = metric.float()
    anchors = torch.arange(n, device=metric.device).expand(batch, n)
    slot, weight = anchors, torch.ones(batch, n, device=metric.device)
    while (size := anchors.shape[1]) > target:
        # The authors' order, because the next round tells even places from odd ones.
        chosen, step = kernels.bipartite_merge(metric, size - target, order="author")
        left = chosen.shape[1]
        members = torch.zeros(batch, left, device=metric.device).scatter_add(1, step, torch.ones_like(step).float())
        share = 1 / members.gather(1, step)
        rows = step + torch.arange(batch, device=metric.device)[:, None] * left
        merged = kernels.segment_merge(metric.flatten(0, 1), rows.flatten(), batch * left, share.flatten())
        metric = merged.view(batch, left, width)
        weight = weight * share.gather(1, slot)
        slot, anchors = step.gather(1, slot), anchors.gather(1, chosen)
    return anchors.gather(1, slot), weight
