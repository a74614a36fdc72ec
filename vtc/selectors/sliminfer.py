"""SlimInfer: blocks of visual tokens leave at several decoder layers, by what the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core.cache_signals import WindowAttention, best_chunks
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Signal
from ..core.sites import DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..plain import shown
from ..registry import register_selector

__all__ = ["SlimInferSelector"]


@register_selector
@dataclass(frozen=True)
class SlimInferSelector(Selector):
    """Drop blocks of visual tokens on entering the decoder layers at a third, half and two thirds of the depth.

    A block is `block` tokens that still stand side by side. Its score is the largest attention that one of them gets
    from the last `window` tokens of the prompt in the layer before, averaged over heads. Every stage keeps the same
    fraction of the tokens that reach it, so that ``keep_ratio`` of them pass the last. Later layers have spread what
    the dropped tokens hold, which is why they may go.

    The paper prunes so, but its scores, layers and counts were not available: these are this library's own. Its
    offloaded caches, fetched block by block, are not part of this.

    Parameters
    ----------
    block
        Tokens of a block.
    window
        How many of the last tokens of the prompt ask.

    Raises
    ------
    ConfigError
        An option is invalid, or the decoder has too few layers.

    References
    ----------
    "SlimInfer: Accelerating Long-Context LLM Inference via Dynamic Token Pruning", arXiv 2508.06447.
    """

    name: ClassVar[str] = "sliminfer"
    paper: ClassVar[str] = "after SlimInfer, arXiv 2508.06447"
    cost: ClassVar[str] = "N d"
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False

    block: int = 16
    window: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ConfigError(f"sliminfer: block must be an integer of at least 1, got {shown(self.block)}.")
        self._signal()

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """On entering three layers; with a number of tokens to keep, on entering each of them."""
        depth = 32 if shape is None else shape.decoder_layers
        layers: list[int] = []
        for part in (1 / 3, 1 / 2, 2 / 3):
            layers.append(max(layers[-1] + 1 if layers else 1, round(depth * part)))
        if layers[-1] >= depth:
            raise ConfigError(f"sliminfer works on entering three layers behind the first; this decoder has {depth}.")
        each = None if keep_ratio is None else keep_ratio ** (1 / len(layers))
        signals: tuple[Signal, ...] = (self._signal(),)
        return tuple(Stage(DecoderLayer(layer), requires=signals, keep=each) for layer in layers)

    def select(self, ctx: VisualContext) -> Selection:
        """Keep the best blocks."""
        scores = ctx[WindowAttention].float().mean(dim=0)
        blocks = torch.arange(ctx.n, device=scores.device) // self.block
        return Selection(ctx.n, best_chunks(scores, blocks, min(ctx.budget, ctx.n), "amax"))

    def _signal(self) -> WindowAttention:
        return WindowAttention(self.window, kernel=1)
