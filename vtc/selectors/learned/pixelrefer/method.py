"""PixelRefer: of every picture, only tokens of the region that is asked about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ....core.actions import Action
from ....core.context import VisualContext
from ....core.selection import Selection
from ....core.selector import Selector
from ....core.signals import PreProjector, RegionCells, Signal
from ....core.sites import BeforeDecoder, Site
from ....core.stage import ModelShape, Stage
from ....errors import ConfigError
from ....registry import register_selector
from ..folder import Modules, load_module
from .module import ObjectEncoder, grouped

__all__ = ["PixelReferSelector", "load_encoder"]

_ITERATIONS = 3  # without modules


@register_selector
@dataclass(frozen=True)
class PixelReferSelector(Selector):
    """Replace the tokens of every picture by those of the region that is asked about, alike ones by their mean.

    The region of every picture, a box or a mask, is given with `vtc.regions` around the call; None there is the whole
    picture. Tokens whose cell shows any of it are the object's. If they are more than the budget, k-means makes as many
    groups as the budget of them, and each group becomes one token, their mean; it stands at the place of the member
    that is nearest to it. A small region is fewer tokens than the budget. With ``keep_ratio=1`` nothing is replaced.

    Without modules that is all, and a region that fits into the budget keeps its own tokens as they are. Modules
    (`ObjectEncoder`) have a largest number of tokens of their own; they add where the object stands, and let its tokens
    look at the rectangle around it and at the whole picture, of which nothing else enters the language model. They
    begin as doing nothing, are trained with the model frozen by ``vtc train pixelrefer`` on samples that say their
    region, and run in float32.

    Differences from the paper and its code: the object is cut out of the features of the picture, which the tower sees
    once, where there the tower reads an enlarged crop of it; the features are not enlarged to the pixels of the mask;
    k-means begins with tokens far from each other instead of drawn ones, and empty groups become no token; nothing is
    padded to the budget. Videos, and pictures that are cut into tiles, are refused.

    Parameters
    ----------
    variant
        "lite". The paper's full model gives the language model all tokens of the picture as well, which are then more
        than the prompt has places for: "full" is refused.
    modules
        Folder made by ``vtc train pixelrefer``.

    Raises
    ------
    ConfigError
        The variant is another; the folder cannot be read, or its modules were made for another model.

    References
    ----------
    "PixelRefer: A Unified Framework for Spatio-Temporal Object Referring with Arbitrary Granularity", arXiv 2510.23603;
    the code at alibaba-damo-academy/PixelRefer.
    """

    name: ClassVar[str] = "pixelrefer"
    paper: ClassVar[str] = "PixelRefer, arXiv 2510.23603"
    cost: ClassVar[str] = "N K d"
    inputs: ClassVar[tuple[str, ...]] = ("image",)
    requires: ClassVar[tuple[Signal, ...]] = (RegionCells(),)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)
    adaptive: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    variant: str = "lite"
    modules: str | None = None
    module: ObjectEncoder | None = field(default=None, init=False, repr=False, compare=False)
    made_for: Modules | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.variant == "full":
            raise ConfigError(
                'pixelrefer: variant="full" puts object tokens beside all tokens of the picture, but a prompt has '
                'places for the latter alone; use "lite", which needs no more.'
            )
        if self.variant != "lite":
            raise ConfigError(f'pixelrefer: variant must be "lite", got {self.variant!r}.')
        if self.modules is None:
            return
        if not isinstance(self.modules, str):
            raise ConfigError(f"pixelrefer: modules must be the path of a folder, got {self.modules!r}.")
        made_for, encoder = load_encoder(self.modules)
        object.__setattr__(self, "made_for", made_for)
        object.__setattr__(self, "module", encoder)

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> PixelReferSelector:
        """Check that the modules fit the model."""
        if self.made_for is not None and shape is not None and shape.family is not None:
            self.made_for.check_fit(shape, str(self.modules))
        return self

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Replace once, before the language model."""
        if shape is not None and keep_ratio == 1:
            return ()
        tower = self.module is not None and self.module.source == "tower"
        return (Stage(requires=(RegionCells(), *((PreProjector(),) if tower else ())), action=Action.REPLACE),)

    def select(self, ctx: VisualContext) -> Selection:
        """Compute the tokens of the object, and their places."""
        cells = ctx[RegionCells]
        inside = (cells[:, 0] > 0).nonzero()[:, 0]
        encoder = None if self.module is None else self.module.to(ctx.features.device)
        source = ctx[PreProjector] if encoder is not None and encoder.source == "tower" else ctx.features
        x = source[inside].float()
        if encoder is not None:
            x = encoder.place(x, cells[inside, 1:])
        budget = ctx.budget if encoder is None else min(ctx.budget, encoder.tokens)
        objects, places = self._objects(x, budget, _ITERATIONS if encoder is None else encoder.iterations)
        if encoder is not None:
            objects = encoder(objects, source[self._box(ctx, inside)], source)
        keep, order = inside[places].sort()
        return Selection(ctx.n, keep, features=objects[order])

    def _objects(self, x: Tensor, budget: int, iterations: int) -> tuple[Tensor, Tensor]:
        """Reduce (n, D) to at most `budget` rows (K, D), and say which row each of them stands at, (K,)."""
        if len(x) <= budget:
            return x, torch.arange(len(x), device=x.device)
        assign = grouped(x, budget, iterations).unique(return_inverse=True)[1]
        count = torch.bincount(assign)
        means = x.new_zeros(len(count), x.shape[1]).index_add(0, assign, x) / count[:, None]
        far = (x.detach() - means.detach()[assign]).norm(dim=1)
        by_distance = far.argsort(stable=True)
        first = by_distance[assign[by_distance].argsort(stable=True)]  # group by group, the nearest first
        return means, first[count.cumsum(0) - count]

    def _box(self, ctx: VisualContext, inside: Tensor) -> Tensor:
        """(N,) bool: tokens in the rectangle around those `inside`."""
        place = ctx.coords()[:, 2:]
        low, high = place[inside].amin(dim=0), place[inside].amax(dim=0)
        return ((place >= low) & (place <= high)).all(dim=1)


def load_encoder(folder: str) -> tuple[Modules, ObjectEncoder]:
    """Read the modules of a folder, for one method: no two share a module.

    Raises
    ------
    ConfigError
        It holds none.
    """
    return load_module(folder, PixelReferSelector.name, ObjectEncoder)
