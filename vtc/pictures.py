"""Pictures from files or memory as what models take: upright, 8 bits per channel, RGB, decoded in full."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, BinaryIO

from vtc.errors import ConfigError, InputError
from vtc.limits import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["open_image", "to_rgb"]

_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned before it is shown, 1 to 8."""


def open_image(source: str | os.PathLike[str] | bytes | BinaryIO | Image) -> Image:
    """Open a picture and decode it in full, as it is meant to be seen.

    - The EXIF orientation is applied, as every viewer does; the result carries no metadata, so that nothing applies it
      a second time.
    - Grey values of 16 bits (modes "I;16" and "I") are divided by 257, so that white stays white and black black.
    - Transparent pixels show white behind them.
    - Of an animation the first frame is taken; of an opened picture, the frame at which it stands.
    - CMYK, palettes and the other modes are converted by pillow. Colour profiles are not applied.

    No global state of pillow is changed, so it may be called from several threads.

    Parameters
    ----------
    source : path, bytes, binary file or PIL.Image
        The file's path, its content, a file object that can be read from the start, or a picture that was opened with
        pillow. A picture is not changed, and a file object stays open.

    Returns
    -------
    PIL.Image
        A new picture of mode "RGB".

    Raises
    ------
    InputError
        The file is missing, a folder, empty, broken or no picture; it has no pixels, or more than `MAX_PIXELS` (89
        million), which is found before it is decoded; or its values are 32-bit floats, or integers beyond 16 bits,
        which do not say what is white. The message names the file.
    ConfigError
        Pillow is not installed.
    """
    try:
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise ConfigError('Reading pictures needs pillow: pip install "vtc[vision]".') from error

    name = _name(source)
    if isinstance(source, Pillow.Image):
        return _finished(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    elif not isinstance(source, (str, os.PathLike)) and not callable(getattr(source, "read", None)):
        raise InputError(
            f"A picture is a path, bytes, a binary file or a PIL image, got {type(source).__name__}: convert it first, "
            "an array by PIL.Image.fromarray."
        )
    try:
        opened = Pillow.open(source)  # reads the head alone
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file.") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: a folder, not a picture.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: {'the file is empty' if _is_empty(source) else _NO_PICTURE}.") from error
    except Pillow.DecompressionBombError as error:
        raise InputError(f"{name}: {_too_large()}: {_line(error)}.") from error
    except Exception as error:  # every format has a reader of its own, and readers have errors of their own
        raise InputError(f"{name}: cannot be opened as a picture: {_line(error)}.") from error
    with opened:
        return _finished(opened, name)


def to_rgb(image: Image, name: str = "the picture") -> Image:
    """Convert a picture to a new one of mode "RGB" without metadata, pixel by pixel and as it lies.

    This is `open_image` without the EXIF orientation, for pictures that were already shown to a processor: processors
    do not turn them.

    Raises
    ------
    InputError
        As `open_image`.
    """
    _check_pixels(image, name)
    try:
        image.load()
    except Exception as error:  # as above
        raise InputError(f"{name}: cannot be decoded: {_line(error)}.") from error
    _check_pixels(image, name)  # icons say their true size when they are decoded
    if image.mode == "F":
        raise InputError(
            f"{name}: its values are 32-bit floats (mode F), which do not say what is white: scale it to 0 to 255 and "
            "convert it to mode L first."
        )
    try:
        if image.mode == "I" or image.mode.startswith("I;16"):
            rgb = _from_16_bits(image, name)
        elif image.has_transparency_data:
            rgb = _on_white(image)
        else:
            rgb = image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # pillow knows no way from some modes, such as LAB
        raise InputError(f"{name}: mode {image.mode} cannot be converted to RGB: {_line(error)}.") from error
    rgb.info = {}
    return rgb


# ------------------------------------------------------------------------------------------------------------- pixels


def _finished(image: Image, name: str) -> Image:
    from PIL.Image import Transpose

    turned = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    rgb = to_rgb(image, name)
    # Only now: the tag may stand behind the pixels, and a TIFF file is turned by pillow, which drops the tag.
    try:
        turn = turned.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF data leave the picture itself whole
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _from_16_bits(image: Image, name: str) -> Image:
    import numpy as np
    from PIL import Image as Pillow

    values = np.asarray(image.convert("I"))
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(
            f"{name}: its values reach from {low} to {high} (mode {image.mode}), and those of a grey picture from 0 to "
            "65535: scale it to 0 to 255 and convert it to mode L first."
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one value of grey that is not to be seen
        grey[values == transparent] = 255
    return Pillow.fromarray(grey).convert("RGB")


def _on_white(image: Image) -> Image:
    from PIL import Image as Pillow

    # Pillow leads from colours multiplied by their opacity to plain ones, and from there to the rest.
    plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    visible = (image if plain is None else image.convert(plain)).convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", visible.size, "white"), visible).convert("RGB")


# ------------------------------------------------------------------------------------------------------------- errors

_NO_PICTURE = "not a picture that pillow can read"


def _check_pixels(image: Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name}: the picture has no pixels, its size is {width} x {height}.")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {_too_large()}: {width} x {height} = {width * height:,} pixels.")


def _too_large() -> str:
    return f"more than {MAX_PIXELS:,} pixels (MAX_PIXELS), so it is not decoded; make it smaller first"


def _name(source: Any) -> str:
    """Name the source in an error: its path where it has one."""
    if isinstance(source, (str, os.PathLike)):
        name = str(os.fspath(source))
        return name if name and "\0" not in name else f"the path {name!r}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the picture of {len(source)} bytes"
    known = getattr(source, "name", None) or getattr(source, "filename", None)
    return known if isinstance(known, str) and known else "the picture"


def _is_empty(source: Any) -> bool:
    if isinstance(source, io.BytesIO):
        return not source.getbuffer().nbytes
    try:
        return isinstance(source, (str, os.PathLike)) and os.path.getsize(source) == 0
    except OSError:
        return False


def _line(error: BaseException) -> str:
    message = str(getattr(error, "strerror", None) or error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
