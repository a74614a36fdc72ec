"""Layer budgets: how the decoder layers share the entries that their key-value caches may keep.

A policy is given the entries of one row in all L layers and answers with L counts. Methods that rank entries and
policies that count them combine freely:

==============  =======================================================================================================
name            rule
==============  =======================================================================================================
``uniform``     every layer keeps the same fraction
``pyramid``     the first layers keep most, by a straight line (PyramidKV)
``squeeze``     layers whose attention changes the hidden states least keep least (SqueezeAttention)
``cumulative``  every layer keeps the same share of its attention (PrefixKV)
``lazy``        layers that attend to both ends only keep nothing in between (LightTransfer), the others everything
fractions       L fractions, found beforehand by `vtc.calibrate` (PrefixKV's profiles, EvolKV's evolution)
==============  =======================================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..plain import real, shown
from .cache_signals import AttentionSums, LocalAttention, ResidualCosine
from .signals import Signal

if TYPE_CHECKING:
    from .eviction import CacheContext

__all__ = [
    "CumulativeBudgets",
    "FractionBudgets",
    "LayerBudgets",
    "LazyBudgets",
    "PyramidBudgets",
    "SqueezeBudgets",
    "UniformBudgets",
    "cumulative_drops",
    "parse_budgets",
    "smallest_split",
]


@dataclass(frozen=True)
class LayerBudgets(ABC):
    """A rule by which layers share a budget."""

    @property
    def requires(self) -> tuple[Signal, ...]:
        """Signals that it reads, besides those of the method."""
        return ()

    def check(self, layers: int, keep_ratio: float | None) -> None:  # noqa: B027 # most rules fit everywhere
        """Raise ConfigError if the rule does not fit a decoder of so many `layers`, or the ratio that is asked for."""

    @abstractmethod
    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Return how many entries each layer keeps.

        Parameters
        ----------
        contexts
            One per layer; `budget` is what the layer would keep if all kept the same fraction.
        """


@dataclass(frozen=True)
class UniformBudgets(LayerBudgets):
    """Every layer keeps the same fraction."""

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Return the budgets as they are."""
        return [ctx.budget for ctx in contexts]


@dataclass(frozen=True)
class FractionBudgets(LayerBudgets):
    """Every layer keeps a fraction of its own: ``N - round((1 - fraction) * N)`` entries, half to even.

    Parameters
    ----------
    fractions
        (L,) fractions between 0 and 1. Their mean is what the configuration keeps, to within 0.01.
    """

    fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        found = [real(value) for value in self.fractions]
        if not found or any(value is None or not 0 <= value <= 1 for value in found):
            raise ConfigError(f"budgets: fractions lie between 0 and 1, one per layer, got {shown(self.fractions)}.")

    def check(self, layers: int, keep_ratio: float | None) -> None:
        """Refuse fractions of another model, or of another budget."""
        if len(self.fractions) != layers:
            raise ConfigError(
                f"budgets has {len(self.fractions)} fractions, but this model has {layers} decoder layers"
            )
        mean = sum(self.fractions) / layers
        if keep_ratio is None or abs(mean - keep_ratio) > 0.01:
            asked = "a number of tokens" if keep_ratio is None else f"keep_ratio={keep_ratio:g}"
            raise ConfigError(
                f"budgets keeps {mean:.3f} on average, but {asked} was asked for; give keep_ratio={mean:.2f}"
            )

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Round what every layer drops."""
        return [ctx.n - round((1 - share) * ctx.n) for share, ctx in zip(self.fractions, contexts, strict=True)]


