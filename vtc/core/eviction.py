"""Eviction: which entries of the key-value cache of one decoder layer stay, and how methods choose them.

A method at the cache is shown the entries of one row in one layer at a time, so that layers may keep other entries and
other numbers of them. Heads may keep other entries, but equally many.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError, InputError, UnsupportedMethodError
from ..plain import shown
from .actions import Action
from .context import VisualContext, check_finite
from .layer_budgets import LayerBudgets, parse_budgets
from .selection import Selection
from .selector import Selector
from .signals import Signal, named_signal
from .sites import CacheAfterPrefill, Site
from .stage import ModelShape, Stage

__all__ = [
    "SCOPES",
    "CacheContext",
    "CacheSelector",
    "DecodingState",
    "Eviction",
    "Leaving",
    "nothing_to_select",
    "protect",
]

SCOPES = ("visual", "all")
"""Which entries of a prompt may leave: those of its visual tokens, or its text as well."""


@dataclass(frozen=True, eq=False)
class Eviction:
    """K of N entries that stay, for all heads of a layer or for each, and optionally where the others go.

    Attributes
    ----------
    n
        N, entries before.
    keep
        (G, K) long, ascending and unique in each row; G is 1, or the number of key heads.
    assign
        (G, N) long or None: slot in 0..K-1 whose entry each entry is merged into, -1 for dropped; kept entries go to
        their own slot. Keys and values of a slot become the mean of what flows into it. None: nothing is merged.
    weight
        (G, N) float, at least 0, or None: what each entry counts in that mean; kept ones above 0. None: equally.

    Raises
    ------
    InputError
        Any of this does not hold.
    """

    n: int
    keep: Tensor
    assign: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        keep, n = self.keep, self.n
        if keep.ndim != 2 or keep.dtype != torch.long:
            raise InputError(f"Eviction.keep must be (heads or 1, K) long, got {tuple(keep.shape)} {keep.dtype}.")
        if keep.numel() and not bool((keep[:, :-1] < keep[:, 1:]).all() & (keep.min() >= 0) & (keep.max() < n)):
            raise InputError(f"Eviction.keep must be ascending, unique and within 0..{n - 1} in each head.")
        if self.assign is None:
            if self.weight is not None:
                raise InputError("Eviction.weight says how entries are merged, so it needs assign, which is None.")
            return
        if self.assign.shape != (len(keep), n) or self.assign.dtype != torch.long:
            found = f"{tuple(self.assign.shape)} {self.assign.dtype}"
            raise InputError(f"Eviction.assign must be ({len(keep)}, {n}) long, got {found}.")
        slots = torch.arange(self.k, device=keep.device)
        inside = bool(((self.assign >= -1) & (self.assign < self.k)).all())
        if not inside or not bool((self.assign.gather(1, keep) == slots).all()):
            raise InputError(f"Eviction.assign must hold slots 0..{self.k - 1} or -1, and kept entries their own.")
        if self.weight is not None:
            fits = self.weight.shape == self.assign.shape and bool((self.weight >= 0).all())
            if not fits or not bool((self.weight.gather(1, keep) > 0).all()):
                raise InputError(
                    f"Eviction.weight must be ({len(keep)}, {n}), at least 0, and above it for kept entries."
                )

    @classmethod
    def best(cls, scores: Tensor, k: int) -> Eviction:
        """Keep the `k` highest `scores`, (N,) for all heads or (H, N) for each; ties go to the lower index."""
        rows = scores if scores.ndim == 2 else scores[None]
        n = rows.shape[1]
        return cls(n, torch.stack([kernels.topk_indices(row, min(k, n)) for row in rows]))

    @property
    def k(self) -> int:
        """K, entries that stay in each head."""
        return self.keep.shape[1]

    def merge(self, x: Tensor) -> Tensor:
        """Reduce keys or values of the entries (H, N, d) to those of the slots (H, K, d).

        Without `assign` this is plain indexing. With it means are taken in float32 (float64 stays) and have the dtype
        of `x`.
        """
        heads, _, width = x.shape
        keep = self.keep.to(x.device).expand(heads, -1)
        if self.assign is None:
            return x.gather(1, keep[..., None].expand(-1, -1, width))
        assign = self.assign.to(x.device).expand(heads, -1)
        starts = torch.arange(heads, device=x.device)[:, None] * self.k
        slots = torch.where(assign >= 0, assign + starts, -1).flatten()
        weight = None if self.weight is None else self.weight.to(x.device).expand(heads, -1).flatten().float()
        wide = x.flatten(0, 1) if x.dtype == torch.float64 else x.flatten(0, 1).float()
        sums = kernels.segment_merge(wide, slots, heads * self.k, weight)
        sizes = kernels.segment_merge(torch.ones_like(wide[:, :1]), slots, heads * self.k, weight)
        return (sums / sizes).to(x.dtype).view(heads, self.k, width)


def protect(scores: Tensor, forced: Tensor) -> Tensor:
    """Return scores (N,) or (H, N) in which the entries `forced` (N,) rank above all others, equally."""
    return scores.masked_fill(forced, float(scores.amax()) + 1) if scores.numel() else scores


@dataclass(eq=False)
class CacheContext:
    """Facts about the N entries of one row in one decoder layer that may leave, for a method at the cache.

    ``ctx[WindowAttention]`` is the value of a signal that the method requires.

    Attributes
    ----------
    layer, layers
        The decoder layer (0-based), and how many there are.
    budget
        How many of the N entries to keep.
    places
        (N,) long, ascending: place of each entry among the `length` that the prompt has in this layer.
    length
        Entries of the prompt in this layer, those that cannot leave included.
    visual
        (N,) bool: entries of visual tokens.
    heads
        Key heads.
    scope
        "visual" or "all": which entries the N are.
    keep_ratio
        Fraction that the configuration keeps, if it names one.
    generator
        CPU generator, the only source of randomness a method may use.
    signals
        Values of the signals, in the form that each of them describes.
    """

    layer: int
    layers: int
    budget: int
    places: Tensor
    length: int
    visual: Tensor
    heads: int
    scope: str = "all"
    keep_ratio: float | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    signals: Mapping[Signal, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        """N, the number of entries that may leave."""
        return self.places.shape[0]

    @property
    def fraction(self) -> float:
        """What is to stay of the N entries: the ratio that `budget` was rounded from, or else its share of them."""
        ratio = self.keep_ratio
        rounded = ratio is not None and abs(ratio * self.n - self.budget) < 1
        return ratio if ratio is not None and rounded else self.budget / max(1, self.n)

    def __getitem__(self, signal: type[Signal] | Signal) -> Tensor:
        """Return the value of a signal, as `VisualContext` does."""
        return named_signal(self.signals, signal)

    def check(self) -> CacheContext:
        """Check the shapes of the signals against N and that every number is finite; returns the context itself.

        Raises
        ------
        InputError
            Naming the signal and what is wrong with it.
        """
        for signal, value in self.signals.items():
            signal.check(value, self.n)
        check_finite({signal.name: value for signal, value in self.signals.items()})
        return self


@dataclass(frozen=True)
class DecodingState:
    """Numbers of one row in one decoder layer's cache after a step of decoding.

    Attributes
    ----------
    layer
        The decoder layer (0-based).
    stored
        Entries of the row, those of the step included.
    kept
        Entries that were left after the prefill.
    seen
        Tokens that the row has seen, those of the step included.
    read
        Tokens that it had seen after the prefill.
    """

    layer: int
    stored: int
    kept: int
    seen: int
    read: int

    @property
    def excess(self) -> int:
        """Entries more than after the prefill."""
        return max(0, self.stored - self.kept)


@dataclass(frozen=True)
class Leaving:
    """Entries that leave at a step of decoding.

    Attributes
    ----------
    count
        How many.
    place
        Where they stand among the entries of the row, the oldest being 0: this one and those that follow it, while no
        others have left in between. None: those of the lowest scores.
    recent
        With scores: how many of the latest entries stay in any case.
    """

    count: int
    place: int | None = 0
    recent: int = 0


@dataclass(frozen=True)
class CacheSelector(Selector):
    """A method at the key-value caches: entries of one row and layer in, one `Eviction` out.

    Subclasses write `score`, or `evict` if they do more than rank. What they read is in `requires`, or in `reads` where
    it depends on their options. How many entries a layer keeps is not their business but that of `budgets`.

    Methods that name `CacheWhileDecoding` among their `sites` have a rule for decoding as well, `leaving`: at that site
    entries leave after the prefill and after each step. With `accumulates` the entries have scores: `accumulated` after
    the prefill, to which the attention of each step is added.

    Parameters
    ----------
    scope
        Which entries may leave: "visual" tokens' only, or those of "all" tokens of the prompt. The ratio is of these.
        Rows without a picture are left alone.
    budgets
        How the layers share the budget: "uniform", "pyramid", "squeeze", "cumulative" or "lazy", a mapping with such a
        `name` and its options, or the fraction that each layer keeps; see `vtc.core.layer_budgets`.

    Raises
    ------
    ConfigError
        An option is invalid.
    """

    sites: ClassVar[tuple[type[Site], ...]] = (CacheAfterPrefill,)
    reads_features: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    scope: str = "visual"
    budgets: Any = "uniform"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"{self.name}: scope must be one of {SCOPES}, got {shown(self.scope)}.")
        self.layer_budgets  # noqa: B018 # raises

    @property
    def layer_budgets(self) -> LayerBudgets:
        """How the layers share the budget."""
        return parse_budgets(self.budgets)

    def reads(self) -> tuple[Signal, ...]:
        """Return the signals that the method requires."""
        return self.requires

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, after the prefill."""
        shares = self.layer_budgets
        if shape is not None:
            shares.check(shape.decoder_layers, keep_ratio)
        requires = tuple(dict.fromkeys([*self.reads(), *shares.requires]))
        return (Stage(CacheAfterPrefill(), requires=requires, action=Action.EVICT),)

    @abstractmethod
    def score(self, ctx: CacheContext) -> Tensor:
        """(N,) for all heads, or (heads, N) for each, float32, higher is better."""

    def evict(self, ctx: CacheContext) -> Eviction:
        """Keep exactly ``min(ctx.budget, N)`` entries per head, the best scores."""
        return Eviction.best(self.score(ctx), ctx.budget)

    def accumulated(self, ctx: CacheContext) -> Tensor:
        """(N,) or (heads, N): scores of the entries when decoding begins; by default those of `score`."""
        return self.score(ctx)

    def leaving(self, state: DecodingState) -> Leaving:
        """Return what leaves one row of one layer after a step; by default nothing does."""
        return Leaving(0)

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Return how many entries each layer keeps, given those of one row in all layers."""
        counts = self.layer_budgets.share(contexts)
        return [min(max(count, 0), ctx.n) for count, ctx in zip(counts, contexts, strict=True)]

    def select(self, ctx: VisualContext) -> Selection:
        """Refuse: the method chooses entries of a layer, not tokens of a picture.

        Raises
        ------
        UnsupportedMethodError
            Always.
        """
        raise nothing_to_select(self.name)


def nothing_to_select(method: str) -> UnsupportedMethodError:
    """Make the error that a method at the caches has nothing to select without a model."""
    return UnsupportedMethodError(
        f"{method} evicts entries of key-value caches, other ones in each layer, so it selects nothing of a picture "
        "alone; call vtc.compress on a model"
    )
