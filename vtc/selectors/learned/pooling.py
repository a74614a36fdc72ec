"""Methods that pool before the language model, and bring back inside it what pooling has lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.actions import Action
from ...core.context import VisualContext
from ...core.selection import Selection
from ...core.sites import DecoderLayer, Site
from ...core.stage import ModelShape, Stage
from ...core.updating import UpdatingSelector
from ..pool import PoolSelector
from .attention import between_layers
from .trained import TrainedSelector

__all__ = ["PooledUpdatingSelector"]


@dataclass(frozen=True)
class PooledUpdatingSelector(TrainedSelector, UpdatingSelector):
    """Pools as `pool` does; its module has `layers`, on entering which hidden states are updated."""

    sites: ClassVar[tuple[type[Site], ...]] = ()

    def updates(self, shape: ModelShape | None) -> tuple[Stage, ...]:
        """Return the stages inside the decoder; without modules those that they would have by default."""
        depth = 4 if shape is None else shape.decoder_layers
        layers = between_layers(depth, None) if self.module is None else self.module.layers
        return tuple(Stage(DecoderLayer(layer), action=Action.UPDATE) for layer in layers)

    def select(self, ctx: VisualContext) -> Selection:
        """Pool into ``min(ctx.budget, N)`` tokens."""
        if self.module is None:
            raise self.without_modules()
        return PoolSelector().select(ctx)
