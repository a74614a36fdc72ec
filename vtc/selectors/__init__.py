"""The methods that ship with `vtc`; importing this package registers them all."""

from __future__ import annotations

from .base import ScoreSelector, Selector
from .divprune import DivPruneSelector
from .fastv import FastVSelector
from .random import RandomSelector
from .uniform import UniformSelector
from .vtc_cls import VtcClsSelector

__all__ = [
    "DivPruneSelector",
    "FastVSelector",
    "RandomSelector",
    "ScoreSelector",
    "Selector",
    "UniformSelector",
    "VtcClsSelector",
]
