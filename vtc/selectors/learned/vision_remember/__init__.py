"""Vision Remember: between decoder layers, compressed tokens resample features of several layers of the tower."""

from __future__ import annotations

from .method import VisionLevels, VisionRememberSelector
from .module import LocalAttention, Resamplers
from .training import begin

__all__ = ["LocalAttention", "Resamplers", "VisionLevels", "VisionRememberSelector", "begin"]