@dataclass(frozen=True)
class PyramidBudgets(LayerBudgets):
    """The first layer keeps most, the last least, with equal steps between (PyramidKV, arXiv 2406.02069).

    Parameters
    ----------
    beta
        The last layer keeps ``1 / beta`` of the average; more where the first layer has no more entries to keep.
    window
        Entries that every layer keeps anyway and that are left out of the line. None: those of the window of `snapkv`
        and `chunkkv`, if these may leave at all (``scope="all"``), and otherwise 0.
    variant
        "released": integer division, and equal budgets where a layer has less than twice the average; "exact": true
        division, rounded at the end, with the window as part of the line (as kvpress has it), and equal budgets where
        the last layer would keep less than the window, or more than the first.
    """

    beta: float = 20
    window: int | None = None
    variant: str = "released"

    def __post_init__(self) -> None:
        beta = real(self.beta)
        if beta is None or beta < 1:
            raise ConfigError(f"budgets: pyramid's beta is a number of at least 1, got {shown(self.beta)}.")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 0):
            raise ConfigError(f"budgets: pyramid's window is an integer of at least 0, got {shown(self.window)}.")
        if self.variant not in ("released", "exact"):
            raise ConfigError(f'budgets: pyramid\'s variant is "released" or "exact", got {shown(self.variant)}.')

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Go down the line."""
        last = len(contexts) - 1
        rule = self._released if self.variant == "released" else self._exact
        return [rule(ctx, ctx.layer, max(last, 1)) for ctx in contexts]

    def _released(self, ctx: CacheContext, layer: int, last: int) -> int:
        window = self.window or 0
        scored = ctx.budget - window
        if ctx.n <= ctx.budget or ctx.n < 2 * scored or scored < 1:
            return ctx.budget
        low = int(scored // self.beta)
        high = 2 * scored - low
        if high >= ctx.n - window:
            high = ctx.n - window
            low = 2 * scored - high
        return high - layer * ((high - low) // last) + window

    def _exact(self, ctx: CacheContext, layer: int, last: int) -> int:
        mean, window = ctx.n * ctx.fraction, self.window or 0
        low = mean / self.beta
        high = 2 * mean - low
        if high >= ctx.n - window:
            high = ctx.n - window
            low = 2 * mean - high
        if not high >= low >= window:
            high = low = mean
        return round(high - layer * ((high - low) / last))


@dataclass(frozen=True)
class SqueezeBudgets(LayerBudgets):
    """Layers whose attention changes the hidden states least keep little; all others share the rest (SqueezeAttention).

    The cosine between the residual stream before and after the attention of each layer, averaged over the tokens of the
    prompt, falls into three clusters (exact k-means of L numbers). Layers of the cluster with the highest cosines keep
    `least`, the others ``(L b - n3 least) / (n1 + n2)``, where b is the budget. Above 1 that is cut to 1, and what is
    left goes to the third cluster; the released code would keep more entries than there are.

    Parameters
    ----------
    least
        Fraction that layers of the third cluster keep; None: 0.4 of the budget.

    References
    ----------
    "SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal Budget", arXiv 2404.04793.
    """

    least: float | None = None

    @property
    def requires(self) -> tuple[Signal, ...]:
        """How little attention changes the hidden states."""
        return (ResidualCosine(),)

    def __post_init__(self) -> None:
        least = None if self.least is None else real(self.least)
        if self.least is not None and (least is None or not 0 <= least <= 1):
            raise ConfigError(f"budgets: squeeze's least is a fraction between 0 and 1, got {shown(self.least)}.")

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Split the layers into three groups."""
        group = smallest_split([float(ctx[ResidualCosine]) for ctx in contexts], 3)
        third, size = sum(g == 2 for g in group), sum(ctx.n for ctx in contexts)
        budget = contexts[0].fraction
        if any(ctx.fraction != budget for ctx in contexts):
            budget = sum(ctx.n * ctx.fraction for ctx in contexts) / size
        least = min(0.4 * budget if self.least is None else self.least, budget)
        if third == len(contexts):
            return [ctx.budget for ctx in contexts]
        most = (len(contexts) * budget - third * least) / (len(contexts) - third)
        if most > 1 and third:
            most, least = 1.0, (len(contexts) * budget - (len(contexts) - third)) / third
        return [int((least if g == 2 else min(most, 1.0)) * ctx.n) for g, ctx in zip(group, contexts, strict=True)]


@dataclass(frozen=True)
class LazyBudgets(LayerBudgets):
    """Lazy layers keep nothing, all others everything (LightTransfer, arXiv 2410.13846).

    A layer is the lazier, the more of the last query's attention goes to the first `initial` and the latest `recent`
    entries before it. As many of the laziest layers are emptied as the budget asks for, rounded.

    Parameters
    ----------
    initial, recent
        Entries at both ends. With ``scope="all"`` lazy layers keep so many, which the budget then exceeds; pictures
        between them leave whole.
    """

    initial: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        self.requires  # noqa: B018 # raises

    @property
    def requires(self) -> tuple[Signal, ...]:
        """The share of attention at both ends."""
        return (LocalAttention(self.initial, self.recent),)

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Empty the laziest layers."""
        total, kept = sum(ctx.n for ctx in contexts), sum(ctx.budget for ctx in contexts)
        lazy = round(len(contexts) * (1 - kept / total)) if total else 0
        shares = [float(ctx[LocalAttention]) for ctx in contexts]
        laziest = set(sorted(range(len(shares)), key=lambda layer: -shares[layer])[:lazy])
        ends = self.initial + self.recent
        left = [min(ctx.n, ends) if ctx.scope == "all" else 0 for ctx in contexts]
        return [left[layer] if layer in laziest else ctx.n for layer, ctx in enumerate(contexts)]


@dataclass(frozen=True)
class CumulativeBudgets(LayerBudgets):
    """Every layer keeps the shortest prefix of its ranked entries that has a share c of its attention (PrefixKV).

    The share is the same for all layers and is searched such that the layers together keep the budget. As released, the
    numbers to drop are then scaled to it and truncated, so that up to L entries more stay.

    Parameters
    ----------
    protect
        Entries that every layer keeps beside the prefix; None: those that the method says, or none.

    References
    ----------
    "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
    arXiv 2412.03409.
    """

    protect: int | None = None

    @property
    def requires(self) -> tuple[Signal, ...]:
        """Attention received."""
        return (AttentionSums(),)

    def __post_init__(self) -> None:
        if self.protect is not None and (not isinstance(self.protect, int) or self.protect < 0):
            raise ConfigError(f"budgets: cumulative's protect is an integer of at least 0, got {shown(self.protect)}.")

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Search the share of attention."""
        scores = [ctx[AttentionSums].float().mean(dim=0) for ctx in contexts]
        target = sum(ctx.n * (1 - ctx.fraction) for ctx in contexts)
        protect = self.protect or 0
        drops = cumulative_drops(scores, target, protect)
        scale = target / max(1, sum(drops))
        most = [max(0, ctx.n - protect) for ctx in contexts]
        return [ctx.n - min(int(drop * scale + 1e-9), m) for ctx, drop, m in zip(contexts, drops, most, strict=True)]


