"""Contexts holding the signals that a method requires, so that every registered method runs through the same tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vtc.core.cache_signals import WindowAttention
from vtc.core.context import VisualContext
from vtc.core.eviction import CacheSelector
from vtc.core.grids import Grid
from vtc.core.observations import TokenGrids
from vtc.core.signals import SHARED, Signal
from vtc.registry import selectors
from vtc.selectors import Selector
from vtc.selectors.adaptive_sparse_vit import HeadWeightedAttention
from vtc.selectors.aim import PageRank
from vtc.selectors.dart import KeyLength, PromptStates, TextPivots
from vtc.selectors.flowcut import InformationFlow
from vtc.selectors.gemfilter import LastQueryLogits
from vtc.selectors.learned.atp import ModalityAttention, TextValues
from vtc.selectors.pixelprune import BlockPixels
from vtc.selectors.prumerge import WideClsAttention
from vtc.selectors.pyramiddrop import EnteringAttention
from vtc.selectors.sparsevlm import Raters, TextRows
from vtc.selectors.todre import AttentionExchange
from vtc.selectors.vflowopt import ContextRelevance, PixelEntropy

SELECTING = sorted(name for name, cls in selectors().items() if not issubclass(cls, CacheSelector) and not cls.trained)
"""Methods that select among the tokens of a picture, with their default options."""

SIZES = {"layers": 3, "heads": 2, "queries": 5, "T": 5, "D": 12, "d": 12, "6": 6}
"""Sizes of the named axes of signals; N is the number of tokens, and any other axis has two entries."""

METHOD_SIGNALS = (
    PageRank,
    ModalityAttention,
    TextValues,
    AttentionExchange,
    ContextRelevance,
    PixelEntropy,
    KeyLength,
    PromptStates,
    TextPivots,
    WideClsAttention,
    BlockPixels,
    InformationFlow,
    HeadWeightedAttention,
    EnteringAttention,
    Raters,
    TextRows,
    LastQueryLogits,
    WindowAttention,
)
"""Signals that one method brings with it."""


def shape_of(signal: Signal | type[Signal], n: int, width: int = SIZES["D"]) -> tuple[int, ...]:
    """Shape of the value of a signal for `n` tokens of features that are `width` wide."""
    return tuple({**SIZES, "N": n, "D": width}.get(axis, 2) for axis in signal.axes)


def make_context(
    selector: Selector,
    budget: int,
    grids: tuple[Grid, ...] = ((1, 6, 6),),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VisualContext:
    """Random values of all signals for the first stage of `selector`; one seed gives the same values in every dtype."""
    n = sum(math.prod(grid) for grid in grids)
    draw = torch.Generator().manual_seed(1000 + seed)
    stage = selector.stages()[0]
    required = {type(signal) for signal in stage.requires}
    signals: dict[Signal, Tensor] = {}
    for signal in (*stage.requires, *(kind() for kind in SHARED if kind not in required)):
        if signal.reads is TokenGrids:
            signals[signal] = signal.compute(TokenGrids(grids))
        else:
            value = torch.randn(*shape_of(signal, n), generator=draw)
            # What ends in an axis of tokens is a probability, everything else a vector per token or text token.
            signals[signal] = (value.softmax(-1) if signal.axes[-1] == "N" else value).to(dtype)
    return VisualContext(
        features=torch.randn(n, SIZES["D"], generator=draw).to(dtype),
        budget=budget,
        generator=torch.Generator().manual_seed(seed),
        grids=grids,
        modality="video" if any(t > 1 for t, _, _ in grids) else "image",
        site=stage.site,
        signals=signals,
    ).check()


def replace_floats(context: VisualContext, change: Callable[[Tensor], Tensor]) -> VisualContext:
    """Apply `change` to the features and to every floating-point signal of `context`, which is returned."""
    context.features = change(context.features)
    context.signals = {s: change(x) if x.is_floating_point() else x for s, x in context.signals.items()}
    return context.check()
