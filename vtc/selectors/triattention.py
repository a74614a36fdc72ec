"""TriAttention: keep the cache entries that the average query would attend to from positions yet to come."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.eviction import CacheContext, CacheSelector
from ..core.observations import DecoderCall, Observation
from ..core.signals import Signal
from ..errors import ConfigError, UnsupportedMethodError
from ..plain import integer, shown
from ..registry import register_selector

__all__ = ["FutureAttention", "TriAttentionSelector", "future_scores"]

Layout = Callable[[Tensor], Tensor]

_OFFSETS = tuple(2**power for power in range(17))


def future_scores(keys: Tensor, mean: Tensor, modulus: Tensor, rotations: Tensor, aggregation: str = "mean") -> Tensor:
    """Score keys by the logits that an average query will give them.

    With the average query ``m_f`` in the complex plane of each frequency f, the average modulus ``a_f`` of queries, and
    rotated keys ``k_f``, ``score = mean over positions t of sum_f Re(m_f e^(i t w_f) conj(k_f)) + sum_f (a_f - |m_f|)
    |k_f|``.

    Parameters
    ----------
    keys
        (..., n, 2 F) rotated, real parts before imaginary ones.
    mean
        (..., F) complex, before rotation.
    modulus
        (..., F).
    rotations
        (O, F) complex: ``e^(i t w_f)`` of the positions t at which the query may stand.
    aggregation
        "mean" over the positions, or "max".

    Returns
    -------
    Tensor
        (..., n).
    """
    there = mean[..., None, :] * rotations
    if aggregation == "mean":
        there = there.mean(dim=-2, keepdim=True)
    logits = torch.cat([there.real, there.imag], dim=-1) @ keys.mT
    sizes = torch.complex(*keys.unflatten(-1, (2, -1)).unbind(dim=-2)).abs()
    return logits.amax(dim=-2) + (sizes @ (modulus - mean.abs())[..., None])[..., 0]


@dataclass(frozen=True)
class FutureAttention(Signal):
    """Logits that the average query of the prompt will give to each entry from later positions, (heads, N).

    Of the query heads that share a key head the largest counts, after each has been brought to mean 0 and variance 1.

    Parameters
    ----------
    offsets
        How many positions behind the prompt's end the queries stand.
    aggregation
        "mean" over the offsets, or "max".
    """

    name: ClassVar[str] = "future_attention"
    reads: ClassVar[type[Observation]] = DecoderCall
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    offsets: tuple[int, ...] = _OFFSETS
    aggregation: str = "mean"

    def compute(self, raw: DecoderCall) -> Tensor:
        """(B, T, Hkv)."""
        return raw.per_row(self._row)

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T

    def _row(self, raw: DecoderCall) -> Tensor:
        layout, of_tables = _layouts(raw)
        queries, keys = (layout(x.float()) for x in (_projected(raw, raw.hidden, "q"), raw.keys[0]))
        groups = len(queries) // len(keys)
        pairs = torch.complex(*queries.unflatten(-1, (2, -1)).unbind(dim=-2))  # (H, n, F)
        rotations = _rotations(raw, of_tables, self.offsets)
        mean, modulus = pairs.mean(dim=1), pairs.abs().mean(dim=1)
        scores = future_scores(keys.repeat_interleave(groups, dim=0), mean, modulus, rotations, self.aggregation)
        spread = scores.std(dim=1, keepdim=True, correction=0).clamp(min=1e-12)
        scores = (scores - scores.mean(dim=1, keepdim=True)) / spread
        return scores.unflatten(0, (-1, groups)).amax(dim=1).T


def _interleaved(x: Tensor) -> Tensor:
    """Sort pairs of neighbours (..., 2 F) into first members before second ones."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _halves(x: Tensor) -> Tensor:
    """Leave first halves before second ones."""
    return x


_LAYOUTS: tuple[Layout, ...] = (_halves, _interleaved)
_ROUNDED = 0.2
"""How far, of its norm, a key may be from what a layout says: 4 bits of a quantized cache move it by 0.1, another
layout by more than 0.6."""


