"""HiPrune: what the middle of the vision tower attends to with its neighbours, then what its end attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.signals import Origin, ReceivedAttention, Signal
from ..core.sites import BeforeDecoder, DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import at_depth, check_fraction, check_layer
from .text_relevance import TextRelevance

__all__ = ["HiPruneSelector"]

_RELEASED = {24: 8, 32: 15}  # depth of the tower to its object layer: LLaVA's, Qwen2.5-VL's


@register_selector
@dataclass(frozen=True)
class HiPruneSelector(TextRelevance):
    """Keep anchors, which the middle of the tower attends to, with their neighbours, and registers, which its end does.

    Scores are the attention that a token receives, averaged over heads and queries. Anchors are the
    ``round(K * alpha / 5)`` tokens with the best score in the object layer, in the middle of the tower; the tokens
    above, below, left and right of them stay too. Registers, the rest of the budget, are those of the others with the
    best score in the layer that makes the features.

    With `text` it is HiPrune++: ``round(K * text)`` of the tokens that are left after the anchors, those most similar
    to the text, stay before the registers. No more than that, and about a tenth, is taken from the paper: similarity to
    the text is here the mean cosine of a token's features to the input embeddings of the prompt's text, as in
    `cdpruner`.

    Three differences from the released code. It takes neighbours by their index, so that left and right of the edge of
    a row lie tokens of other rows; ``variant="released"`` does the same. The tiles of a picture are chosen from
    together, not each with its part of the budget. And where anchors and neighbours are more than the budget, which
    takes an `alpha` near 1, those of the best anchors stay.

    Parameters
    ----------
    alpha
        Fraction of the budget for anchors and neighbours.
    object_layer
        Layer of the tower (0-based) that anchors are found in; None: as released, 8 of 24 layers and 15 of 32, and in
        proportion to 24 for other depths.
    text
        Fraction of the budget for what resembles the text: 0.1 is HiPrune++, 0 reads no text.
    variant
        "paper": neighbours in the picture; "released": neighbours by index, within the first and the last token.
    similarity, relevance
        As in `cdpruner`; without effect unless there is `text`.

    Raises
    ------
    ConfigError
        An option is invalid, or the object layer is behind the one that makes the features.

    References
    ----------
    "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    arXiv 2508.00553.
    """

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune, arXiv 2508.00553"
    cost: ClassVar[str] = "N^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder, DecoderLayer)
    reads_features: ClassVar[bool] = False

    alpha: float = 0.1
    object_layer: int | None = None
    variant: str = "paper"
    text: float = 0.0

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """The fraction for anchors and neighbours."""
        return {"alpha": Float(0.0, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("hiprune", "alpha", self.alpha)
        check_fraction("hiprune", "text", self.text)
        if self.object_layer is not None:
            check_layer("hiprune", "object_layer", self.object_layer)
        if self.variant not in ("paper", "released"):
            raise ConfigError(f'hiprune: variant must be "paper" or "released", got {self.variant!r}.')
        if not self.text and (self.relevance is not None or self.similarity != "direct"):
            raise ConfigError("hiprune: relevance and similarity have no effect without text.")

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model, with the attention received in both layers."""
        layers: tuple[int, ...] | None = None
        if shape is not None and shape.vision_layers is not None and shape.feature_layer is not None:
            depth, last = shape.vision_layers, shape.feature_layer
            first = _RELEASED.get(depth, max(0, at_depth(9, 24, depth) - 1))
            first = min(first, last) if self.object_layer is None else self.object_layer
            if first > last:
                raise ConfigError(f"hiprune: object_layer={first}, but layer {last} of the tower makes the features.")
            layers = (first, last) if first < last else (last,)
        signals: tuple[Signal, ...] = (ReceivedAttention(layers), Origin())
        return (Stage(requires=(*signals, *self.text_signals()) if self.text else signals),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        scores = ctx[ReceivedAttention].float().mean(dim=1)
        middle, end = scores[0], scores[-1]
        anchors = middle.sort(descending=True, stable=True).indices[: round(ctx.budget * self.alpha / 5)]
        find = _by_index if self.variant == "released" else _in_picture
        found = torch.cat([anchors[:, None], find(anchors, ctx[Origin])], dim=1).flatten()
        # Anchors and neighbours in the order in which they come, each once; how many these are is not asked.
        at = torch.arange(len(found), device=found.device)
        like = round(ctx.budget * self.text)
        # Behind the last token stands what is none.
        none = len(found) + like
        seen = torch.full((ctx.n + 1,), none, device=found.device)
        first = seen.scatter_reduce_(0, torch.where(found < 0, ctx.n, found), at, reduce="amin")[: ctx.n]
        if self.text:
            relevance = self.relevance_of(ctx).masked_fill(first < len(found), -torch.inf)
            best = relevance.sort(descending=True, stable=True).indices[:like]
            behind = torch.arange(len(best), device=best.device) + len(found)
            first = first.index_put_((best,), torch.minimum(first[best], behind))
        stays = first < none
        if none > ctx.budget:
            stays &= first <= first.topk(ctx.budget, largest=False).values.amax()
        return Selection(ctx.n, kernels.topk_indices(end.masked_fill(stays, torch.inf), ctx.budget))


def _by_index(anchors: Tensor, origin: Tensor) -> Tensor:
    """Return the tokens (A, 4) one place and one row before and behind, within the first and the last token."""
    width = origin[0, 5]
    beside = torch.stack([anchors - 1, anchors + 1, anchors - width, anchors + width], dim=1)
    return beside.clamp(0, len(origin) - 1)


def _in_picture(anchors: Tensor, origin: Tensor) -> Tensor:
    """Return the tokens (A, 4) left, right, above and below; -1 where there is none."""
    where = origin[:, :4]  # view, frame, row, column
    # Numbers with an empty place behind every row and frame, ascending as the tokens are.
    size = where.amax(dim=0) + 2
    step = size.flip(0).cumprod(0).flip(0) // size
    place = (where * step).sum(dim=1)
    beside = step[2:].flip(0)
    wanted = place[anchors, None] + torch.stack([-beside, beside], dim=1).flatten()
    found = torch.searchsorted(place, wanted).clamp(max=len(place) - 1)
    return torch.where(place[found] == wanted, found, -1)
