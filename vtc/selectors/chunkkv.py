"""ChunkKV: keep cache entries in chunks of neighbours, so that what belongs together stays together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core.cache_signals import best_chunks
from ..core.eviction import CacheContext, Eviction
from ..errors import ConfigError
from ..plain import shown
from ..registry import register_selector
from .snapkv import SnapKvSelector

__all__ = ["ChunkKvSelector"]


@register_selector
@dataclass(frozen=True)
class ChunkKvSelector(SnapKvSelector):
    """Rank chunks of the prompt by the mean of SnapKV's scores in them, and keep the best whole.

    Scores are summed over heads, so that all heads of a layer keep the same entries. A chunk is `length` places of the
    prompt; a picture's tokens stand in raster order, so that its width makes chunks of rows.

    Differences from the released code: the budget is kept exactly, by leaving out the lowest scores of the last chunk
    that is chosen; and layers do not reuse each other's choice.

    Parameters
    ----------
    scope, budgets, window, kernel, pooling
        As in `SnapKvSelector`.
    length
        Places of a chunk.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", arXiv 2502.00299.
    """

    name: ClassVar[str] = "chunkkv"
    paper: ClassVar[str] = "ChunkKV, arXiv 2502.00299"
    cost: ClassVar[str] = "N d"

    length: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ConfigError(f"chunkkv: length must be an integer of at least 1, got {shown(self.length)}.")

    def evict(self, ctx: CacheContext) -> Eviction:
        """Keep the best chunks."""
        kept = best_chunks(self.score(ctx).sum(dim=0), ctx.places // self.length, min(ctx.budget, ctx.n))
        return Eviction(ctx.n, kept[None])
