"""LLaVA-Mini: learnable queries on a C x C grid look at the features of the tower and become C^2 tokens."""

from __future__ import annotations

from .fusion import Fusion
from .method import LlavaMiniSelector
from .module import Compressor, Projector, Resampler, sincos_2d
from .training import begin

__all__ = [
    "Compressor",
    "Fusion",
    "LlavaMiniSelector",
    "Projector",
    "Resampler",
    "begin",
    "sincos_2d",
]
