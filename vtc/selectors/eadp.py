"""EADP: relevance to the words that mean a place, smoothed, and a subset that covers what is relevant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.signals import Origin
from ..core.sites import BeforeDecoder, Site
from ..core.stage import ModelShape, Stage
from ..kernels.cosines import with_inverse_norms
from ..registry import register_selector
from .schedule import check_fraction, check_number
from .text_relevance import TextRelevance, check_widths, quality_of, relevance_to_text

__all__ = ["EadpSelector", "dense_relevance", "smoothed"]

_SHARPNESS = 100.0  # of the distribution of a word over the tokens
_ENTROPY_TEMPERATURE = 0.01
_BLOCK = 256  # words at a time


@register_selector
@dataclass(frozen=True)
class EadpSelector(TextRelevance):
    """Keep tokens that cover the picture, where it is relevant to the text first.

    **Relevance.** s_ti is the cosine of text token t and visual token i, negated if `similarity` is "inverted". Of the
    softmax over i of ``100 s_ti`` the entropy H_t says how little t means a place; the `words` part of the text tokens
    with the lowest entropy counts, at least one, with the weights ``softmax_t(-H_t / 0.01)``. That local relevance and
    the global one, the mean of s_ti over all text tokens, make ``alpha * global + (1 - alpha) * local``, which is
    brought to the range from 0 to 1 over the picture, smoothed with a 3 x 3 Gaussian of width 1 (mirrored at edges) and
    raised to the power `beta`: w_i. **Choice.** Greedy facility location: in every step the token with the largest
    increase of ``sum_i w_i max over kept j of (1 + cosine(x_i, x_j)) / 2`` (`vtc.kernels.weighted_coverage`).

    After the released code for Qwen-VL; that for LLaVA reads CLIP's text tower, which `relevance` brings: its segments
    of the question, mostly one, are then what the text tokens are here. Differences: its global relevance is
    that of one vector of the text, here it is the mean over the tokens; the text is the whole prompt without its
    pictures; of T text tokens ``max(1, int(words * T))`` count. What an earlier stage has dropped takes no part in
    smoothing. Tiles of one picture are chosen from together, without the shares that the released code gives to each.

    Parameters
    ----------
    alpha
        Weight of the global relevance, from 0 to 1.
    beta
        Power of the smoothed relevance: how much it counts against coverage.
    words
        Fraction of the text tokens that is local.
    similarity
        "inverted": what does not resemble the text is relevant, as released; "direct": what does.
    relevance
        As in `cdpruner`.

    Raises
    ------
    ConfigError
        An option is invalid.
    InputError
        Text and features are not equally wide, which only `vtc.select` allows.

    References
    ----------
    "Combating Textual Noise and Redundancy: Entropy-Aware Dense Visual Token Pruning", ECCV 2026,
    https://github.com/SJTU-DeepVisionLab/EADP.
    """

    name: ClassVar[str] = "eadp"
    paper: ClassVar[str] = "EADP, ECCV 2026, github.com/SJTU-DeepVisionLab/EADP"
    cost: ClassVar[str] = "N^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder,)

    alpha: float = 0.5
    beta: float = 1.0
    words: float = 0.2
    similarity: str = field(default="inverted", kw_only=True)

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the global part, of the power and of the words."""
        return {"alpha": Float(0.0, 1.0), "beta": Float(0.0, 4.0), "words": Float(0.05, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("eadp", "alpha", self.alpha)
        check_number("eadp", "beta", self.beta, 0, 100)
        check_fraction("eadp", "words", self.words)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        return (Stage(requires=(*self.text_signals(), Origin())),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        tokens, text = self.tokens_and_text(ctx)
        importance = self.importance(tokens, text, relevance_to_text(tokens, text), ctx[Origin])
        return Selection.from_indices(ctx.n, kernels.weighted_coverage(ctx.features, ctx.budget, importance))

    def importance(self, x: Tensor, text: Tensor, whole: Tensor, origin: Tensor) -> Tensor:
        """(N,) float32: how much it counts that each token is covered.

        Parameters
        ----------
        x
            (N, D).
        text
            (T, D).
        whole
            (N,): cosine of every token to the text as a whole.
        origin
            (N, 6), as the signal `Origin`.
        """
        local = dense_relevance(x, text, self.words, self.sign)
        mixed = self.alpha * self.sign * whole + (1 - self.alpha) * local
        return smoothed(quality_of(mixed), origin).clamp(min=0) ** self.beta


def dense_relevance(x: Tensor, text: Tensor, words: float, sign: float = 1.0) -> Tensor:
    """(N,) float32: relevance of tokens (N, D) to the `words` part of the text (T, D) that means a place most."""
    check_widths(x, text)
    if not len(text):
        return x.new_zeros(len(x), dtype=torch.float32)
    x, inverse = with_inverse_norms(x)
    x = x.float()
    lines = sign * torch.nn.functional.normalize(text.float(), dim=1, eps=1e-12)
    logs = ((_SHARPNESS * (part @ x.T) * inverse).log_softmax(dim=1) for part in lines.split(_BLOCK))
    entropy = torch.cat([-(log.exp() * log).sum(dim=1) for log in logs])
    clear, place = entropy.sort(stable=True)
    count = max(1, int(words * len(text)))
    weight = (-clear[:count] / _ENTROPY_TEMPERATURE).softmax(dim=0)
    return x @ (weight @ lines[place[:count]]) * inverse


def smoothed(values: Tensor, origin: Tensor) -> Tensor:
    """(N,): `values` (N,) after a 3 x 3 Gaussian within every frame, mirrored at its edges.

    Neighbours that are not there have no weight.
    """
    view, time, row, column, rows, columns = origin.unbind(dim=1)
    high, wide = rows.max(), columns.max()
    first = (view * (time.max() + 1) + time) * high  # row of every frame
    places = (first + row) * wide + column  # ascending, as the tokens are
    away = torch.arange(-1, 2, device=values.device)[:, None]
    there = (first + _mirrored(row + away, rows))[:, None] * wide + _mirrored(column + away, columns)  # (3, 3, N)
    at = torch.searchsorted(places, there).clamp_(max=len(places) - 1)
    side = (-away.square() / 2).exp()
    weight = (side * side.T)[..., None] * (places[at] == there)
    return (weight * values[at]).sum(dim=(0, 1)) / weight.sum(dim=(0, 1))


def _mirrored(place: Tensor, size: Tensor) -> Tensor:
    """Reflect places -1 and `size` at the edges, which are not repeated; a single place is its own neighbour."""
    place = torch.where(place < 0, -place, place)
    place = torch.where(place >= size, 2 * size - 2 - place, place)
    return place.clamp(min=0)
