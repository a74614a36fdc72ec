"""LLaVA-Mini: learnable queries on a C x C grid look at the features of the tower and become C^2 tokens."""

from __future__ import annotations

from .method import LlavaMiniSelector
from .module import Compressor, Projector, Resampler, sincos_2d

__all__ = ["Compressor", "LlavaMiniSelector", "Projector", "Resampler", "sincos_2d"]
