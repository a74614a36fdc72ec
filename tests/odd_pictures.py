"""A picture that is right only if its orientation and its 16 bits are both heeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 24, 32
"""Width and height as seen."""


def write(path: Path) -> Path:
    """Write grey values of 16 bits that lie on their side: seen, the upper half is black and the lower one grey."""
    pixels = np.zeros((SIZE[0], SIZE[1]), np.uint16)
    pixels[:, SIZE[1] // 2 :] = 32768
    exif = Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def is_right(image: Any) -> bool:
    """Whether a picture or an array (H, W, 3) shows it so."""
    pixels = np.asarray(image)
    half = SIZE[1] // 2
    right = pixels.shape == (SIZE[1], SIZE[0], 3) and (pixels[:half] == 0).all() and (pixels[half:] == 128).all()
    return bool(right)
