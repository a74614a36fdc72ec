"""PixelRefer-Lite: object tokens from regions that the user marks, in place of the tokens of the picture."""

from __future__ import annotations

from .method import PixelReferSelector, load_encoder
from .module import ObjectEncoder, position_grid
from .training import begin

__all__ = ["ObjectEncoder", "PixelReferSelector", "begin", "load_encoder", "position_grid"]
