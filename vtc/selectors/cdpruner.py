"""CDPruner: the subset of largest volume, weighted by what resembles the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.signals import TextEmbeds
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_fraction, check_number
from .text_relevance import TextRelevance, quality_of

__all__ = ["CdPrunerSelector", "blended"]


@register_selector
@dataclass(frozen=True)
class CdPrunerSelector(TextRelevance):
    """Keep tokens that are relevant to the text and differ from each other: a determinantal point process.

    The kernel is ``q_i cosine(x_i, x_j) q_j`` of the projected features; the subset is grown greedily by the token that
    most increases its determinant (`vtc.kernels.dpp_greedy`). The quality is the relevance r_i, from 0 to 1 over the
    tokens of the picture, ``(rel_i - min rel + 1e-6) / (max rel - min rel)``; with `theta` it is
    ``exp(theta / (2 (1 - theta)) r_i)``. rel_i is the mean cosine of token i to the input embeddings of the text.

    The released code measures relevance between CLIP's image and text embeddings; `relevance` brings a contrastive
    model for that (`vtc.relevance.OpenClip`). Without one the model's own embeddings stand in for it, as in Intel's
    OpenVINO GenAI. There similarity counts as it is, while the released code turns it round, presumably because
    similarities of CLIP's patches are known to be inverted; `similarity="inverted"` does the same. With w the
    `relevance_weight` the kernel is

        ((1 - w) + w q_i q_j) cosine(x_i, x_j),

    CDPruner's at 1 and OpenVINO GenAI's at 0.5; at 0 the text does not count. That one also cuts the tokens into halves
    that it chooses from separately, which is left out.

    Three differences more from the released code: what resembles the text equally counts equally, instead of dividing
    by 0; beyond the rank of the kernel the most relevant of the other tokens follow, where the released code computes
    NaN and keeps too few; all is float32, and tiles of one picture are chosen from together.

    Parameters
    ----------
    similarity
        "direct": what resembles the text is relevant; "inverted": what does not.
    theta
        How much relevance counts against diversity, from 0 to less than 1; None: the relevance itself is the quality.
    relevance_weight
        w, from 0 to 1.
    text
        Which text counts. "all": the whole prompt's, the system's part included; "after": what stands behind the first
        visual token of the prompt, which is the instruction, as in OpenVINO GenAI, where it follows the picture.
    relevance
        A `vtc.relevance.OpenClip`, by whose embeddings of tokens and question rel_i is measured; None: the model's own
        input embeddings. Which text counts it says itself, so that `text` has no effect.

    Raises
    ------
    ConfigError
        An option is invalid.
    InputError
        Text and features are not equally wide, which only `vtc.select` allows.

    References
    ----------
    "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", arXiv 2506.10967.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"
    cost: ClassVar[str] = "K N (d + K)"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    theta: float | None = None
    relevance_weight: float = 1.0
    text: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None:
            check_number("cdpruner", "theta", self.theta, 0, 0.99)
        check_fraction("cdpruner", "relevance_weight", self.relevance_weight)
        if self.text not in ("all", "after"):
            raise ConfigError(f'cdpruner: text must be "all" or "after", got {self.text!r}.')
        texts = (self.theta, self.relevance, self.similarity, self.text)
        if not self.relevance_weight and texts != (None, None, "direct", "all"):
            raise ConfigError("cdpruner: theta, relevance, similarity and text have no effect with relevance_weight=0.")
        if self.relevance is not None and self.text != "all":
            raise ConfigError("cdpruner: text has no effect beside relevance, which says itself what counts.")

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=self.text_signals(TextEmbeds(self.text))),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        quality = quality_of(self.relevance_of(ctx), self.theta)
        x, norms = blended(ctx.features, quality, self.relevance_weight)
        return Selection.from_indices(ctx.n, kernels.dpp_greedy(x, ctx.budget, norms))


def blended(x: Tensor, quality: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return rows and qualities of which ``q_i cosine(i, j) q_j`` is ``((1 - w) + w q_i q_j) cosine(x_i, x_j)``.

    The latter is the product of rows of twice the width, ``sqrt(1 - w) u_i`` beside ``sqrt(w) q_i u_i`` with u_i the
    normalised row of `x` (N, D).
    """
    if weight == 1:
        return x, quality
    if weight == 0:
        return x, torch.ones_like(quality)
    unit = torch.nn.functional.normalize(x.float(), dim=1, eps=1e-12)
    norms = ((1 - weight) + weight * quality**2).sqrt()
    return torch.cat([(1 - weight) ** 0.5 * unit, weight**0.5 * quality[:, None] * unit], dim=1), norms
