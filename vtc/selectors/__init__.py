"""The methods that ship with `vtc`; importing this package registers them all."""

from __future__ import annotations

from ..core.selector import ScoreSelector, Selector
from .adaptive_sparse_vit import AdaptiveSparseVitSelector
from .aim import AimSelector
from .atp import AtpSelector
from .divprune import DivPruneSelector
from .evs import EvsSelector
from .fastv import FastVSelector
from .flowcut import FlowCutSelector
from .pixelprune import PixelPruneSelector
from .random import RandomSelector
from .todre import ToDreSelector
from .uniform import UniformSelector
from .vflowopt import VFlowOptSelector
from .vidcom2 import VidCom2Selector
from .vscan import VScanSelector
from .vtc_cls import VtcClsSelector

__all__ = [
    "AdaptiveSparseVitSelector",
    "AimSelector",
    "AtpSelector",
    "DivPruneSelector",
    "EvsSelector",
    "FastVSelector",
    "FlowCutSelector",
    "PixelPruneSelector",
    "RandomSelector",
    "ScoreSelector",
    "Selector",
    "ToDreSelector",
    "UniformSelector",
    "VFlowOptSelector",
    "VScanSelector",
    "VidCom2Selector",
    "VtcClsSelector",
]
