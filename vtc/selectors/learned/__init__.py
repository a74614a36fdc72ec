"""Methods that own trained modules: one folder each, with the method, the module and how it is trained.

The modules of every method are kept in a folder of their own, see `folder`, which its option ``modules`` names.
"""

from __future__ import annotations

from .crosslmm import CrossLmmSelector
from .folder import Modules, read_modules, save_modules
from .llava_mini import LlavaMiniSelector
from .vision_remember import VisionRememberSelector

__all__ = [
    "CrossLmmSelector",
    "LlavaMiniSelector",
    "Modules",
    "VisionRememberSelector",
    "read_modules",
    "save_modules",
]
