"""Vision Remember: what pooling has lost is brought back between decoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....core.actions import Action
from ....core.context import VisualContext
from ....core.observations import Observation, VisionHidden
from ....core.selection import Selection
from ....core.signals import Signal, VisionSignal
from ....core.stage import ModelShape, Stage
from ....core.updating import HiddenContext
from ....registry import register_selector
from ..pooling import PooledUpdatingSelector
from .module import Resamplers

__all__ = ["VisionLevels", "VisionRememberSelector"]


@dataclass(frozen=True)
class VisionLevels(VisionSignal):
    """Outputs of several layers of the tower, (N, levels, D)."""

    name: ClassVar[str] = "vision_levels"
    reads: ClassVar[type[Observation]] = VisionHidden
    axes: ClassVar[tuple[str, ...]] = ("N", "levels", "D")

    def compute(self, raw: VisionHidden) -> Tensor:
        """(B, M, D) of one layer."""
        return raw.hidden

    def present(self, values: Tensor) -> Tensor:
        """(N, L, D) as it is."""
        return values


@register_selector
@dataclass(frozen=True)
class VisionRememberSelector(PooledUpdatingSelector):
    """Pool the visual tokens; before some decoder layers, each looks at tower features of the cell that it stands for.

    The tokens of a picture are pooled as by `pool`. In front of every few decoder layers the hidden state h_j of the
    pooled token j becomes

        h_j += W_o Attn(h_j, F_j),        F_j = {LN(x_i^(1)) | ... | LN(x_i^(L)) : token i was pooled into j}

    with the outputs x^(l) of L layers of the tower side by side. W_o begins at zero: untrained, this is `pool`, bit for
    bit. Text is not updated, so that decoding costs nothing more. A picture that keeps all of its tokens is not looked
    at again. The report's FLOPs are those of the decoder, without the modules.

    The modules are trained by ``vtc train vision-remember --keep-tokens K`` and run in float32.

    Differences from the paper, of which only the abstract and second-hand descriptions were at hand: the window of a
    token is the cell that was pooled into it; which layers, heads and norms it uses is not known. The later version's
    attention among the visual tokens, in both directions, and its token guided by the text are not here.

    Parameters
    ----------
    modules
        Folder made by ``vtc train vision-remember``.

    Raises
    ------
    ConfigError
        The folder cannot be read, or there is none; the modules were made for another model.

    References
    ----------
    "Vision Remember: Alleviating Visual Forgetting in Efficient MLLM with Vision Feature Resample", arXiv 2506.03928.
    """

    name: ClassVar[str] = "vision-remember"
    paper: ClassVar[str] = "Vision Remember, arXiv 2506.03928"
    cost: ClassVar[str] = "N d^2"
    requires: ClassVar[tuple[Signal, ...]] = (VisionLevels(),)
    module_class: ClassVar[type[nn.Module]] = Resamplers

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Merge before the language model, and update on entering the layers of the modules."""
        if shape is not None and keep_ratio == 1:
            return ()
        requires = self.requires if self.module is None else (VisionLevels(self.module.levels),)
        return (Stage(requires=requires, action=Action.MERGE), *self.updates(shape))

    def remember(self, ctx: VisualContext, selection: Selection) -> Mapping[str, Tensor] | None:
        """Compute keys and values of the tower's features, and note whose cell each belongs to."""
        if selection.k == selection.n:
            return None
        found: dict[str, Tensor] = self.module.to(ctx.features.device).remember(ctx[VisionLevels], ctx.coords())
        return found | {"slots": selection.slots.to(ctx.features.device)}

    def update(self, ctx: HiddenContext) -> Tensor:
        """Let every visual token look at its cell."""
        hidden = ctx.hidden.float()
        added = torch.zeros_like(hidden)
        for number, memory in enumerate(ctx.memories):
            here = (ctx.picture == number).nonzero()[:, 0]
            if not len(here):
                continue
            slots = memory["slots"]
            row = torch.full((int(slots.max()) + 2,), -1, device=slots.device)
            row[ctx.slot[here]] = torch.arange(len(here), device=slots.device)  # the last entry stays -1, for slot -1
            new = self.module(ctx.layer, hidden[here], memory[f"layer {ctx.layer}"], row[slots])
            added = added.index_copy(0, here, new)
        return hidden + added
