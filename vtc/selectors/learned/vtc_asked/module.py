"""The scorer of `vtc-asked`: visual tokens look at the question."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....errors import ConfigError
from ..attention import check_sizes

__all__ = ["Heard", "Scorer"]

_OCTAVES = 4  # of the codes of places
_AXES = 3  # time, row and column


@dataclass(eq=False)
class Heard:
    """What is learned from one picture of one prompt.

    Attributes
    ----------
    features, places, text
        (N, d), (N, 3) and (T, d), as `Scorer` takes them.
    attention
        One (N,) for each decoder layer that was looked at: what the last token of the prompt gives to every visual one.
    """

    features: Tensor
    places: Tensor
    text: Tensor
    attention: list[Tensor] = field(default_factory=list)


class Scorer(nn.Module):
    """Score the visual tokens of a picture, given the question.

    The text runs through one self-attention block; then every visual token looks at the text in `blocks` blocks of
    cross-attention, by itself: no token sees another. Tokens know their places by ``sin`` and ``cos`` of
    ``2^k pi p``, k = 0 .. 3, of time, row and column as fractions p.

    Parameters
    ----------
    width
        Of the language model's embeddings.
    inner
        Width of the blocks; a multiple of `heads`, and even.
    heads, blocks
        Of the attention, and how many blocks look at the text.

    Raises
    ------
    ConfigError
        A size is no integer of at least 1, or they do not fit each other.
    """

    def __init__(self, width: int, inner: int = 128, heads: int = 4, blocks: int = 2) -> None:
        check_sizes("vtc-asked", width=width, inner=inner, heads=heads, blocks=blocks)
        if inner % heads or inner % 2:
            raise ConfigError(f"vtc-asked: inner must be even and a multiple of {heads} heads, got {inner}.")
        super().__init__()
        self.text = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.visual = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.place = nn.Linear(2 * _OCTAVES * _AXES, inner)
        sizes = (inner, heads, 4 * inner, 0.0, "gelu")
        self.reading = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=True)
        self.looking = nn.ModuleList(
            nn.TransformerDecoderLayer(*sizes, batch_first=True, norm_first=True) for _ in range(blocks)
        )
        self.score = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, 1))
        self.heard: list[Heard] | None = None

    def forward(self, features: Tensor, places: Tensor, text: Tensor) -> Tensor:
        """Compute scores (N,) in float32: the logarithm of how much each token is looked at, up to a constant.

        Parameters
        ----------
        features
            (N, d), what the language model would get.
        places
            (N, 3): time, row and column as fractions of the whole.
        text
            (T, d), input embeddings of the text of the prompt, T at least 1.
        """
        with torch.autocast(features.device.type, enabled=False):
            words = self.text(text.float()) + _ordinals(len(text), self.place.out_features, text.device)
            words = self.reading(words[None])
            seen = (self.visual(features.float()) + self.place(_codes(places.float())))[:, None]
            words = words.expand(len(seen), -1, -1)
            for block in self.looking:
                seen = block(seen, words)
            scores: Tensor = self.score(seen)[:, 0, 0]
            return scores

    @contextmanager
    def listening(self) -> Iterator[list[Heard]]:
        """Collect what is learned from, in a model that is compressed with ``imitate=True``."""
        self.heard = []
        try:
            yield self.heard
        finally:
            self.heard = None


def _codes(places: Tensor) -> Tensor:
    """(N, 3) to (N, 24)."""
    angles = places[..., None] * (2.0 ** torch.arange(_OCTAVES, device=places.device)) * math.pi
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def _ordinals(count: int, width: int, device: torch.device) -> Tensor:
    """Sine-cosine codes (T, width) of the words' places in the text."""
    rate = 10000.0 ** (-torch.arange(width // 2, device=device) / (width // 2))
    angles = torch.arange(count, device=device)[:, None] * rate
    return torch.cat([angles.sin(), angles.cos()], dim=1)
