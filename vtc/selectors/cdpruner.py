"""CDPruner: the subset of largest volume, weighted by what resembles the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Signal, TextEmbeds
from ..core.sites import BeforeDecoder, Site
from ..errors import ConfigError, InputError
from ..kernels.cosines import with_inverse_norms
from ..registry import register_selector
from .schedule import check_number

__all__ = ["CdPrunerSelector", "check_widths", "quality_of", "relevance_to_text"]

_BLOCK = 4096  # tokens that are looked at in float32 at a time


@register_selector
@dataclass(frozen=True)
class CdPrunerSelector(Selector):
    """Keep tokens that are relevant to the text and differ from each other: a determinantal point process.

    The kernel is ``q_i cosine(x_i, x_j) q_j`` of the projected features; the subset is grown greedily by the token that
    most increases its determinant (`vtc.kernels.dpp_greedy`). The quality is the relevance r_i, from 0 to 1 over the
    tokens of the picture, ``(rel_i - min rel + 1e-6) / (max rel - min rel)``; with `theta` it is
    ``exp(theta / (2 (1 - theta)) r_i)``. rel_i is the mean cosine of token i to the input embeddings of the text.

    The released code measures relevance between CLIP's image and text embeddings, which needs a text tower that the
    models here do not have. The model's own embeddings stand in for it, as in Intel's OpenVINO GenAI: of the whole
    prompt but for its pictures, the system's part included. There similarity counts as it is, while the released code
    turns it round, presumably because similarities of CLIP's patches are known to be inverted; `similarity="inverted"`
    does the same. Three differences more: what resembles the text equally counts equally, instead of dividing by 0;
    beyond the rank of the kernel the most relevant of the other tokens follow, where the released code computes NaN
    and keeps too few; all is float32, and tiles of one picture are chosen from together.

    Parameters
    ----------
    similarity
        "direct": what resembles the text is relevant; "inverted": what does not.
    theta
        How much relevance counts against diversity, from 0 to less than 1; None: the relevance itself is the quality.

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
    requires: ClassVar[tuple[Signal, ...]] = (TextEmbeds(),)
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    similarity: str = "direct"
    theta: float | None = None

    def __post_init__(self) -> None:
        if self.similarity not in ("direct", "inverted"):
            raise ConfigError(f'cdpruner: similarity must be "direct" or "inverted", got {self.similarity!r}.')
        if self.theta is not None:
            check_number("cdpruner", "theta", self.theta, 0, 0.99)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        relevance = relevance_to_text(ctx.features, ctx[TextEmbeds])
        quality = quality_of(-relevance if self.similarity == "inverted" else relevance, self.theta)
        return Selection.from_indices(ctx.n, kernels.dpp_greedy(ctx.features, ctx.budget, quality))


def relevance_to_text(x: Tensor, text: Tensor) -> Tensor:
    """Compute the mean cosine (N,) of each row of `x` (N, D) to the rows of `text` (T, D); 0 if there is no text.

    Raises
    ------
    InputError
        The widths differ.
    """
    check_widths(x, text)
    if not len(text):
        return x.new_zeros(len(x), dtype=torch.float32)
    mean = torch.nn.functional.normalize(text.float(), dim=1, eps=1e-12).mean(dim=0)
    x, inverse = with_inverse_norms(x)
    return torch.cat([part.float() @ mean for part in x.split(_BLOCK)]) * inverse


def check_widths(x: Tensor, text: Tensor) -> None:
    """Raise InputError unless tokens (N, D) and text (T, D) can be compared."""
    if x.shape[1] != text.shape[1]:
        raise InputError(
            f"text_embeds are {text.shape[1]} wide and the features {x.shape[1]}; both are to be as wide as the "
            "language model, or both embeddings of one contrastive model."
        )


def quality_of(relevance: Tensor, theta: float | None = None) -> Tensor:
    """Bring relevance (N,) to the range of 0 to 1, all 1 if it is constant, and apply `theta`."""
    low, high = relevance.aminmax()
    spread = high - low
    quality = torch.where(spread > 0, (relevance - low + 1e-6) / spread, 1.0)
    return quality if theta is None else (theta / (2 * (1 - theta)) * quality).exp()
