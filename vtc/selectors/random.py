"""Random selection: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.sites import BeforeDecoder, CacheAfterPrefill, DecoderLayer, Pixels, Site, VisionLayer
from ..kernels.host import upload
from ..registry import register_selector

__all__ = ["RandomSelector"]


@register_selector
@dataclass(frozen=True)
class RandomSelector(Selector):
    """Keep K tokens drawn uniformly without replacement.

    The draw happens on the CPU, so the same seed keeps the same tokens on every device.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline; uniform sampling without replacement"
    cost: ClassVar[str] = "N"
    sites: ClassVar[tuple[type[Site], ...]] = (
        Pixels,
        VisionLayer,
        BeforeDecoder,
        DecoderLayer,
        CacheAfterPrefill,
    )
    reads_features: ClassVar[bool] = False

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        drawn = torch.randperm(ctx.n, generator=ctx.generator)[: ctx.budget]
        return Selection.from_indices(ctx.n, upload(drawn, ctx.features.device))
