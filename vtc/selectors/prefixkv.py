"""PrefixKV: every decoder layer keeps as many cache entries as hold the same share of its attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core.cache_signals import AttentionSums
from ..core.eviction import CacheContext, CacheSelector, DecodingState, Leaving, protect
from ..core.layer_budgets import CumulativeBudgets, FractionBudgets, LayerBudgets
from ..core.signals import Signal
from ..core.sites import CacheAfterPrefill, CacheWhileDecoding, Site
from ..errors import ConfigError
from ..plain import shown
from ..registry import register_selector

__all__ = ["PrefixKvSelector", "check_start", "leave_behind_prefix", "mean_over_heads"]


@register_selector
@dataclass(frozen=True)
class PrefixKvSelector(CacheSelector):
    """Rank the entries of each layer by the attention they received, and keep prefixes of other lengths per layer.

    ``score_j = sum over queries i of the mean over heads of A[i, j]``; all heads of a layer keep the same entries. The
    lengths follow from one cumulative threshold c that is searched such that all layers together keep the budget: layer
    l keeps the shortest prefix of its ranking that holds a share c of its attention.

    By default the threshold is searched for each prompt. The paper finds the lengths beforehand, as means over
    samples: `vtc.calibrate` makes such a profile, the fractions of ``budgets=(...)``, from a user's own prompts.

    At ``at="cache:decoding"`` a layer may hold the fraction of all tokens seen that it kept of the prompt, or with a
    profile its unrounded fraction. If it holds at least one entry more, the one leaves that stands 25 before the end of
    what the prefill left (in the middle of it, if that is shorter): behind a prefix that stays, older entries make way
    for the latest.

    Differences from the released code: it profiles the first row of a batch only and applies its lengths to all; its
    search may not end; and it ranks text like pictures, which here is ``scope="all"``.

    Parameters
    ----------
    scope
        As in `CacheSelector`.
    budgets
        "cumulative", or the fractions of a profile; see `CacheSelector`. By default and with ``scope="all"`` a layer
        keeps `start` entries and the last beside its prefix. With a profile it keeps one more than these at least, of
        short prompts as well, for which the released code fails.
    start
        How many of the first tokens of the prompt, and beside them its last one, stay before all others.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
    arXiv 2412.03409, sections 3.2 and 3.3.
    """

    name: ClassVar[str] = "prefixkv"
    paper: ClassVar[str] = "PrefixKV, arXiv 2412.03409"
    cost: ClassVar[str] = "N^2 d"
    requires: ClassVar[tuple[Signal, ...]] = (AttentionSums(),)
    sites: ClassVar[tuple[type[Site], ...]] = (CacheAfterPrefill, CacheWhileDecoding)

    budgets: Any = "cumulative"
    start: int = 1

    def __post_init__(self) -> None:
        check_start(self.name, self.start)  # which the layer budgets read
        super().__post_init__()

    @property
    def layer_budgets(self) -> LayerBudgets:
        """How the layers share the budget."""
        shares = super().layer_budgets
        if isinstance(shares, CumulativeBudgets) and shares.protect is None and self.scope == "all":
            return dataclasses.replace(shares, protect=self.start + 1)
        return shares

    def share(self, contexts: Sequence[CacheContext]) -> list[int]:
        """Return how many entries each layer keeps; by a profile, never less than the ends of the prompt and one."""
        counts = super().share(contexts)
        if self.scope == "all" and isinstance(self.layer_budgets, FractionBudgets):
            return [max(count, min(ctx.n, self.start + 2)) for count, ctx in zip(counts, contexts, strict=True)]
        return counts

    def leaving(self, state: DecodingState) -> Leaving:
        """Return one entry, or none."""
        profile = self.layer_budgets
        return leave_behind_prefix(
            state, profile.fractions[state.layer] if isinstance(profile, FractionBudgets) else None
        )

    def score(self, ctx: CacheContext) -> Tensor:
        """(N,) attention received."""
        edge = (ctx.places < self.start) | (ctx.places == ctx.length - 1)
        return protect(mean_over_heads(ctx), edge)


def leave_behind_prefix(state: DecodingState, fraction: float | None = None) -> Leaving:
    """Return one entry behind a prefix of the prompt's if the row holds more than its fraction, as released.

    That is `fraction`, if the prefill kept so much of all that the row has seen.
    """
    place = state.kept - 25
    if fraction is not None and state.kept == state.read - round((1 - fraction) * state.read):
        over = state.stored - state.seen * fraction >= 1
    else:  # of integers, so that it is exact
        over = state.stored * state.read - state.seen * state.kept >= state.read
    return Leaving(int(over), place if place >= 1 else state.kept // 2)


def check_start(method: str, start: Any) -> None:
    """Raise ConfigError unless `start` is a number of tokens."""
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ConfigError(f"{method}: start must be an integer of at least 0, got {shown(start)}.")


def mean_over_heads(ctx: CacheContext) -> Tensor:
    """(N,) attention that entries received from all queries, averaged over heads."""
    return ctx[AttentionSums].float().mean(dim=0)
