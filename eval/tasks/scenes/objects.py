"""Drawing: shapes, handwritten digits, signs and distractors, all as alpha masks pasted on a float canvas.

Functions take sizes in pixels and return ``float32`` arrays. Random numbers come from the given generator alone, so the
same state of it gives the same picture.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eval.tasks.scenes.vocabulary import COLOURS, SIGN_COLOURS

Array = NDArray[np.float32]

_OVERSAMPLE = 4  # masks are drawn this many times larger and averaged down, against aliasing


def shape_mask(shape: str, size: int) -> Array:
    """Return the coverage of ``shape`` in a square of ``size`` pixels.

    Parameters
    ----------
    shape : str
        One of :data:`~eval.tasks.scenes.vocabulary.SHAPES`, or the distractor shapes ``"cross"`` and ``"ring"``.
    size : int
        Side of the square in pixels.

    Returns
    -------
    ndarray (size, size) float32
        1 inside, 0 outside, fractions on the edge.

    Raises
    ------
    KeyError
        If the shape is unknown.
    """
    big = size * _OVERSAMPLE
    image = Image.new("L", (big, big), 0)
    _PAINTERS[shape](ImageDraw.Draw(image), float(big))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255.0


def _circle(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse((0, 0, s - 1, s - 1), fill=255)


def _square(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.rectangle((0.06 * s, 0.06 * s, 0.94 * s, 0.94 * s), fill=255)


def _triangle(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.polygon([(0.5 * s, 0.02 * s), (0.99 * s, 0.95 * s), (0.01 * s, 0.95 * s)], fill=255)


def _star(draw: ImageDraw.ImageDraw, s: float) -> None:
    points = []
    for i in range(10):
        radius = 0.52 * s if i % 2 == 0 else 0.23 * s
        angle = math.pi * (i / 5 - 0.5)
        points.append((s / 2 + radius * math.cos(angle), 0.52 * s + radius * math.sin(angle)))
    draw.polygon(points, fill=255)


def _heart(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse((0.02 * s, 0.06 * s, 0.52 * s, 0.56 * s), fill=255)
    draw.ellipse((0.48 * s, 0.06 * s, 0.98 * s, 0.56 * s), fill=255)
    draw.polygon([(0.06 * s, 0.43 * s), (0.94 * s, 0.43 * s), (0.5 * s, 0.97 * s)], fill=255)


def _cup(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse((0.52 * s, 0.22 * s, 0.99 * s, 0.72 * s), fill=255)  # handle
    draw.ellipse((0.62 * s, 0.33 * s, 0.88 * s, 0.61 * s), fill=0)  # hole of the handle
    draw.polygon([(0.02 * s, 0.1 * s), (0.74 * s, 0.1 * s), (0.64 * s, 0.95 * s), (0.12 * s, 0.95 * s)], fill=255)


def _cross(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.rectangle((0.36 * s, 0, 0.64 * s, s), fill=255)
    draw.rectangle((0, 0.36 * s, s, 0.64 * s), fill=255)


def _ring(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse((0, 0, s - 1, s - 1), fill=255)
    draw.ellipse((0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s), fill=0)


_PAINTERS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cup": _cup,
    "cross": _cross,
    "ring": _ring,
}


def paste(canvas: Array, colour: Array, alpha: Array, top: int, left: int) -> None:
    """Blend ``colour`` into ``canvas`` in place.

    Parameters
    ----------
    canvas : ndarray (H, W, 3) float32
        Picture in 0..255.
    colour : ndarray (3,) or (h, w, 3) float32
        One colour or a picture of them.
    alpha : ndarray (h, w) float32
        Coverage in 0..1.
    top, left : int
        The upper left corner.
    """
    height, width = alpha.shape
    window = canvas[top : top + height, left : left + width]
    window += alpha[..., None] * (colour - window)


def jittered(colour: str, rng: np.random.Generator, amount: int = 14) -> Array:
    """Return the named colour with a small random shift per channel, ``(3,)`` float32."""
    base = np.asarray((COLOURS | SIGN_COLOURS)[colour], np.float32)
    return np.clip(base + rng.integers(-amount, amount + 1, 3), 0, 255).astype(np.float32)


def ink_for(paper: Array) -> Array:
    """Return black or white, whichever has more contrast with the colour ``paper (3,)``."""
    luminance = float(paper @ np.asarray((0.299, 0.587, 0.114), np.float32))
    return np.full(3, 12.0 if luminance > 130 else 250.0, np.float32)


def digit_mask(digit: NDArray[np.float64], size: int) -> Array:
    """Return the ink of a handwritten 8x8 digit (values 0..16) enlarged to ``(size, size)``, in 0..1."""
    image = Image.fromarray((np.asarray(digit) * (255.0 / 16.0)).astype(np.uint8))
    grown = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255.0
    return np.clip((grown - 0.33) / 0.4, 0.0, 1.0).astype(np.float32)  # raise the contrast, so that strokes have edges


@lru_cache(maxsize=256)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def text_mask(text: str, font: str | None, size: int) -> Array:
    """Return the ink of ``text`` in the font file ``font`` (None: Pillow's built-in Aileron), cropped to the ink.

    Returns
    -------
    ndarray (h, w) float32
        Coverage in 0..1; ``h`` is about ``0.75 * size``.
    """
    face = _font(font, size)
    left, top, right, bottom = face.getbbox(text)
    image = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2), 0)
    ImageDraw.Draw(image).text((1 - left, 1 - top), text, fill=255, font=face)
    return np.asarray(image, np.float32) / 255.0


@lru_cache(maxsize=64)
def _size_for(font: str | None, height: int) -> int:
    """Return the point size at which capitals of the font are about ``height`` pixels tall; fonts differ in it."""
    _, top, _, bottom = _font(font, 100).getbbox("H")
    return round(100 * height / (bottom - top))


def sign(text: str, font: str | None, height: int, paper: Array, margin: int = 6) -> Array:
    """Return a plate of colour ``paper (3,)`` with ``text`` on it, as a picture ``(h, w, 3)`` in 0..255.

    The text is in capitals, ``height`` pixels tall in every font: letters smaller than about two patches of the vision
    tower cannot be read from its features.
    """
    ink = text_mask(text.upper(), font, _size_for(font, height))
    plate = np.empty((ink.shape[0] + 2 * margin, ink.shape[1] + 2 * margin, 3), np.float32)
    plate[:] = paper
    edge = ink_for(paper)
    plate[:2], plate[-2:], plate[:, :2], plate[:, -2:] = edge, edge, edge, edge
    paste(plate, edge, ink, margin, margin)
    return plate


def distractor(kind: str, size: int, font: str | None, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return something salient that no question names.

    Parameters
    ----------
    kind : str
        One of :data:`~eval.tasks.scenes.vocabulary.DISTRACTORS`: grey or two-coloured ``cross`` and ``ring``,
        high-contrast ``checker`` and ``stripes``, and ``print`` (rows of small non-words).
    size : int
        Side in pixels.
    font : str or None
        Font file for ``print``.
    rng : numpy Generator
        Source of the colours and letters.

    Returns
    -------
    (picture, alpha) : ndarray (size, size, 3), ndarray (size, size)
    """
    dark, light = np.sort(rng.integers(0, 256, 2)).astype(np.float32)
    if light - dark < 90:  # keep the contrast high
        dark, light = np.float32(20), np.float32(235)
    rows, columns = np.mgrid[0:size, 0:size]
    if kind in ("checker", "stripes"):
        pitch = int(rng.integers(4, 9))
        phase = (rows // pitch + columns // pitch) if kind == "checker" else (rows + columns) // pitch
        grey = np.where(phase % 2 == 0, dark, light)
        return np.repeat(grey[..., None], 3, 2).astype(np.float32), np.ones((size, size), np.float32)
    if kind == "print":
        page = np.full((size, size, 3), 235.0, np.float32)
        for top in range(2, size - 9, 10):
            letters = "".join(rng.choice(list("bcdfghjklmnpqrstvwxz%&#"), 12))
            ink = text_mask(letters, font, 9)[: size - top, : size - 4]
            paste(page, np.full(3, 25.0, np.float32), ink, top, 2)
        return page, np.ones((size, size), np.float32)
    grey = dark + (light - dark) * ((columns // 4) % 2 if rng.random() < 0.5 else rng.random())
    picture = np.repeat(np.broadcast_to(grey, (size, size))[..., None], 3, 2).astype(np.float32)
    return picture, shape_mask(kind, size)
