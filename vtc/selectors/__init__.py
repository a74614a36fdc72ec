"""The methods that ship with `vtc`; importing this package registers them all."""

from __future__ import annotations

from ..core.selector import ScoreSelector, Selector
from .adaptive_sparse_vit import AdaptiveSparseVitSelector
from .aim import AimSelector
from .cdpruner import CdPrunerSelector
from .chunkkv import ChunkKvSelector
from .dart import DartSelector
from .defensivekv import DefensiveKvSelector
from .divprune import DivPruneSelector
from .dycoke import DyCokeSelector
from .eadp import EadpSelector
from .elastic_cache import ElasticCacheSelector
from .evs import EvsSelector
from .fastervlm import FasterVlmSelector
from .fastv import FastVSelector
from .fastvid import FastVidSelector
from .flashvid import FlashVidSelector
from .flowcut import FlowCutSelector
from .gemfilter import GemFilterSelector
from .h2o import H2oSelector
from .hiprune import HiPruneSelector
from .holitom import HoliTomSelector
from .holov import HoloVSelector
from .kvpress import KvPressSelector
from .learned import (
    AtpSelector,
    CrossLmmSelector,
    LlavaMiniSelector,
    PixelReferSelector,
    VisionRememberSelector,
    VtcAskedSelector,
)
from .light_transfer import LightTransferSelector
from .mmtok import MmTokSelector
from .pixelprune import PixelPruneSelector
from .pool import PoolSelector
from .prefixkv import PrefixKvSelector
from .prumerge import PruMergePlusSelector, PruMergeSelector
from .prunevid import PruneVidSelector
from .pyramiddrop import PyramidDropSelector
from .random import RandomSelector
from .rediprune import ReDiPruneSelector
from .resize import ResizeSelector
from .scope import ScopeSelector
from .sliminfer import SlimInferSelector
from .snapkv import SnapKvSelector
from .sparsevlm import SparseVlmRankSelector, SparseVlmSelector
from .streaming import StreamingSelector
from .todre import ToDreSelector
from .tome import ToMeSelector
from .triattention import TriAttentionSelector
from .uniform import UniformSelector
from .vflowopt import VFlowOptSelector
from .vidcom2 import VidCom2Selector
from .visionzip import VisionZipSelector
from .vispruner import VisPrunerSelector
from .vscan import VScanSelector
from .vtc import VtcSelector
from .vtc_cls import VtcClsSelector

__all__ = [
    "AdaptiveSparseVitSelector",
    "AimSelector",
    "AtpSelector",
    "CdPrunerSelector",
    "ChunkKvSelector",
    "CrossLmmSelector",
    "DartSelector",
    "DefensiveKvSelector",
    "DivPruneSelector",
    "DyCokeSelector",
    "EadpSelector",
    "ElasticCacheSelector",
    "EvsSelector",
    "FastVSelector",
    "FastVidSelector",
    "FasterVlmSelector",
    "FlashVidSelector",
    "FlowCutSelector",
    "GemFilterSelector",
    "H2oSelector",
    "HiPruneSelector",
    "HoliTomSelector",
    "HoloVSelector",
    "KvPressSelector",
    "LightTransferSelector",
    "LlavaMiniSelector",
    "MmTokSelector",
    "PixelPruneSelector",
    "PixelReferSelector",
    "PoolSelector",
    "PrefixKvSelector",
    "PruMergePlusSelector",
    "PruMergeSelector",
    "PruneVidSelector",
    "PyramidDropSelector",
    "RandomSelector",
    "ReDiPruneSelector",
    "ResizeSelector",
    "ScopeSelector",
    "ScoreSelector",
    "Selector",
    "SlimInferSelector",
    "SnapKvSelector",
    "SparseVlmRankSelector",
    "SparseVlmSelector",
    "StreamingSelector",
    "ToDreSelector",
    "ToMeSelector",
    "TriAttentionSelector",
    "UniformSelector",
    "VFlowOptSelector",
    "VScanSelector",
    "VidCom2Selector",
    "VisPrunerSelector",
    "VisionRememberSelector",
    "VisionZipSelector",
    "VtcAskedSelector",
    "VtcClsSelector",
    "VtcSelector",
]
