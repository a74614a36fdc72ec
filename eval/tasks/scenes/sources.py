"""Photographs, handwritten digits and fonts for the scenes, split so that training and test share none.

All of them come from installed packages (scikit-learn, scikit-image, matplotlib, Pillow); nothing is downloaded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import vtc

Split = Literal["train", "test"]

SPLITS: Final[tuple[Split, ...]] = ("train", "test")

PHOTOGRAPHS: Final[dict[Split, tuple[str, ...]]] = {
    "train": (
        "sklearn:china.jpg", "skimage:astronaut.png", "skimage:coffee.png", "skimage:hubble_deep_field.jpg",
        "skimage:motorcycle_left.png", "skimage:brick.png", "skimage:grass.png", "skimage:ihc.png",
    ),
    "test": (
        "sklearn:flower.jpg", "skimage:chelsea.png", "skimage:rocket.jpg", "skimage:retina.jpg", "skimage:gravel.png",
    ),
}  # fmt: skip

FONTS: Final[dict[Split, tuple[str | None, ...]]] = {
    "train": (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
        "STIXGeneralBol.ttf", "cmtt10.ttf",
    ),
    "test": (None, "cmss10.ttf", "cmb10.ttf"),  # None is Aileron, which is built into Pillow
}  # fmt: skip

_DIGIT_TRAIN_SHARE = 0.8


@lru_cache(maxsize=32)
def photograph(name: str) -> NDArray[np.uint8]:
    """Return one photograph as ``(H, W, 3)`` uint8; ``name`` is ``package:file`` from :data:`PHOTOGRAPHS`."""
    package, file = name.split(":")
    if package == "sklearn":
        import sklearn.datasets

        path = Path(sklearn.datasets.__file__).parent / "images" / file
    else:
        import skimage

        path = Path(skimage.__file__).parent / "data" / file
    return np.asarray(vtc.open_image(path))


@lru_cache(maxsize=4)
def handwritten(split: Split) -> tuple[NDArray[np.float64], ...]:
    """Return the handwritten digits of the split: ten arrays ``(n, 8, 8)`` with values 0..16, index = the digit."""
    from sklearn.datasets import load_digits

    data = load_digits()
    cut = int(len(data.target) * _DIGIT_TRAIN_SHARE)
    part = slice(0, cut) if split == "train" else slice(cut, None)
    return tuple(data.images[part][data.target[part] == digit] for digit in range(10))


@lru_cache(maxsize=4)
def fonts(split: Split) -> tuple[str | None, ...]:
    """Return the paths of the split's font files (None for Pillow's built-in font)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(None if name is None else str(folder / name) for name in FONTS[split])


def background(split: Split, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a random crop ``(side, side, 3)`` float32 in 0..255 of one of the split's photographs.

    Scale, reflection and contrast vary; contrast is reduced so that objects stay recognisable.
    """
    names = PHOTOGRAPHS[split]
    photo = photograph(names[int(rng.integers(len(names)))])
    height, width = photo.shape[:2]
    crop = int(rng.integers(min(side // 2, height, width), min(height, width, 2 * side) + 1))
    top = int(rng.integers(0, height - crop + 1))
    left = int(rng.integers(0, width - crop + 1))
    window = Image.fromarray(photo[top : top + crop, left : left + crop])
    pixels = np.asarray(window.resize((side, side), Image.Resampling.BILINEAR), np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    contrast = rng.uniform(0.55, 0.9)
    return np.ascontiguousarray(128 + (pixels - 128) * contrast).astype(np.float32)
