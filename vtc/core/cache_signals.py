"""Signals of the entries of key-value caches: what decoder layers attend to while they read a prompt.

They are computed in every decoder layer, over all entries of the prompt, before those that may leave are picked out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..errors import ConfigError
from ..plain import shown
from .observations import DecoderAttention, DecoderUpdate, Observation
from .signals import Signal

__all__ = ["AttentionSums", "LocalAttention", "ResidualCosine", "WindowAttention", "best_chunks"]


@dataclass(frozen=True)
class WindowAttention(Signal):
    """Attention that the last queries of the prompt give to each entry, pooled along the prompt, (heads, N).

    Averaged over the queries of the window and over the query heads that share a key head. Entries of the window itself
    have one more than the largest score. Pooling looks at neighbours in the prompt, before the window.

    Parameters
    ----------
    window
        How many of the last tokens of the prompt ask.
    kernel
        Odd length of the pooling window; 1: none.
    pooling
        "mean" (zeros beyond the ends count) or "max".
    """

    name: ClassVar[str] = "window_attention"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    window: int = 32
    kernel: int = 5
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(f"window must be an integer of at least 1, got {shown(self.window)}.")
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"kernel must be an odd integer, got {shown(self.kernel)}.")
        if self.pooling not in ("mean", "max"):
            raise ConfigError(f'pooling must be "mean" or "max", got {shown(self.pooling)}.')

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, Hkv)."""
        return raw.per_row(self._row)

    def _row(self, raw: DecoderAttention) -> Tensor:
        attention = window_rows(raw, self.window).mean(dim=1)  # (H, n)
        heads, n = raw.keys.shape[1], attention.shape[-1]
        before = n - min(self.window, n)
        pooled = _pool(attention[:, :before], self.kernel, self.pooling)
        scores = pooled.unflatten(0, (heads, -1)).mean(dim=1)
        most = scores.amax() + 1 if scores.numel() else scores.new_ones(())
        return F.pad(scores, (0, n - before)).masked_fill(torch.arange(n, device=scores.device) >= before, most).T

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T


@dataclass(frozen=True)
class AttentionSums(Signal):
    """Attention that each entry receives from all queries of the prompt, summed, (heads, N).

    Averaged over the query heads that share a key head. No attention matrix is made.
    """

    name: ClassVar[str] = "attention_sums"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, Hkv)."""
        return raw.per_row(self._row)

    def _row(self, raw: DecoderAttention) -> Tensor:
        ones = torch.ones(1, 1, 1, raw.queries.shape[2], device=raw.queries.device)
        sums = kernels.attention_column_sums(raw.queries, raw.keys, raw.scaling, ones, raw.visibility)
        own = sums[0, :, 0, raw.past :]
        return own.unflatten(0, (raw.keys.shape[1], -1)).mean(dim=1).T

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T


@dataclass(frozen=True)
class ResidualCosine(Signal):
    """Cosine of the hidden states before and after the attention of a layer, averaged over the prompt, a scalar."""

    name: ClassVar[str] = "residual_cosine"
    reads: ClassVar[type[Observation]] = DecoderUpdate
    axes: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = False

    def compute(self, raw: DecoderUpdate) -> Tensor:
        """(B,)."""
        cosines = F.cosine_similarity(raw.before.float(), raw.after.float(), dim=-1)
        return (cosines * raw.prompt).sum(dim=1) / raw.prompt.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class LocalAttention(Signal):
    """Share of the last query's attention that goes to the first and the latest entries before it, a scalar.

    Parameters
    ----------
    initial, recent
        How many entries at either end count; the last query's own does not.
    """

    name: ClassVar[str] = "local_attention"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = False

    initial: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        for name in ("initial", "recent"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be an integer of at least 0, got {shown(value)}.")

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B,)."""
        shares = []
        for row in raw.each_row():
            attention = window_rows(row, 1).mean(dim=0)[0, :-1]
            recent = max(self.initial, len(attention) - self.recent)
            shares.append(attention[: self.initial].sum() + attention[recent:].sum())
        return torch.stack(shares)


def best_chunks(scores: Tensor, chunk: Tensor, budget: int, by: str = "mean") -> Tensor:
    """Choose whole chunks of neighbours by their scores, as many as the budget holds.

    Parameters
    ----------
    scores
        (N,) float32.
    chunk
        (N,) long, ascending: number of the chunk of each entry.
    budget
        K; of the last chunk that is chosen only the best entries stay, so that it is kept exactly.
    by
        A chunk's score is the "mean" of its entries', or the largest ("amax").

    Returns
    -------
    Tensor
        (K,) long, ascending.
    """
    number = torch.unique_consecutive(chunk, return_inverse=True)[1]
    count = int(number[-1]) + 1 if len(number) else 0
    whole = scores.new_zeros(count).scatter_reduce(0, number, scores, by, include_self=False)
    ranks = whole.sort(descending=True, stable=True).indices.argsort()
    by_score = scores.sort(descending=True, stable=True).indices
    by_chunk = by_score[ranks[number[by_score]].sort(stable=True).indices]
    return by_chunk[:budget].sort().values


def window_rows(raw: DecoderAttention, window: int) -> Tensor:
    """Compute the softmax rows (H, w, n) of the last queries of one row without padding, over the prompt's entries."""
    n = raw.queries.shape[2]
    part = slice(n - min(window, n), n)
    allowed = raw.visibility(part, raw.keys.shape[2])
    rows = kernels.attention_rows(raw.queries[:, :, part], raw.keys, raw.scaling, allowed)
    return rows[0, :, :, raw.past :]


def _pool(x: Tensor, kernel: int, pooling: str) -> Tensor:
    """Pool (H, n) along the last axis to the same length."""
    if kernel == 1 or not x.shape[-1]:
        return x
    if pooling == "max":
        return F.max_pool1d(x[None], kernel, stride=1, padding=kernel // 2)[0]
    return F.avg_pool1d(x[None], kernel, stride=1, padding=kernel // 2)[0]
