"""Where tokens lie: which rectangle of a picture or a frame each grid of tokens stands for, family by family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vtc.errors import InputError

if TYPE_CHECKING:
    from vtc.core.context import Grid
    from vtc.report.report import SegmentReport

__all__ = ["FITS", "Box", "View", "views_of"]


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture; may reach beyond it where a model pads."""

FITS = ("crop", "pad", "stretch")

# What the processors of these families do with a picture unless they are told otherwise; the others stretch it.
_CROPPED = {("llava", "image"), ("video_llava", "image"), ("video_llava", "video"), ("llava_next_video", "video")}
_ANYRES = {"llava_next", "llava_next_video", "llava_onevision"}
_TILED = {"internvl"}
_TILES_APART = {"idefics3", "smolvlm"}


@dataclass(frozen=True)
class View:
    """One grid of tokens on one picture.

    Attributes
    ----------
    title
        What the view is called where a picture has several; else empty.
    picture
        Which of the pictures it shows.
    patches
        (box, rows, columns, segment, first): a rectangle of tokens in raster order, and where it begins among the
        scorable tokens of the segment.
    again
        Whether the view before it shows the same tokens: of two frames that were joined into one step, the second.
    """

    title: str
    picture: int
    patches: tuple[tuple[Box, int, int, int, int], ...]
    again: bool = False


def views_of(
    kind: str, segments: Sequence[SegmentReport], sizes: Sequence[tuple[int, int]], processor: Any, fit: str | None
) -> Iterator[View]:
    """Where the tokens of these segments lie on pictures of these (width, height)."""
    videos = [segment for segment in segments if segment.modality == "video"]
    if videos:
        if len(segments) > 1:
            raise InputError("Beside a video there are other images or videos in this row; say which by index=.")
        yield from _frames(kind, segments[0], sizes, processor, fit)
    elif kind in _TILES_APART and len(sizes) == 1 and len(segments) > 1:
        tiles = [(segment.grids[0], number, 0) for number, segment in enumerate(segments)]
        yield from _tiles(tiles, 0, sizes[0], _ceiled(len(tiles) - 1, sizes[0]))
    elif len(segments) != len(sizes):
        raise InputError(
            f"The row shows {len(segments)} images, but {len(sizes)} pictures were given; give one per image, or say "
            "which one by index=."
        )
    else:
        for number, (segment, shape) in enumerate(zip(segments, sizes, strict=True)):
            yield from _image(kind, segment, number, shape, processor, fit)


def _image(
    kind: str, segment: SegmentReport, number: int, shape: tuple[int, int], processor: Any, fit: str | None
) -> Iterator[View]:
    grids = segment.grids
    if len(grids) == 1:
        # Of several pictures in one prompt LLaVA-OneVision makes no tiles and pads them to squares instead.
        usual = "pad" if kind == "llava_onevision" else "stretch" if kind in _ANYRES else None
        box = _fitted(kind, "image", shape, processor, fit or usual)
        yield View("", number, ((box, *grids[0][1:], number, 0),))
    elif kind in _ANYRES:
        _, rows, across = grids[1]
        whole = (0.0, 0.0, float(shape[0]), float(shape[1]))
        yield View("thumbnail", number, ((whole, *grids[0][1:], number, 0),))
        # Square patches, the padding cut off to whole patches evenly on both sides.
        side = max(shape[0] / across, shape[1] / rows)
        box = _centred(shape, across * side, rows * side)
        yield View("tiles", number, ((box, rows, across, number, math.prod(grids[0])),))
    elif kind in _TILED:
        starts = np.cumsum([0, *(math.prod(grid) for grid in grids)]).tolist()
        tiles = [(grid, number, start) for grid, start in zip(grids, starts, strict=False)]
        yield from _tiles(tiles, number, shape, _nearest(len(tiles) - 1, shape))
    else:
        raise InputError(
            f"An image of a {kind} model has {len(grids)} views, and how they lie on the picture is not known; draw "
            "them yourself from report.segments[...].grids."
        )