def _layouts(raw: DecoderCall) -> tuple[Layout, Layout]:
    """Find in which pairs keys are rotated: what puts real parts before imaginary ones, in keys and in the tables.

    Raises
    ------
    UnsupportedMethodError
        In none that are known, or a part of each key only.
    """
    cos, sin = (table[0, -1:].float() for table in raw.tables)
    if cos.shape[-1] != raw.keys.shape[-1]:
        raise _cannot(raw, f"rotations of width {cos.shape[-1]} for keys of width {raw.keys.shape[-1]}")
    before, after = _projected(raw, raw.hidden[:, -1:], "k").float(), raw.keys[0, :, -1:].float()
    for layout, of_tables in itertools.product(_LAYOUTS, repeat=2):
        real, imaginary = layout(before).chunk(2, dim=-1)
        turned = layout(before) * of_tables(cos) + torch.cat([-imaginary, real], dim=-1) * of_tables(sin)
        if float((turned - layout(after)).norm()) <= _ROUNDED * float(after.norm()):
            return layout, of_tables
    raise _cannot(raw, "keys that are rotated in no pairs that are known here")


def _projected(raw: DecoderCall, hidden: Tensor, of: str) -> Tensor:
    """(H, n, d) queries ("q") or keys ("k") of hidden states (1, n, D), before rotation."""
    module, width = raw.module, raw.keys.shape[-1]
    projection, norm = getattr(module, f"{of}_proj", None), getattr(module, f"{of}_norm", None)
    if not callable(projection):
        raise _cannot(raw, f"no {of}_proj")
    projected = projection(hidden)[0]
    if projected.shape[-1] % width:
        raise _cannot(raw, f"{of}_proj of width {projected.shape[-1]} for keys of width {width}")
    projected = projected.unflatten(-1, (-1, width))
    return (norm(projected) if callable(norm) else projected).transpose(0, 1)


def _rotations(raw: DecoderCall, layout: Layout, offsets: tuple[int, ...]) -> Tensor:
    """(O, F) complex: rotation of a text token that stands so many places behind the one that follows the prompt."""
    here = raw.hidden.new_zeros(1, 1, dtype=torch.float32)
    cos, sin = raw.rotary(here, torch.tensor([[0, 1]], device=here.device))
    step = _angles(layout(cos[0, 1]), layout(sin[0, 1]))
    last = _angles(*(layout(table[0, -1]) for table in raw.tables))
    ahead = torch.tensor(offsets, dtype=torch.float64, device=here.device)[:, None] + 1
    angles = last + ahead * step
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _angles(cos: Tensor, sin: Tensor) -> Tensor:
    """(F,) float64: angles of which tables (2 F,) are the cosines and sines."""
    return torch.atan2(*(table.double()[: len(table) // 2] for table in (sin, cos)))


def _cannot(raw: DecoderCall, found: str) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"triattention takes queries apart into rotating pairs, but {type(raw.module).__name__} has {found}"
    )


@register_selector
@dataclass(frozen=True)
class TriAttentionSelector(CacheSelector):
    """Keep, per layer and key head, the entries that the average query would attend to from later positions.

    Queries of a head resemble each other before they are rotated, so that their mean says what later ones will attend
    to, position by position (`future_scores`). Nothing of the attention itself is read.

    Differences from the paper and the released code, which serve long chains of reasoning: there entries leave every
    128 steps while decoding, and the prompt's never do; here entries of the prompt leave once, after the prefill. Means
    and moduli of queries are taken from the prompt itself, not beforehand from a text for calibration. The key heads
    choose on their own (the released option), each by the largest score of its query heads, normalised. Only entries of
    visual tokens leave, unless ``scope="all"``.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`.
    offsets
        Positions behind the prompt's end from which queries are thought to come.
    aggregation
        "mean" over them, or "max".

    Raises
    ------
    ConfigError
        An option is invalid.
    UnsupportedMethodError
        The attention does not project queries and keys on their own, or rotates a part of them only.

    References
    ----------
    TriAttention, https://github.com/WeianMao/triattention.
    """

    name: ClassVar[str] = "triattention"
    paper: ClassVar[str] = "TriAttention, github.com/WeianMao/triattention"
    cost: ClassVar[str] = "N D^2"

    offsets: tuple[int, ...] = _OFFSETS
    aggregation: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        found = [integer(value) for value in self.offsets] if isinstance(self.offsets, (list, tuple)) else []
        if not found or any(value is None or not 0 <= value < 2**31 for value in found):
            raise ConfigError(f"triattention: offsets are integers of at least 0, got {shown(self.offsets)}.")
        if self.aggregation not in ("mean", "max"):
            raise ConfigError(f'triattention: aggregation must be "mean" or "max", got {shown(self.aggregation)}.')

    def reads(self) -> tuple[Signal, ...]:
        """Return the logits to come."""
        return (FutureAttention(tuple(self.offsets), self.aggregation),)

    def score(self, ctx: CacheContext) -> Tensor:
        """(heads, N) normalised logits."""
        return ctx[FutureAttention]
