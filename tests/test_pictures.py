"""One way to open a picture: upright, right in brightness, decoded in full, or refused in a line that names it."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vtc
from vtc import pictures
from vtc.limits import MAX_PIXELS

ORIENTATION = 0x0112

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]], np.uint8)


def stored(orientation: int) -> np.ndarray[Any, Any]:
    """`COLOURS` as a camera stores them under this value of the tag; by the definition of its values."""
    rows, columns = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    # Row 0 of what is stored is this edge of what is seen, and column 0 that one.
    pixels = COLOURS if rows in ("top", "bottom") else COLOURS.transpose(1, 0, 2)
    return pixels[:: -1 if rows in ("bottom", "right") else 1, :: -1 if columns in ("bottom", "right") else 1]


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "photo"
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(stored(orientation))).save(path, kind, exif=tagged(orientation), **options)
    image = vtc.open_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), COLOURS)
    assert ORIENTATION not in image.getexif(), "the tag no longer applies"
    assert np.array_equal(np.asarray(vtc.open_image(image)), COLOURS), "and is not applied twice"
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(vtc.open_image(opened)), COLOURS)


def test_photographs_stand_upright(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.kron(stored(6), np.ones((16, 16, 1), np.uint8))).save(path, exif=tagged(6), quality=95)
    image = vtc.open_image(path)
    assert image.size == (48, 32)
    assert image.getpixel((8, 8))[0] > 200  # type: ignore[index]


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", bytes(tagged(9).tobytes())])
def test_broken_exif_data_leave_the_picture_whole(exif: bytes) -> None:
    image = vtc.open_image(encoded(Image.fromarray(COLOURS), exif=exif))
    assert np.array_equal(np.asarray(image), COLOURS)


# ----------------------------------------------------------------------------------------------------------- brightness


def grey(image: Image.Image) -> list[int]:
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


DEEP = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_become_8(kind: str) -> None:
    data = encoded(Image.fromarray(DEEP), kind)
    assert grey(vtc.open_image(data)) == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bits_in_memory_become_8(mode: str) -> None:
    image = Image.fromarray(DEEP.astype(np.int32)).convert(mode)
    assert image.mode == mode
    assert grey(vtc.open_image(image)) == [0, 0, 1, 1, 128, 255]
    assert image.mode == mode, "the given picture stays as it is"


def test_a_transparent_value_of_16_bits_is_white() -> None:
    data = encoded(Image.fromarray(DEEP), transparency=257)
    assert grey(vtc.open_image(data)) == [0, 0, 1, 255, 128, 255]


@pytest.mark.parametrize("low_high", [(-1, 3), (0, 65536)])
def test_integers_beyond_16_bits_are_refused(low_high: tuple[int, int]) -> None:
    image = Image.fromarray(np.array([low_high], np.int32))
    with pytest.raises(vtc.InputError, match=rf"reach from {low_high[0]} to {low_high[1]}"):
        vtc.open_image(image)


def test_floats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(path)
    with pytest.raises(vtc.InputError, match=r"depth\.tiff: its values are 32-bit floats \(mode F\)"):
        vtc.open_image(path)


# ---------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "PA", "La", "RGBa"])
def test_every_mode_keeps_its_colours(mode: str) -> None:
    image = Image.new("RGB", (3, 2), (255, 255, 255))
    image.putpixel((1, 1), (0, 0, 0))
    through = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode)
    image = (image if through is None else image.convert(through)).convert(mode)
    assert image.mode == mode
    assert grey(vtc.open_image(image)) == [255, 255, 255, 255, 0, 255]


def test_a_mode_without_a_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: Any) -> None:
        raise ValueError("conversion not supported")

    monkeypatch.setattr("PIL.Image.Image.convert", convert)
    with pytest.raises(vtc.InputError, match="the picture: mode LAB cannot be converted to RGB: conversion not supp"):
        vtc.open_image(Image.new("LAB", (2, 2)))


def test_cmyk_photographs_are_read() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert np.abs(np.asarray(vtc.open_image(data)).astype(int) - (255, 0, 0)).max() < 4


def test_what_is_transparent_shows_white() -> None:
    hidden = Image.fromarray(np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 51]]], np.uint8))
    wanted = [[[255, 255, 255], [200, 0, 0], [204, 204, 204]]]
    assert np.asarray(vtc.open_image(encoded(hidden))).tolist() == wanted
    assert np.asarray(vtc.open_image(hidden)).tolist() == wanted


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_shows_white(kind: str) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encoded(image, kind, transparency=0)
    assert np.asarray(vtc.open_image(data)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(("mode", "value"), [("1", 0), ("L", 9), ("RGB", (9, 8, 7))])
def test_a_transparent_value_shows_white(mode: str, value: Any) -> None:
    data = encoded(Image.new(mode, (2, 2), value), transparency=value)
    assert set(grey(vtc.open_image(data))) == {255}


def test_an_animation_shows_its_first_frame() -> None:
    first, second = Image.new("RGB", (4, 4), "black"), Image.new("RGB", (4, 4), "white")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert set(grey(vtc.open_image(data))) == {0}
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert set(grey(vtc.open_image(opened))) == {255}, "an opened one the frame at which it stands"
    assert opened.tell() == 1


# -------------------------------------------------------------------------------------------------------------- sources


def test_a_picture_comes_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(COLOURS).save(path)
    data = path.read_bytes()
    with path.open("rb") as file:
        file.seek(5)
        for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), file):
            assert np.array_equal(np.asarray(vtc.open_image(source)), COLOURS)  # type: ignore[arg-type]
        assert not file.closed


def test_an_opened_picture_is_copied() -> None:
    given = Image.fromarray(COLOURS)
    given.info["note"] = "mine"
    made = vtc.open_image(given)
    made.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(given), COLOURS)
    assert given.info == {"note": "mine"}
    assert made.info == {}


@pytest.mark.parametrize("source", [None, 3, COLOURS, ["photo.png"]], ids=["none", "number", "array", "list"])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(vtc.InputError, match=rf"a binary file or a PIL image, got {type(source).__name__}"):
        vtc.open_image(source)


# --------------------------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_picture_that_breaks_off_is_refused(kind: str, part: float, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(vtc.InputError, match=rf"^{path}: "):
        vtc.open_image(path)


def test_what_cannot_be_opened_is_named_with_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    with pytest.raises(vtc.InputError, match=r"photo\.png: no such file\.$"):
        vtc.open_image(path)
    with pytest.raises(vtc.InputError, match=r"^the path 'a\\x00b\.png': cannot be opened"):
        vtc.open_image("a\0b.png")
    with pytest.raises(vtc.InputError, match=rf"^{tmp_path}: a folder, not a picture\.$"):
        vtc.open_image(str(tmp_path))
    path.touch()
    with pytest.raises(vtc.InputError, match=r"photo\.png: the file is empty\.$"):
        vtc.open_image(path)
    path.write_text("not pixels")
    with pytest.raises(vtc.InputError, match=r"photo\.png: not a picture that pillow can read\.$"):
        vtc.open_image(path)
    with path.open("rb") as file, pytest.raises(vtc.InputError, match=r"photo\.png: not a picture"):
        vtc.open_image(file)
    with path.open() as text, pytest.raises(vtc.InputError, match=r"photo\.png: not a picture"):
        vtc.open_image(text)  # type: ignore[arg-type]
    with pytest.raises(vtc.InputError, match="the picture of 3 bytes: not a picture"):
        vtc.open_image(b"GIF")
    with pytest.raises(vtc.InputError, match="the picture of 0 bytes: the file is empty"):
        vtc.open_image(b"")
    with pytest.raises(vtc.InputError, match="cannot be opened as a picture: embedded null byte"):
        vtc.open_image("a\0b")
    closed = Image.open(io.BytesIO(encoded(Image.fromarray(COLOURS))))
    closed.close()
    with pytest.raises(vtc.InputError, match="the picture: cannot be decoded"):
        vtc.open_image(closed)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(vtc.InputError, match=f"no pixels, its size is {size[0]} x {size[1]}"):
        vtc.open_image(Image.new("RGB", size))


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces so many pixels; none of them is there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [MAX_PIXELS // 100 + 1, 10 * MAX_PIXELS // 100, 2**31 - 1])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(width, 100))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(vtc.InputError, match=r"bomb\.png: more than 89,478,485 pixels \(MAX_PIXELS\)"):
        vtc.open_image(path)


def test_the_limit_holds_whatever_pillow_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(vtc.InputError, match="more than 89,478,485 pixels"):
        vtc.open_image(bomb(100_000, 1000))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 5)
    with pytest.raises(vtc.InputError, match=r"more than 5 pixels .* 3 x 2 = 6 pixels"):
        vtc.open_image(Image.fromarray(COLOURS))


# --------------------------------------------------------------------------------------------------------- side effects


def test_pillow_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(vtc.ConfigError, match=r"Reading pictures needs pillow: pip install \"vtc\[vision\]\""):
        vtc.open_image("photo.png")


def test_many_threads_open_pictures(tmp_path: Path) -> None:
    paths = []
    for orientation in range(1, 9):
        paths.append(tmp_path / f"{orientation}.png")
        Image.fromarray(np.ascontiguousarray(stored(orientation))).save(paths[-1], exif=tagged(orientation))
    right: list[bool] = []

    def read() -> None:
        right.extend(np.array_equal(np.asarray(vtc.open_image(path)), COLOURS) for path in paths * 3)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 96


def test_nothing_is_loaded_before_a_picture_is_opened() -> None:
    code = "import sys, vtc.pictures, vtc.limits; vtc.open_image; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
