"""DefensiveKV: keep the cache entries that any of the last queries may need, not those that they need on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.cache_signals import WindowAttention, window_rows
from ..core.eviction import CacheContext, CacheSelector, protect
from ..core.observations import DecoderAttention, DecoderCall, Observation
from ..core.signals import Signal
from ..errors import ConfigError, UnsupportedMethodError
from ..plain import real, shown
from ..registry import register_selector

__all__ = ["DefensiveKvSelector", "OutputNorms", "UncoveredAttention", "WorstAttention"]

_BLOCK = 1024  # entries whose outputs exist at a time


@dataclass(frozen=True)
class WorstAttention(Signal):
    """The most attention that any of the last queries gives to each entry, (heads, N), 0 for the window itself.

    ``max over queries and query heads that share a key head of s_i * pool(A[i, j])``, where s_i gives the pooled row
    its old sum back; no entry has less than their mean over the entries.

    Parameters
    ----------
    window
        How many of the last tokens of the prompt ask.
    kernel
        Odd length of the mean along the prompt; 1: none.
    """

    name: ClassVar[str] = "worst_attention"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        WindowAttention(self.window, self.kernel)  # raises

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, Hkv)."""
        return raw.per_row(self._row)

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T

    def _row(self, raw: DecoderAttention) -> Tensor:
        heads, n = raw.keys.shape[1], raw.queries.shape[2]
        before = n - min(self.window, n)
        if not before:
            return raw.queries.new_zeros(n, heads, dtype=torch.float32)
        rows = window_rows(raw, self.window)[..., :before].float()
        pooled = F.avg_pool1d(rows, self.kernel, stride=1, padding=self.kernel // 2)
        pooled = pooled * (rows.sum(dim=-1) / pooled.sum(dim=-1).clamp(min=1e-30))[..., None]
        worst = pooled.unflatten(0, (heads, -1)).amax(dim=(1, 2))
        return F.pad(torch.maximum(worst, worst.mean(dim=1, keepdim=True)), (0, n - before)).T


@dataclass(frozen=True)
class UncoveredAttention(Signal):
    """How much of the window's attention lies on better entries, less what has to be covered, (heads, N).

    With the mean attention ``m_j`` over the last queries and the query heads that share a key head, the sum of all m
    above m_j, minus ``coverage - (sum of m over the last entries before the window)``. Entries below 0 are those that
    are needed to cover that much. 0 for the window itself.

    Parameters
    ----------
    window
        How many of the last tokens of the prompt ask.
    coverage
        Share of attention.
    """

    name: ClassVar[str] = "uncovered_attention"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    window: int = 32
    coverage: float = 0.9

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, Hkv)."""
        return raw.per_row(self._row)

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T

    def _row(self, raw: DecoderAttention) -> Tensor:
        heads, n = raw.keys.shape[1], raw.queries.shape[2]
        before = n - min(self.window, n)
        mean = window_rows(raw, self.window)[..., :before].float().unflatten(0, (heads, -1)).mean(dim=(1, 2))
        order = mean.sort(dim=1, descending=True, stable=True)
        above = order.values.cumsum(dim=1) - order.values
        covered = self.coverage - mean[:, max(0, before - self.window) :].sum(dim=1, keepdim=True)
        return F.pad(torch.zeros_like(mean).scatter(1, order.indices, above - covered), (0, n - before)).T


@dataclass(frozen=True)
class OutputNorms(Signal):
    """How much each entry can add to the output of the attention, (heads, N); the heads of an entry sum to 1.

    ``|W_O^h v_j|_1`` averaged over the query heads h that share a key head, divided by its sum over key heads
    (CriticalKV's value term).
    """

    name: ClassVar[str] = "output_norms"
    reads: ClassVar[type[Observation]] = DecoderCall
    axes: ClassVar[tuple[str, ...]] = ("heads", "N")

    def compute(self, raw: DecoderCall) -> Tensor:
        """(B, T, Hkv)."""
        return raw.per_row(self._row)

    def present(self, values: Tensor) -> Tensor:
        """(N, Hkv) to (Hkv, N)."""
        return values.T

    def _row(self, raw: DecoderCall) -> Tensor:
        values = raw.values[0].float()  # (Hkv, n, d)
        heads, n, width = values.shape
        weight = getattr(getattr(raw.module, "o_proj", None), "weight", None)
        if weight is None or not weight.is_floating_point() or weight.shape[1] % (heads * width):
            raise UnsupportedMethodError(
                f"defensivekv reads the output projection of the attention, but {type(raw.module).__name__} has no "
                "o_proj with an unquantized weight (D, H * d)"
            )
        of_heads = weight.detach().float().unflatten(1, (heads, -1, width)).permute(1, 2, 3, 0)  # (Hkv, G, d, D)
        norms = values.new_zeros(heads, n)
        for group in of_heads.unbind(dim=1):
            for first in range(0, n, _BLOCK):
                part = slice(first, first + _BLOCK)
                norms[:, part] += (values[:, part] @ group).abs().sum(dim=-1)
        return (norms / norms.sum(dim=0).clamp(min=1e-30)).T


@register_selector
@dataclass(frozen=True)
class DefensiveKvSelector(CacheSelector):
    """Keep, per layer and key head, the entries that would be missed most in the worst case.

    ``score_j = max over the window's queries of their pooled attention to j, times the share of its head in what v_j
    can add to the output``. Entries that are needed to cover a fixed share of the mean attention come first, as far as
    the budget without the window allows, and so does the window.

    Differences from the released code: it ranks the entries of all heads of a layer in one list (and in a variant those
    of all layers), so that heads keep different numbers of them; here each head keeps equally many, because one mask
    serves all heads of a layer, and how the layers share the budget is left to `budgets`. Only entries of visual tokens
    leave, unless ``scope="all"``.

    Parameters
    ----------
    scope, budgets
        As in `CacheSelector`.
    window
        How many of the last tokens of the prompt ask.
    kernel
        Odd length of the mean along the prompt; 1: none.
    coverage
        Share of the mean attention that is covered first.

    Raises
    ------
    ConfigError
        An option is invalid.
    UnsupportedMethodError
        The attention has no output projection of its own, or a quantized one.

    References
    ----------
    DefensiveKV, https://github.com/FFY0/DefensiveKV, `EfficientDefensiveKVPress`.
    """

    name: ClassVar[str] = "defensivekv"
    paper: ClassVar[str] = "DefensiveKV, github.com/FFY0/DefensiveKV"
    cost: ClassVar[str] = "N d D"

    window: int = 32
    kernel: int = 5
    coverage: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reads()
        share = real(self.coverage)
        if share is None or not 0 <= share <= 1:
            raise ConfigError(f"defensivekv: coverage must be a number between 0 and 1, got {shown(self.coverage)}.")

    def reads(self) -> tuple[Signal, ...]:
        """Return the attention of the window, twice, and the norms of what values add to the output."""
        return (
            WorstAttention(self.window, self.kernel),
            UncoveredAttention(self.window, self.coverage),
            OutputNorms(),
        )

    def score(self, ctx: CacheContext) -> Tensor:
        """(heads, N) attention times norm; what is needed to cover attention, and the window, above all others."""
        scores = ctx[WorstAttention] * ctx[OutputNorms]
        inside = ctx.places >= ctx.length - self.window
        uncovered = ctx[UncoveredAttention].masked_fill(inside, torch.inf)
        window = int(inside.sum())
        most = max(0, int((ctx.n - window) * ctx.fraction - window))
        ranks = uncovered.sort(dim=1, stable=True).indices.argsort(dim=1)
        return protect(scores, inside | ((uncovered < 0) & (ranks < most)))
