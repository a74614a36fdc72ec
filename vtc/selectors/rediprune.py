"""ReDiPrune: tokens far from each other, those that resemble the text first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..registry import register_selector
from .schedule import check_fraction, check_number
from .text_relevance import TextRelevance

__all__ = ["ReDiPruneSelector"]

_BEYOND = 1000.0  # more than a distance and the largest weight of relevance together


@register_selector
@dataclass(frozen=True)
class ReDiPruneSelector(TextRelevance):
    """Keep tokens that resemble the text and are far from those kept already.

    The first is the one most relevant to the text; then in every step the token with the largest

        min over kept j of (1 - cosine(x_i, x_j)) + alpha * rel_i,

    where rel_i is the mean cosine of token i to the text's tokens. The lower index wins ties.

    Differences from the released code. It works on the tower's features before the projector, with one vector of the
    question, folded by averaging where that is wider; here the projected features are compared with the input
    embeddings of the prompt's text, or, with `relevance`, embeddings of a contrastive model with each other. It leaves
    layouts with newlines between rows uncompressed; here newlines take no part. Its option `tau`, 0 by default, is left
    out.

    Parameters
    ----------
    alpha
        Weight of relevance beside the distance; 0: distance alone, after the most relevant token.
    tau
        Above 0, as released, not all tokens can be kept. Of a budget K below ``N // 2`` it is the 3 K most relevant,
        whatever `tau` is; else those with a relevance of at least `tau`, and the K most relevant if that is fewer.
    similarity, relevance
        As in `cdpruner`.

    Raises
    ------
    ConfigError
        An option is invalid.
    InputError
        Text and features are not equally wide, which only `vtc.select` allows.

    References
    ----------
    "ReDiPrune", arXiv 2603.24680.
    """

    name: ClassVar[str] = "rediprune"
    paper: ClassVar[str] = "ReDiPrune, arXiv 2603.24680"
    cost: ClassVar[str] = "K N d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    alpha: float = 0.5
    tau: float = 0.0

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return the range of the weight."""
        return {"alpha": Float(0.0, 4.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rediprune", "alpha", self.alpha, 0, 100)
        check_fraction("rediprune", "tau", self.tau)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=self.text_signals()),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        relevance = self.relevance_of(ctx)
        bonus = self.alpha * relevance
        if self.tau:
            bonus = torch.where(self._candidates(relevance, ctx.budget), bonus, -_BEYOND)
        # The most relevant comes first, also where relevance does not count.
        bonus = bonus.index_fill(0, relevance.argmax(dim=0, keepdim=True), _BEYOND)
        return Selection.from_indices(ctx.n, kernels.relevant_farthest_point(ctx.features, ctx.budget, bonus))

    def _candidates(self, relevance: Tensor, budget: int) -> Tensor:
        """(N,) bool: which tokens can be kept, at least `budget` of them."""
        n = len(relevance)
        few = budget < n // 2
        best = kernels.topk_indices(relevance, min(n, 3 * budget) if few else budget)
        candidates = torch.zeros_like(relevance, dtype=torch.bool).index_fill_(0, best, True)
        return candidates if few else candidates | (relevance >= self.tau)
