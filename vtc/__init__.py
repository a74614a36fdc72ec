"""Compress the visual tokens of a transformers vision-language model in one call, and undo it in one call."""

from vtc._version import __version__
from vtc.advice import Advice, advise
from vtc.api import compress, compressed, disabled, is_compressed, list_methods, report, restore, supported_models
from vtc.calibration import calibrate
from vtc.config import CompressionConfig
from vtc.context import Need, Stage, VisualContext, VisualSegment
from vtc.door import select
from vtc.errors import (
    ConfigError,
    InputError,
    KernelError,
    StateError,
    UnsupportedMethodError,
    UnsupportedModelError,
    VtcError,
)
from vtc.pipeline import VideoAnswer, VideoQAPipeline
from vtc.registry import register_adapter, register_selector
from vtc.report import Report, SegmentReport
from vtc.selection import PackPlan, Selection
from vtc.selectors.base import ScoreSelector, Selector
from vtc.visualize import visualize

__all__ = [
    "Advice",
    "CompressionConfig",
    "ConfigError",
    "InputError",
    "KernelError",
    "Need",
    "PackPlan",
    "Report",
    "ScoreSelector",
    "SegmentReport",
    "Selection",
    "Selector",
    "Stage",
    "StateError",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VideoAnswer",
    "VideoQAPipeline",
    "VisualContext",
    "VisualSegment",
    "VtcError",
    "__version__",
    "advise",
    "calibrate",
    "compress",
    "compressed",
    "disabled",
    "is_compressed",
    "list_methods",
    "register_adapter",
    "register_selector",
    "report",
    "restore",
    "select",
    "supported_models",
    "visualize",
]
