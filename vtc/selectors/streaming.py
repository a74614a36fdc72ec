"""StreamingLLM: keep the first and the most recent cache entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.eviction import CacheContext, CacheSelector, DecodingState, Leaving, protect
from ..core.sites import CacheAfterPrefill, CacheWhileDecoding, Site
from ..errors import ConfigError
from ..plain import shown
from ..registry import register_selector

__all__ = ["StreamingSelector"]


@register_selector
@dataclass(frozen=True)
class StreamingSelector(CacheSelector):
    """Keep the first `sinks` entries of the prompt and, of the others, the last: the baseline that looks at nothing.

    At ``at="cache:decoding"`` every further token takes the place of the oldest that is no sink.

    Difference from the paper: keys keep the rotation of their own positions, where the paper counts positions within
    the cache. Only entries of visual tokens leave, unless ``scope="all"``; the first tokens are then mostly text, which
    stays anyway.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`.
    sinks
        How many of the first tokens of the prompt stay.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.
    """

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    cost: ClassVar[str] = "N"
    sites: ClassVar[tuple[type[Site], ...]] = (CacheAfterPrefill, CacheWhileDecoding)

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ConfigError(f"streaming: sinks must be an integer of at least 0, got {shown(self.sinks)}.")

    def leaving(self, state: DecodingState) -> Leaving:
        """Return the oldest entries behind the sinks, as many as there are more than after the prefill."""
        return Leaving(state.excess, min(self.sinks, state.kept - 1))

    def score(self, ctx: CacheContext) -> Tensor:
        """(N,) place in the prompt."""
        return protect(ctx.places.float(), ctx.places < self.sinks)
