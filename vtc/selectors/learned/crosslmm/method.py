"""CrossLMM: few visual tokens in the sequence, all of them within reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....core.actions import Action
from ....core.context import VisualContext
from ....core.selection import Selection
from ....core.stage import ModelShape, Stage
from ....core.updating import HiddenContext
from ....registry import register_selector
from ..pooling import PooledUpdatingSelector
from .module import CrossAttentions

__all__ = ["CrossLmmSelector"]


@register_selector
@dataclass(frozen=True)
class CrossLmmSelector(PooledUpdatingSelector):
    """Pool the visual tokens; before some decoder layers, pooled tokens and text look at the original ones.

    The tokens of a picture are pooled as by `pool`. The sequence, and the key-value caches, hold the pooled tokens V'
    and the text T' alone. In front of every few decoder layers

        V' += tanh(g_v) Attn(V', V0),        T' += tanh(g_t) Attn'(T', V0)

    with the original tokens V0 as the language model would have got them, trained matrices of their own for both, and
    gates g that begin at zero: untrained, this is `pool`, bit for bit. V' and T' are updated at once. Text that is
    generated looks, too. A token looks at pictures that begin in front of it, or that it belongs to; other tokens of
    the prompt it does not see here.

    Keys and values of V0 are computed once per picture and kept beside the cache: 2 N inner numbers of float32 for each
    of the two attentions of a layer. A picture that keeps all of its tokens is not looked at again. The report's FLOPs
    are those of the decoder, without the modules.

    The modules are trained by ``vtc train crosslmm --keep-tokens K`` and run in float32.

    Differences from the paper, of which no code was found: its attentions follow the self-attention of a layer, here
    they stand in front of the layer. It says nothing of norms, heads and positions; here LayerNorms stand before both
    sides, and the keys know the rows and columns of their tokens. It pools bilinearly, and all frames of a video to
    equally many tokens; here cells are averaged.

    Parameters
    ----------
    modules
        Folder made by ``vtc train crosslmm``.

    Raises
    ------
    ConfigError
        The folder cannot be read, or there is none; the modules were made for another model.

    References
    ----------
    "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms", arXiv 2505.17020.
    """

    name: ClassVar[str] = "crosslmm"
    paper: ClassVar[str] = "CrossLMM, arXiv 2505.17020"
    cost: ClassVar[str] = "N d^2 + N (K + T) d"
    module_class: ClassVar[type[nn.Module]] = CrossAttentions

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Merge before the language model, and update on entering the layers of the modules."""
        if shape is not None and keep_ratio == 1:
            return ()
        return (Stage(action=Action.MERGE), *self.updates(shape))

    def remember(self, ctx: VisualContext, selection: Selection) -> Mapping[str, Tensor] | None:
        """Compute keys and values of the original tokens."""
        if selection.k == selection.n:
            return None
        found: dict[str, Tensor] = self.module.to(ctx.features.device).remember(ctx.features, ctx.coords())
        return found

    def update(self, ctx: HiddenContext) -> Tensor:
        """Let visual tokens and text look at the pictures that they see."""
        hidden = ctx.hidden.float()
        added = torch.zeros_like(hidden)
        for kind, rows in (("visual", ctx.picture >= 0), ("text", ctx.text)):
            here = (rows & ctx.sees.any(dim=1)).nonzero()[:, 0]
            if not len(here):
                continue
            parts = [memory[f"{kind} {ctx.layer}"] for memory in ctx.memories]
            owner = torch.cat([torch.full((part.shape[-2],), m, device=here.device) for m, part in enumerate(parts)])
            sees = None if len(parts) == 1 else ctx.sees[here][:, owner]
            new = self.module(kind, ctx.layer, hidden[here], torch.cat(parts, dim=-2), sees)
            added = added.index_copy(0, here, new)
        return hidden + added