def _tiles(
    tiles: Sequence[tuple[Grid, int, int]], number: int, shape: tuple[int, int], arrangement: tuple[int, int]
) -> Iterator[View]:
    """Tiles (grid, segment, first token) in raster order, the last one a thumbnail."""
    rows, across = arrangement
    width, height = shape[0] / across, shape[1] / rows
    patches = []
    for place, ((_, h, w), segment, first) in enumerate(tiles[:-1]):
        x, y = place % across * width, place // across * height
        patches.append(((x, y, x + width, y + height), h, w, segment, first))
    yield View(f"{rows} x {across} tiles", number, tuple(patches))
    (_, h, w), segment, first = tiles[-1]
    yield View("thumbnail", number, (((0.0, 0.0, float(shape[0]), float(shape[1])), h, w, segment, first),))


def _nearest(count: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of `count` tiles closest to the picture's shape, as InternVL chooses among all counts."""
    return min(_arrangements(count), key=lambda way: abs(way[1] / way[0] - shape[0] / shape[1]))


def _ceiled(count: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of `count` tiles with the longer edge full and the shorter rounded up, as Idefics3 cuts."""
    width, height = shape

    def missed(way: tuple[int, int]) -> tuple[bool, float]:
        rows, across = way
        if width >= height:
            exact = math.ceil(across * height / width) == rows
        else:
            exact = math.ceil(rows * width / height) == across
        return not exact, abs(across / rows - width / height)

    return min(_arrangements(count), key=missed)


def _arrangements(count: int) -> list[tuple[int, int]]:
    return [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]


def _frames(
    kind: str, segment: SegmentReport, sizes: Sequence[tuple[int, int]], processor: Any, fit: str | None
) -> Iterator[View]:
    if len(segment.grids) != 1:
        raise InputError(f"A video of {len(segment.grids)} views cannot be laid on frames.")
    t, h, w = segment.grids[0]
    per_token = -(-len(sizes) // t)
    if per_token not in (1, 2) or -(-len(sizes) // per_token) != t:
        raise InputError(
            f"The video has {t} steps in time, which {len(sizes)} frames cannot make: give the frames that the "
            "processor was given, after sampling."
        )
    for frame, shape in enumerate(sizes):
        box = _fitted(kind, "video", shape, processor, fit)
        patches = ((box, h, w, 0, frame // per_token * h * w),)
        yield View(f"frame {frame}", frame, patches, again=frame % per_token > 0)


def _fitted(kind: str, modality: str, shape: tuple[int, int], processor: Any, fit: str | None) -> Box:
    """The part of a picture that the model sees."""
    width, height = shape
    worker = None if processor is None else getattr(processor, f"{modality}_processor", None)
    side = float(min(shape))
    if fit is None and worker is not None:
        fit, side = _read_fit(worker, side)
    if fit is None:
        fit = "crop" if (kind, modality) in _CROPPED else "stretch"
    if fit == "crop":
        return _centred(shape, side, side)
    if fit == "pad":
        return _centred(shape, max(width, height), max(width, height))
    return 0.0, 0.0, float(width), float(height)


def _read_fit(worker: Any, shorter: float) -> tuple[str, float]:
    """What an image or video processor does, and the side of its crop in pixels of the picture."""
    if getattr(worker, "do_pad", False):
        return "pad", shorter
    edge, crop = _number(worker, "size", "shortest_edge"), _number(worker, "crop_size", "height")
    if getattr(worker, "do_center_crop", False) and edge and crop:
        return "crop", shorter * crop / edge
    return "stretch", shorter


def _number(worker: Any, name: str, key: str) -> int | None:
    """One entry of a size, a mapping or an object depending on the release."""
    size = getattr(worker, name, None)
    return size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)


def _centred(shape: tuple[int, int], width: float, height: float) -> Box:
    x, y = (shape[0] - width) / 2, (shape[1] - height) / 2
    return x, y, x + width, y + height
