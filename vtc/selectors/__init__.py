"""The methods that ship with `vtc`; importing this package registers them all."""

from __future__ import annotations

from .aim import AimSelector
from .atp import AtpSelector
from .base import ScoreSelector, Selector
from .divprune import DivPruneSelector
from .fastv import FastVSelector
from .random import RandomSelector
from .todre import ToDreSelector
from .uniform import UniformSelector
from .vflowopt import VFlowOptSelector
from .vtc_cls import VtcClsSelector

__all__ = [
    "AimSelector",
    "AtpSelector",
    "DivPruneSelector",
    "FastVSelector",
    "RandomSelector",
    "ScoreSelector",
    "Selector",
    "ToDreSelector",
    "UniformSelector",
    "VFlowOptSelector",
    "VtcClsSelector",
]
