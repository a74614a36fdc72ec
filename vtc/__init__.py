"""Compress the visual tokens of a transformers vision-language model in one call, and undo it in one call.

Importing this package imports nothing else: torch and transformers are loaded when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import vtc.report  # noqa: F401  # Bound once, here: importing it later would shadow the function of that name.
from vtc._version import __version__

if TYPE_CHECKING:
    from vtc.api import (
        compress,
        compressed,
        disabled,
        is_compressed,
        list_methods,
        remember,
        report,
        reports,
        restore,
        supported_models,
    )
    from vtc.config import CompressionConfig, load_stages, save_stages
    from vtc.core.actions import Action
    from vtc.core.cache_signals import AttentionSums, LocalAttention, ResidualCosine, WindowAttention
    from vtc.core.context import VisualContext
    from vtc.core.eviction import CacheContext, CacheSelector, Eviction
    from vtc.core.layer_budgets import LayerBudgets
    from vtc.core.observations import (
        DecoderAttention,
        DecoderCall,
        DecoderHidden,
        DecoderProbe,
        DecoderUpdate,
        EnteredAttention,
        PatchPixels,
        PromptText,
        TokenGrids,
        VisionAttention,
        VisionHidden,
    )
    from vtc.core.packing import PackPlan
    from vtc.core.regions import regions
    from vtc.core.selection import Selection
    from vtc.core.selector import ScoreSelector, Selector
    from vtc.core.signals import (
        ClsAttention,
        HiddenStates,
        Origin,
        PreProjector,
        ProbeSignal,
        ReceivedAttention,
        RegionCells,
        Signal,
        TextAttention,
        TextEmbeds,
        VisionKeys,
        VisionSignal,
    )
    from vtc.core.sites import (
        BeforeDecoder,
        CacheAfterPrefill,
        CacheWhileDecoding,
        DecoderLayer,
        Pixels,
        Site,
        VisionLayer,
    )
    from vtc.core.stage import ModelShape, Stage
    from vtc.core.updating import HiddenContext, UpdatingSelector
    from vtc.engine.memory import EncoderMemory
    from vtc.errors import (
        ConfigError,
        InputError,
        KernelError,
        StateError,
        UnsupportedMethodError,
        UnsupportedModelError,
        VtcError,
    )
    from vtc.functional import select
    from vtc.loading.load import load
    from vtc.pictures import open_image
    from vtc.registry import register_adapter, register_selector
    from vtc.report.report import Report, SegmentReport
    from vtc.report.visualize import visualize
    from vtc.selectors.kvpress import press
    from vtc.tuning.advise import Advice, advise
    from vtc.tuning.calibrate import calibrate
    from vtc.tuning.train import train
    from vtc.video.pipeline import VideoAnswer, VideoQAPipeline
else:
    del report

__all__ = [
    "Action",
    "Advice",
    "AttentionSums",
    "BeforeDecoder",
    "CacheAfterPrefill",
    "CacheContext",
    "CacheSelector",
    "CacheWhileDecoding",
    "ClsAttention",
    "CompressionConfig",
    "ConfigError",
    "DecoderAttention",
    "DecoderCall",
    "DecoderHidden",
    "DecoderLayer",
    "DecoderProbe",
    "DecoderUpdate",
    "EncoderMemory",
    "EnteredAttention",
    "Eviction",
    "HiddenContext",
    "HiddenStates",
    "InputError",
    "KernelError",
    "LayerBudgets",
    "LocalAttention",
    "ModelShape",
    "Origin",
    "PackPlan",
    "PatchPixels",
    "Pixels",
    "PreProjector",
    "ProbeSignal",
    "PromptText",
    "ReceivedAttention",
    "RegionCells",
    "Report",
    "ResidualCosine",
    "ScoreSelector",
    "SegmentReport",
    "Selection",
    "Selector",
    "Signal",
    "Site",
    "Stage",
    "StateError",
    "TextAttention",
    "TextEmbeds",
    "TokenGrids",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "UpdatingSelector",
    "VideoAnswer",
    "VideoQAPipeline",
    "VisionAttention",
    "VisionHidden",
    "VisionKeys",
    "VisionLayer",
    "VisionSignal",
    "VisualContext",
    "VtcError",
    "WindowAttention",
    "__version__",
    "advise",
    "calibrate",
    "compress",
    "compressed",
    "disabled",
    "is_compressed",
    "list_methods",
    "load",
    "load_stages",
    "open_image",
    "press",
    "regions",
    "register_adapter",
    "register_selector",
    "remember",
    "report",
    "reports",
    "restore",
    "save_stages",
    "select",
    "supported_models",
    "train",
    "visualize",
]

_HOME = {
    "vtc.api": (
        "compress",
        "compressed",
        "disabled",
        "is_compressed",
        "list_methods",
        "remember",
        "report",
        "reports",
        "restore",
        "supported_models",
    ),
    "vtc.config": ("CompressionConfig", "load_stages", "save_stages"),
    "vtc.core.actions": ("Action",),
    "vtc.core.cache_signals": ("AttentionSums", "LocalAttention", "ResidualCosine", "WindowAttention"),
    "vtc.core.context": ("VisualContext",),
    "vtc.core.eviction": ("CacheContext", "CacheSelector", "Eviction"),
    "vtc.core.layer_budgets": ("LayerBudgets",),
    "vtc.core.observations": (
        "DecoderAttention",
        "DecoderCall",
        "DecoderHidden",
        "DecoderProbe",
        "DecoderUpdate",
        "EnteredAttention",
        "PatchPixels",
        "PromptText",
        "TokenGrids",
        "VisionAttention",
        "VisionHidden",
    ),
    "vtc.core.packing": ("PackPlan",),
    "vtc.core.regions": ("regions",),
    "vtc.core.selection": ("Selection",),
    "vtc.core.signals": (
        "ClsAttention",
        "HiddenStates",
        "Origin",
        "PreProjector",
        "ProbeSignal",
        "ReceivedAttention",
        "RegionCells",
        "Signal",
        "TextAttention",
        "TextEmbeds",
        "VisionKeys",
        "VisionSignal",
    ),
    "vtc.core.sites": (
        "BeforeDecoder",
        "CacheAfterPrefill",
        "CacheWhileDecoding",
        "DecoderLayer",
        "Pixels",
        "Site",
        "VisionLayer",
    ),
    "vtc.core.stage": ("ModelShape", "Stage"),
    "vtc.core.updating": ("HiddenContext", "UpdatingSelector"),
    "vtc.engine.memory": ("EncoderMemory",),
    "vtc.errors": (
        "ConfigError",
        "InputError",
        "KernelError",
        "StateError",
        "UnsupportedMethodError",
        "UnsupportedModelError",
        "VtcError",
    ),
    "vtc.functional": ("select",),
    "vtc.loading.load": ("load",),
    "vtc.pictures": ("open_image",),
    "vtc.registry": ("register_adapter", "register_selector"),
    "vtc.report.report": ("Report", "SegmentReport"),
    "vtc.report.visualize": ("visualize",),
    "vtc.selectors.kvpress": ("press",),
    "vtc.core.selector": ("ScoreSelector", "Selector"),
    "vtc.tuning.advise": ("Advice", "advise"),
    "vtc.tuning.calibrate": ("calibrate",),
    "vtc.tuning.train": ("train",),
    "vtc.video.pipeline": ("VideoAnswer", "VideoQAPipeline"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = ("kernels", "reference", "relevance", "video")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"vtc.{name}")
    else:
        raise AttributeError(f"module 'vtc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
