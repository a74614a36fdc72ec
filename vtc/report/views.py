"""Which rectangle of a picture or a frame each grid of tokens shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vtc.errors import InputError
from vtc.registry import get_adapter

if TYPE_CHECKING:
    from vtc.core.grids import Grid
    from vtc.report.report import SegmentReport

__all__ = ["FITS", "Box", "View", "fit_of", "views_of"]


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture; may reach beyond it where a model pads."""

FITS = ("crop", "pad", "stretch")


@dataclass(frozen=True)
class View:
    """One grid of tokens on one picture.

    Attributes
    ----------
    title : str
        Name of the view where a picture has several; else empty.
    picture : int
        Index of the picture that it shows.
    patches : tuple of (box, rows, columns, segment, first)
        Rectangles of tokens in raster order; `first` is the index of the first one among the scorable tokens of the
        segment.
    again : bool
        Whether the view before it shows the same tokens: of two frames that were joined into one step, the second.
    """

    title: str
    picture: int
    patches: tuple[tuple[Box, int, int, int, int], ...]
    again: bool = False


def views_of(
    model_type: str,
    segments: Sequence[SegmentReport],
    sizes: Sequence[tuple[int, int]],
    processor: Any,
    fit: str | None,
) -> Iterator[View]:
    """Yield the views of these segments on pictures of these (width, height).

    Raises
    ------
    InputError
        Pictures and segments do not match, or the family's adapter does not say what the views of an image show.
    UnsupportedModelError
        There is no adapter for `model_type`.
    """
    family = get_adapter(model_type)
    videos = [segment for segment in segments if segment.modality == "video"]
    if videos:
        if len(segments) > 1:
            raise InputError("Beside a video there are other images or videos in this row; say which by index=.")
        yield from _frames(family, segments[0], sizes, processor, fit)
    elif family.view_layout == "separate tiles" and len(sizes) == 1 and len(segments) > 1:
        tiles = [(segment.grids[0], number, 0) for number, segment in enumerate(segments)]
        yield from _tiles(tiles, 0, sizes[0], family.tile_grid(len(tiles) - 1, sizes[0]))
    elif len(segments) != len(sizes):
        raise InputError(
            f"The row shows {len(segments)} images, but {len(sizes)} pictures were given; give one per image, or say "
            "which one by index=."
        )
    else:
        for number, (segment, shape) in enumerate(zip(segments, sizes, strict=True)):
            yield from _image(model_type, segment, number, shape, processor, fit)


def _image(
    model_type: str, segment: SegmentReport, number: int, shape: tuple[int, int], processor: Any, fit: str | None
) -> Iterator[View]:
    family, grids = get_adapter(model_type), segment.grids
    if len(grids) == 1:
        # What the processor says of sizes and crops is about tiles, where the family has them.
        asked = None if family.view_layout == "anyres" else processor
        box = _fitted(family, "image", shape, asked, fit)
        yield View("", number, ((box, *grids[0][1:], number, 0),))
    elif family.view_layout == "anyres":
        _, rows, across = grids[1]
        whole = (0.0, 0.0, float(shape[0]), float(shape[1]))
        yield View("thumbnail", number, ((whole, *grids[0][1:], number, 0),))
        # Square patches, the padding cut off to whole patches evenly on both sides.
        side = max(shape[0] / across, shape[1] / rows)
        box = _centred(shape, across * side, rows * side)
        yield View("tiles", number, ((box, rows, across, number, math.prod(grids[0])),))
    elif family.view_layout == "tiles":
        starts = np.cumsum([0, *(math.prod(grid) for grid in grids)]).tolist()
        tiles = [(grid, number, start) for grid, start in zip(grids, starts, strict=False)]
        yield from _tiles(tiles, number, shape, family.tile_grid(len(tiles) - 1, shape))
    else:
        raise InputError(
            f"An image of a {model_type} model has {len(grids)} views, and how they lie on the picture is not known; "
            "draw them yourself from report.segments[...].grids."
        )


def _tiles(
    tiles: Sequence[tuple[Grid, int, int]], number: int, shape: tuple[int, int], tile_grid: tuple[int, int]
) -> Iterator[View]:
    """Yield the tiles (grid, segment, first token) in raster order, and the last one as a thumbnail."""
    rows, across = tile_grid
    width, height = shape[0] / across, shape[1] / rows
    patches = []
    for place, ((_, h, w), segment, first) in enumerate(tiles[:-1]):
        x, y = place % across * width, place // across * height
        patches.append(((x, y, x + width, y + height), h, w, segment, first))
    yield View(f"{rows} x {across} tiles", number, tuple(patches))
    (_, h, w), segment, first = tiles[-1]
    yield View("thumbnail", number, (((0.0, 0.0, float(shape[0]), float(shape[1])), h, w, segment, first),))


def _frames(
    family: Any, segment: SegmentReport, sizes: Sequence[tuple[int, int]], processor: Any, fit: str | None
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
        box = _fitted(family, "video", shape, processor, fit)
        patches = ((box, h, w, 0, frame // per_token * h * w),)
        yield View(f"frame {frame}", frame, patches, again=frame % per_token > 0)


def _fitted(family: Any, modality: str, shape: tuple[int, int], processor: Any, fit: str | None) -> Box:
    """Return the part of a picture that the model sees."""
    width, height = shape
    worker = None if processor is None else getattr(processor, f"{modality}_processor", None)
    side = float(min(shape))
    if fit is None and worker is not None:
        fit, side = _read_fit(worker, side)
    fit = fit or family.fit(modality)
    if fit == "crop":
        return _centred(shape, side, side)
    if fit == "pad":
        return _centred(shape, max(width, height), max(width, height))
    return 0.0, 0.0, float(width), float(height)


def fit_of(processor: Any) -> str | None:
    """Return what a model's processor does with pictures that are not square, one of `FITS`; None: it takes none."""
    worker = getattr(processor, "image_processor", None)
    return None if worker is None else _read_fit(worker, 1.0)[0]


def _read_fit(worker: Any, shorter: float) -> tuple[str, float]:
    """Return what an image or video processor does, and the side of its crop in pixels of the picture."""
    if getattr(worker, "do_pad", False):
        return "pad", shorter
    edge, crop = _number(worker, "size", "shortest_edge"), _number(worker, "crop_size", "height")
    if getattr(worker, "do_center_crop", False) and edge and crop:
        return "crop", shorter * crop / edge
    return "stretch", shorter


def _number(worker: Any, name: str, key: str) -> int | None:
    """Return one entry of a size, which is a mapping or an object depending on the release."""
    size = getattr(worker, name, None)
    return size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)


def _centred(shape: tuple[int, int], width: float, height: float) -> Box:
    x, y = (shape[0] - width) / 2, (shape[1] - height) / 2
    return x, y, x + width, y + height
