"""Relevance of visual tokens to the text: what the methods that ask for it share.

Tokens and text are compared as the language model is given them, or as a contrastive model embeds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.context import VisualContext
from ..core.selector import Selector
from ..core.signals import Signal, TextEmbeds
from ..errors import ConfigError, InputError
from ..kernels.cosines import with_inverse_norms
from ..plain import shown
from ..relevance import OpenClip

__all__ = ["TextRelevance", "check_widths", "quality_of", "relevance_to_text"]

_BLOCK = 4096  # tokens that are looked at in float32 at a time


@dataclass(frozen=True)
class TextRelevance(Selector):
    """Base of methods that compare visual tokens with the text.

    Without `relevance` the features before the language model are compared with its input embeddings of the text. With
    a `vtc.relevance.OpenClip` that model's embeddings of tokens (N, E) and of the segments of the question (S, E) are.

    Parameters
    ----------
    similarity
        "direct": what resembles the text is relevant; "inverted": what does not, as with CLIP, whose patches resemble
        least what they show.
    relevance
        A `vtc.relevance.OpenClip`, or None.

    Raises
    ------
    ConfigError
        An option is invalid.
    """

    similarity: str = field(default="direct", kw_only=True)
    relevance: Mapping[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.similarity not in ("direct", "inverted"):
            raise ConfigError(f'{self.name}: similarity must be "direct" or "inverted", got {shown(self.similarity)}.')
        if self.relevance is not None:
            object.__setattr__(self, "relevance", OpenClip.from_plain(self.relevance))

    @property
    def sign(self) -> float:
        """What a similarity counts: -1 if it is inverted, else 1."""
        return -1.0 if self.similarity == "inverted" else 1.0

    def text_signals(self, own: TextEmbeds | None = None) -> tuple[Signal, ...]:
        """Return the signals to require: those of `relevance`, or `own`, by default the embeddings of all text."""
        if isinstance(self.relevance, OpenClip):
            return self.relevance.signals()
        return (own or TextEmbeds(),)

    def tokens_and_text(self, ctx: VisualContext) -> tuple[Tensor, Tensor]:
        """Return what to compare: (N, E) of the tokens, and (T, E) of the text.

        Raises
        ------
        InputError
            They are not equally wide, which only `vtc.select` allows.
        """
        if isinstance(self.relevance, OpenClip):
            tokens, text = (ctx[signal] for signal in self.relevance.signals())
        else:
            tokens, text = ctx.features, ctx[TextEmbeds]
        check_widths(tokens, text)
        return tokens, text

    def relevance_of(self, ctx: VisualContext) -> Tensor:
        """(N,) float32: the mean cosine of each token to the text, negated if `similarity` is "inverted"."""
        return self.sign * relevance_to_text(*self.tokens_and_text(ctx))


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
