"""ToMe: patches merge into similar ones, a few in every layer of the vision tower."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..budget import resolve_budget
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import MeanKeys
from ..core.sites import Site, VisionLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_layer, check_number

__all__ = ["ToMeSelector", "merge_schedule"]


@register_selector
@dataclass(frozen=True)
class ToMeSelector(Selector):
    """Merge patches that are alike, step by step inside the vision tower, until the budget is left.

    On entering each layer from `first_layer` to `last_layer`, every second patch is a source and the others are
    destinations. A source's partner is the destination of the largest cosine between their keys in the layer before,
    averaged over heads, and the sources with the best partners merge into them: a merged patch is the mean of all
    patches in it, and attention counts it as often as it stands for one (the logarithm of its size is added to the
    logits of its key). [CLS] and registers take no part, but count where every second patch begins.

    How many merge per layer follows from the budget: equally many, or by `inflection` more early (negative) or late
    (positive). Where that is more than half of what is left, they merge in several rounds. The paper gives the number
    per layer instead, and cuts it to a half.

    Differences from the released code: patches merge on entering the next layer, not between attention and MLP of this
    one, whose MLP so still runs over all; and they stay in raster order, where the released code puts all destinations
    behind what is left of the sources, so that it alternates over another order from the second step on. Where several
    patches become one token, whole cells merge, patch by patch, by the mean of their keys. No training, so none of the
    paper's results for trained models apply.

    Parameters
    ----------
    inflection
        Slope of the schedule, from -1 to 1: step ``i`` of ``S`` merges a share proportional to
        ``1 - inflection * (1 - 2 i / (S - 1))``. The paper's decreasing schedule is -1.
    first_layer, last_layer
        First and last layer on entering which patches merge; None: the layer whose output is read.

    Raises
    ------
    ConfigError
        An option is invalid, or the tower has no such layer.

    References
    ----------
    "Token Merging: Your ViT But Faster", arXiv 2210.09461, sections 3 and 4.1.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"
    cost: ClassVar[str] = "N^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False

    inflection: float = 0.0
    first_layer: int = 1
    last_layer: int | None = None

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return the range of the schedule's slope."""
        return {"inflection": Float(-1.0, 1.0)}

    def __post_init__(self) -> None:
        check_number(self.name, "inflection", self.inflection, -1, 1)
        check_layer(self.name, "first_layer", self.first_layer, least=1)
        if self.last_layer is not None:
            check_layer(self.name, "last_layer", self.last_layer, least=self.first_layer)

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> ToMeSelector:
        """Set `last_layer` for a tower of this depth."""
        if shape is None or shape.feature_layer is None or self.last_layer is not None:
            return self
        if self.first_layer > shape.feature_layer:
            raise ConfigError(
                f"tome: first_layer={self.first_layer}, but the features come from tower layer {shape.feature_layer}."
            )
        return dataclasses.replace(self, last_layer=shape.feature_layer)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Merge on entering every layer, by the keys of the layer before."""
        it = self.resolve(shape, keep_ratio)
        last = self.first_layer if it.last_layer is None else it.last_layer
        layers = range(self.first_layer, last + 1)
        return tuple(Stage(VisionLayer(k), (MeanKeys((k - 1,)),), action=Action.MERGE) for k in layers)

    def select(self, ctx: VisualContext) -> Selection:
        """Merge down to what the schedule leaves behind this layer; outside of a tower, down to the budget."""
        target = ctx.budget
        if isinstance(ctx.site, VisionLayer) and self.last_layer is not None:
            entered = ctx.n if ctx.tokens_at_input is None else ctx.tokens_at_input
            if ctx.keep_ratio is not None:
                target = resolve_budget(entered, ctx.keep_ratio)
            steps = self.last_layer - self.first_layer + 1
            target = merge_schedule(entered, target, steps, self.inflection)[ctx.site.layer - self.first_layer]
        if target >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        return _merge(ctx[MeanKeys].float(), max(1, target), ctx.structural % 2)


def merge_schedule(entered: int, budget: int, steps: int, inflection: float = 0.0) -> list[int]:
    """Compute how many of `entered` tokens are left behind each of `steps` steps, `budget` of them at last."""
    slopes = [1 - inflection * (1 - 2 * i / (steps - 1)) if steps > 1 else 1.0 for i in range(steps)]
    merged = (entered - budget) / sum(slopes)
    left = [entered - int(merged * sum(slopes[: i + 1]) + 1e-6) for i in range(steps - 1)]
    return [*left, budget]


def _merge(keys: Tensor, target: int, first: int) -> Selection:
    """Merge tokens by their `keys` (N, d) until `target` are left."""
    n = len(keys)
    anchors = slots = torch.arange(n, device=keys.device)
    means = keys
    while len(anchors) > target:
        kept, step = kernels.bipartite_merge(means[None], len(anchors) - target, first=first)
        anchors, slots = anchors[kept[0]], step[0][slots]
        if len(anchors) > target:
            share = torch.bincount(slots).float().reciprocal()[slots]
            means = kernels.segment_merge(keys, slots, len(anchors), share)
    return Selection(n, anchors, slots)
