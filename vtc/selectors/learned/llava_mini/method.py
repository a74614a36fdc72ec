"""LLaVA-Mini: a few new tokens for every picture, made by a trained module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....core.actions import Action
from ....core.context import VisualContext
from ....core.grids import evenly_spread
from ....core.selection import Selection
from ....core.signals import PreProjector, Signal, TextEmbeds
from ....core.sites import BeforeDecoder, Site
from ....core.stage import ModelShape, Stage
from ....errors import InputError
from ....registry import register_selector
from ..trained import TrainedSelector
from .module import Compressor

__all__ = ["LlavaMiniSelector"]


@register_selector
@dataclass(frozen=True)
class LlavaMiniSelector(TrainedSelector):
    """Replace the tokens of every picture by C^2 new ones: learned queries look at the features of the tower.

    Of every frame, and of every tile of a picture that is cut, the features x (h w, D) in front of the projector become

        tokens = projector(MHA(LN(Q) + P_q, LN(x) + P_x, LN(x)))

    with C^2 queries Q and 2-D sine-cosine positions P (`Resampler`). They stand at an evenly spread C x C grid of the
    places that the picture has in the prompt; ``positions="compact"`` closes the gaps, as in the paper, on models
    whose positions are plain numbers. How many there are is trained into the modules: the budget is a ceiling, and
    one below C^2 per frame is refused. A frame of C^2 tokens or fewer stays as it is, and with ``keep_ratio=1`` nothing
    is replaced at all.

    Modules with a fusion also let the question look at what is replaced, before the decoder (`Fusion`): a few layers of
    the decoder's shape read the N projected features, the C^2 tokens and the text of the prompt, and tokens and text
    change. An answer is not fused. Frames, tiles and pictures of a prompt are read one by one, and the text becomes the
    mean. That needs the whole prompt at once.

    The modules are trained, with the model frozen, by ``vtc train llava-mini`` and run in float32, whatever the model
    runs in. Gradients flow to them, not into the tower. In its second stage the paper trains the decoder along; here
    ``--lora`` does that by a low-rank adapter beside the modules.

    Differences from the paper and its code: the layers of the fusion add to the tokens and the text through a matrix
    that is zero before training, where there they replace them, because the decoder itself stays frozen here. The
    projector is a copy that is trained along, so that the model's own stays as it is. On families whose projector is
    not a plain two-layer MLP on single features (all but LLaVA 1.5) the queries look at the projected features, and
    nothing is projected behind them. The tiles of a picture give C^2 tokens each, where the code joins them into one
    grid.

    Parameters
    ----------
    modules
        Folder made by ``vtc train llava-mini``.

    Raises
    ------
    ConfigError
        The folder cannot be read, or there is none when a model is to be compressed; the modules were made for another
        model.
    InputError
        The budget is below what the modules give.

    References
    ----------
    "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token", arXiv 2501.03895; the code at
    ictnlp/LLaVA-Mini.
    """

    name: ClassVar[str] = "llava-mini"
    paper: ClassVar[str] = "LLaVA-Mini, arXiv 2501.03895"
    cost: ClassVar[str] = "N d^2 + N K d"
    requires: ClassVar[tuple[Signal, ...]] = (PreProjector(),)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    adaptive: ClassVar[bool] = True
    module_class: ClassVar[type[nn.Module]] = Compressor

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Replace once, before the language model."""
        if shape is not None and keep_ratio == 1:
            return ()
        projected = self.module is not None and self.module.source == "projected"
        fuses = self.module is not None and self.module.fusion is not None
        requires = (*(() if projected else self.requires), *((TextEmbeds(),) if fuses else ()))
        return (Stage(requires=requires, action=Action.REPLACE),)

    def select(self, ctx: VisualContext) -> Selection:
        """Compute the new tokens, C^2 per frame, and their places."""
        if self.module is None:
            raise self.without_modules()
        if ctx.budget >= ctx.n and ctx.keep_ratio == 1:
            return Selection.full(ctx.n, ctx.features.device)
        compressor = self.module.to(ctx.features.device)
        source = ctx.features if compressor.source == "projected" else ctx[PreProjector]
        side, start = compressor.side, 0
        keep: list[Tensor] = []
        new: list[Tensor] = []
        text: list[Tensor] = []
        for t, h, w in ctx.grids:
            stop = start + t * h * w
            if h * w <= side**2:
                keep.append(torch.arange(start, stop))
                new.append(ctx.features[start:stop].float())
            else:
                grid = (t, side, side) if side <= min(h, w) else None
                places = evenly_spread((t, h, w), grid) if grid else evenly_spread((t, 1, h * w), (t, 1, side**2))
                keep.append(start + places)
                tokens = compressor(source[start:stop].unflatten(0, (t, h * w)), (h, w))
                if compressor.fusion is not None:
                    tokens, words = compressor.fuse(
                        ctx.features[start:stop].unflatten(0, (t, -1)), tokens, ctx[TextEmbeds]
                    )
                    text += words
                new.append(tokens.flatten(0, 1))
            start = stop
        count = sum(map(len, keep))
        if count > ctx.budget:
            frames = sum(t for t, _, _ in ctx.grids)
            raise InputError(
                f"llava-mini: the modules in {self.modules} give {side**2} tokens per frame, {count} for the {frames} "
                f"of this {ctx.modality}, but at most {ctx.budget} may stay; raise the budget or train smaller modules."
            )
        fused = torch.stack(text).mean(dim=0) if text else None
        return Selection(ctx.n, torch.cat(keep).to(ctx.features.device), features=torch.cat(new), text=fused)