def cumulative_drops(scores: Sequence[Tensor], target: float, protect: int = 0) -> list[int]:
    """Compute how many entries each layer drops if all keep the same share of their attention.

    Parameters
    ----------
    scores
        L tensors (N,), at least 0.
    target
        Entries to drop, all layers together.
    protect
        Entries that a layer keeps beside its prefix: it drops so many fewer, but never less than none.

    Returns
    -------
    list of int
        Their sum is within 5 of `target`, as in the released bisection, where some share comes so close.
    """
    sums = [score.double().sort(descending=True).values.cumsum(0) for score in scores]
    sums = [total / total[-1].clamp(min=1e-30) if len(total) else total for total in sums]
    low, high = 0.0, 1.0
    drops: list[int] = []
    for _ in range(64):  # the released search has no end where no share comes within 5
        share = (low + high) / 2
        kept = [int(torch.searchsorted(total, share)) + 1 for total in sums]
        drops = [max(0, len(total) - count - protect) for total, count in zip(sums, kept, strict=True)]
        excess = sum(drops) - target
        if abs(excess) < 5:
            break
        low, high = (share, high) if excess > 0 else (low, share)
    return drops


def smallest_split(values: Sequence[float], count: int) -> list[int]:
    """Split numbers into `count` clusters of the smallest sum of squares: exact k-means in one dimension.

    Returns
    -------
    list of int
        Cluster of each number, 0 has the smallest ones; fewer clusters if there are fewer numbers.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranked = [values[i] for i in order]
    n, count = len(ranked), min(count, len(ranked))

    def spread(a: int, b: int) -> float:
        part = ranked[a:b]
        mean = sum(part) / len(part)
        return sum((value - mean) ** 2 for value in part)

    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]
    for _ in range(count):
        step: dict[int, tuple[float, list[int]]] = {}
        for start, (cost, borders) in best[-1].items():
            for stop in range(start + 1, n + 1):
                found = (cost + spread(start, stop), [*borders, stop])
                if stop not in step or found[0] < step[stop][0]:
                    step[stop] = found
        best.append(step)
    borders = best[count][n][1]
    clusters = [0] * n
    for rank, i in enumerate(order):
        clusters[i] = next(cluster for cluster, stop in enumerate(borders) if rank < stop)
    return clusters


_NAMES: dict[str, type[LayerBudgets]] = {
    "uniform": UniformBudgets,
    "pyramid": PyramidBudgets,
    "squeeze": SqueezeBudgets,
    "cumulative": CumulativeBudgets,
    "lazy": LazyBudgets,
}


def parse_budgets(budgets: Any) -> LayerBudgets:
    """Read a policy from its name, a mapping with a `name` and options, or a sequence of fractions.

    Raises
    ------
    ConfigError
        It is none of these, or an option is wrong.
    """
    if isinstance(budgets, LayerBudgets):
        return budgets
    if isinstance(budgets, str):
        budgets = {"name": budgets}
    if isinstance(budgets, Mapping):
        options = {key: value for key, value in budgets.items() if key != "name"}
        cls = _NAMES.get(str(budgets.get("name")))
        if cls is not None and set(options) <= {item.name for item in fields(cls)}:
            return cls(**options)
    elif isinstance(budgets, Sequence):
        return FractionBudgets(tuple(budgets))
    known = "; ".join(f"{name}({', '.join(item.name for item in fields(cls))})" for name, cls in _NAMES.items())
    raise ConfigError(
        f"budgets must be a sequence of fractions, one per layer, or one of the policies {known}, as a name or as a "
        f"mapping with `name` and options; got {shown(budgets)}."
    )
