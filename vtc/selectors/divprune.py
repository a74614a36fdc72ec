"""DivPrune: the most diverse subset, by farthest-point selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import kernels
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.sites import BeforeDecoder, DecoderLayer, Pixels, Site, VisionLayer
from ..registry import register_selector

__all__ = ["DivPruneSelector"]


@register_selector
@dataclass(frozen=True)
class DivPruneSelector(Selector):
    """Keep the subset whose closest pair is as far apart as a greedy search can make it (max-min diversity).

    The distance is 1 - cosine of the projected features. The first pick is the token farthest from its nearest
    neighbour, each further one the token farthest from everything picked.

    A picked token is never picked again. The released code can do so once only duplicates are left, and then keeps
    fewer tokens than it was asked for.

    References
    ----------
    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    cost: ClassVar[str] = "N^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = (Pixels, VisionLayer, BeforeDecoder, DecoderLayer)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        return Selection.from_indices(ctx.n, kernels.farthest_point(ctx.features, ctx.budget))
