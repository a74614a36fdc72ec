"""Methods that own trained modules: one folder each, with the method, the module and how it is trained.

The modules of every method are kept in a folder of their own, see `folder`, which its option ``modules`` names.
"""

from __future__ import annotations

from .atp import AtpSelector
from .crosslmm import CrossLmmSelector
from .decoder import Decoder
from .folder import Modules, read_modules, save_modules
from .llava_mini import LlavaMiniSelector
from .pixelrefer import PixelReferSelector
from .vision_remember import VisionRememberSelector
from .vtc_asked import VtcAskedSelector

__all__ = [
    "AtpSelector",
    "CrossLmmSelector",
    "Decoder",
    "LlavaMiniSelector",
    "Modules",
    "PixelReferSelector",
    "VisionRememberSelector",
    "VtcAskedSelector",
    "read_modules",
    "save_modules",
]
