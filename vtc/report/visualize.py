"""Pictures of what was kept: panels, contact sheets and animations."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vtc.core.selection import Selection
from vtc.core.sites import CacheAfterPrefill, DecoderLayer, Site
from vtc.errors import ConfigError, InputError
from vtc.files import replacing
from vtc.limits import MAX_DRAWN_PIXELS, MAX_FRAMES, MAX_PANEL, MIN_PANEL, check_count
from vtc.pictures import to_rgb
from vtc.report.views import FITS, View, views_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.report.report import Report, SegmentReport

__all__ = ["animation", "save_animation", "visualize"]

_MARGIN, _TITLE = 6, 20
_SLOWEST, _FASTEST = 0.01, 100


def visualize(
    report: Report,
    pictures: Any,
    *,
    row: int = 0,
    index: int | None = None,
    processor: Any = None,
    fit: str | None = None,
    size: int = 448,
    columns: int | None = None,
    titles: bool = True,
    last: bool = False,
) -> Image:
    """Draw what a report kept: kept patches bright, dropped ones dim, merged ones in the colour of their anchor.

    One panel per view of a picture (thumbnail, tiles) and per range of decoder layers that saw the same tokens. The
    frames of a video become a contact sheet. What the model never saw, like the margins of a centre crop, is hatched.

    Parameters
    ----------
    report : Report
        From `vtc.report(model)`.
    pictures : PIL.Image, array (H, W, 3) of uint8, or a sequence of them
        The picture; or one per image of the row, in order; or the frames of the video, as the processor was given them.
        Processors do not turn pictures as their EXIF orientation says, so neither does this; `vtc.open_image` makes
        pictures that need no turning.
    row : int
        Row of the batch.
    index : int, optional
        Only this image or video of the row; `pictures` are then its own.
    processor : optional
        The model's processor, which says whether it crops, pads or stretches. Without one, the family's default holds.
    fit : {"crop", "pad", "stretch"}, optional
        Overrides both. Without effect where a family cuts the picture into tiles.
    size : int
        Longer edge of a panel in pixels, 16 to 4096 (`vtc.limits.MAX_PANEL`). All panels together have at most 268
        million pixels (`vtc.limits.MAX_DRAWN_PIXELS`).
    columns : int, optional
        Panels side by side; by default about the square root of their number for the frames of a video.
    titles : bool
        Write above each panel what it shows.
    last : bool
        Only what the last decoder layers see.

    Returns
    -------
    PIL.Image

    Raises
    ------
    ConfigError
        An argument is out of range, the panels are too many for their size, or pillow is not installed.
    InputError
        The pictures do not fit the report.
    """
    views, segments, images, states = _prepare(report, pictures, row, index, processor, fit, size)
    states = states[-1:] if last else states
    several = len(views) > 1  # then the layers stand above each sheet, and not above each panel
    panels = [
        [
            _panel(view, images, segments, state, size, _caption(view, segments, state, not several) if titles else ())
            for view in views
        ]
        for state in states
    ]
    if columns is None:
        # Few views stand in a row per state; frames make a sheet.
        columns = math.ceil(math.sqrt(len(views))) if len(views) > 6 else len(views)
        if not several:
            columns = len(states)
    else:
        check_count("columns", columns, MAX_FRAMES)
    if not several:
        return _sheet([panel for sheet in panels for panel in sheet], columns)
    return _stack(
        [
            _titled(_sheet(sheet, columns), (state.layers,) if titles and state.layers else ())
            for sheet, state in zip(panels, states, strict=True)
        ]
    )


def animation(
    report: Report,
    frames: Any,
    *,
    row: int = 0,
    index: int | None = None,
    processor: Any = None,
    fit: str | None = None,
    size: int = 320,
    titles: bool = True,
) -> list[Image]:
    """Draw the frames of a video one by one, ranges of decoder layers side by side; arguments as in `visualize`."""
    views, segments, images, states = _prepare(report, frames, row, index, processor, fit, size)
    return [
        _sheet(
            [
                _panel(view, images, segments, state, size, _caption(view, segments, state) if titles else ())
                for state in states
            ],
            len(states),
        )
        for view in views
    ]


def save_animation(frames: Sequence[Image], path: str | Path, fps: float = 2.0) -> None:
    """Write pictures of one size as an animated GIF, WebP or PNG.

    Raises
    ------
    ConfigError
        The file's name ends in none of these, or `fps` is not from 0.01 to 100: GIF counts in hundredths of a second,
        and no further than to 11 minutes.
    InputError
        There are no pictures.
    """
    path = Path(path)
    if path.suffix.lower() not in (".gif", ".webp", ".png", ".apng"):
        raise ConfigError(f"{path}: animations are written as .gif, .webp or .png.")
    if not _SLOWEST <= fps <= _FASTEST:
        raise ConfigError(f"fps must lie from {_SLOWEST} to {_FASTEST} frames per second, got {fps}.")
    if not len(frames):
        raise InputError(f"{path}: there are no pictures to write.")
    first, *rest = frames
    with replacing(path) as file:
        first.save(file, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _prepare(
    report: Report, pictures: Any, row: int, index: int | None, processor: Any, fit: str | None, size: int
) -> tuple[list[View], list[SegmentReport], list[Image], list[_State]]:
    if fit is not None and fit not in FITS:
        raise ConfigError(f"fit must be one of {', '.join(FITS)}, got {fit!r}.")
    check_count("size", size, MAX_PANEL, least=MIN_PANEL)
    images = _images(pictures)
    of_row = [segment for segment in report.segments if segment.row == row]
    segments = [segment for segment in of_row if index is None or segment.index == index]
    if not segments:
        where = f"row {row}" if index is None else f"row {row}, image or video {index}"
        raise InputError(f"The report has nothing about {where}; it has {len(report.segments)} images and videos.")
    views = list(views_of(report.model_type, segments, [image.size for image in images], processor, fit))
    states = _states(segments, len(report.lengths_per_layer))
    panels = [_scaled(images[view.picture], size) for view in views]
    pixels = len(states) * sum(width * height for width, height in panels)
    if pixels > MAX_DRAWN_PIXELS:
        raise ConfigError(
            f"{len(states) * len(panels)} panels of size {size} are {pixels:,} pixels, and a drawing has at most "
            f"{MAX_DRAWN_PIXELS:,} (MAX_DRAWN_PIXELS): lower size=, or draw fewer frames."
        )
    return views, segments, images, states


# --------------------------------------------------------------------------------------------------------- states


@dataclass(frozen=True, eq=False)
class _State:
    """The tokens that a range of decoder layers sees: per segment, a selection of its scorable tokens."""

    layers: str
    selections: tuple[Selection, ...]


def _states(segments: Sequence[SegmentReport], depth: int) -> list[_State]:
    sites = [site for segment in segments for site, _ in segment.selections if _seen_by_layers(site)]
    borders = sorted({_layer_of(site) for site in sites} | {0})
    ends = [*borders[1:], depth]
    states = []
    for start, end in zip(borders, ends, strict=True):
        if start == end:
            continue
        name = "" if len(borders) == 1 else f"layer {start}" if end - start == 1 else f"layers {start}-{end - 1}"
        states.append(_State(name, tuple(_at(segment, start) for segment in segments)))
    return states


def _at(segment: SegmentReport, layer: int) -> Selection:
    """Compose the stages up to `layer` into one selection."""
    whole = Selection.full(sum(math.prod(grid) for grid in segment.grids))
    for site, selection in segment.selections:
        if _seen_by_layers(site) and _layer_of(site) <= layer:
            whole = whole.then(_on_cpu(selection))
    return whole


def _seen_by_layers(site: Site) -> bool:
    """Tell whether layers see fewer tokens behind `site`; what leaves a cache has been seen by all of them."""
    return not isinstance(site, CacheAfterPrefill)


def _layer_of(site: Site) -> int:
    """Return the first decoder layer that no longer sees what left at `site`."""
    return site.layer if isinstance(site, DecoderLayer) else 0


def _on_cpu(selection: Selection) -> Selection:
    merged = (None if part is None else part.detach().cpu() for part in (selection.assign, selection.weight))
    return Selection(selection.n, selection.keep.cpu(), *merged)


# -------------------------------------------------------------------------------------------------------- drawing


def _caption(view: View, segments: Sequence[SegmentReport], state: _State, layers: bool = True) -> tuple[str, ...]:
    """Return the parts of the line above a panel, the most important last."""
    kept = total = 0
    for _, rows, across, segment, first in view.patches:
        kept += int(state.selections[segment].mask[first : first + rows * across].sum())
        total += rows * across
    counted = f"{'same ' if view.again else ''}{kept} of {total}"
    return tuple(part for part in (view.title, state.layers if layers else "", counted) if part)


def _panel(
    view: View,
    images: Sequence[Image],
    segments: Sequence[SegmentReport],
    state: _State,
    size: int,
    caption: Sequence[str],
) -> Image:
    """Draw one view of one picture in one state."""
    from PIL import Image as Pillow

    picture = images[view.picture]
    scale = size / max(picture.size)
    width, height = _scaled(picture, size)
    pixels = np.asarray(picture.resize((width, height), Pillow.Resampling.LANCZOS), dtype=np.float32)
    cells = np.full((height, width), -1)
    styles: list[_Style] = []
    offset = 0
    for box, rows, across, segment, first in view.patches:
        inside = _cells((height, width), tuple(edge * scale for edge in box), rows, across)
        cells = np.where(inside >= 0, inside + offset, cells)
        styles.append(_Style.of(state.selections[segment], first, rows * across))
        offset += rows * across
    drawn = _drawn(pixels, cells, _Style.joined(styles))
    return _titled(Pillow.fromarray(drawn.round().clip(0, 255).astype(np.uint8)), caption)


def _scaled(picture: Image, size: int) -> tuple[int, int]:
    """Return width and height of a panel."""
    scale = size / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _cells(shape: tuple[int, int], box: Sequence[float], rows: int, across: int) -> np.ndarray[Any, Any]:
    """Return (H, W): the cell of a grid in `box` that each pixel lies in, -1 outside."""
    left, top, right, bottom = box
    y = np.floor((np.arange(shape[0]) + 0.5 - top) / (bottom - top) * rows).astype(int)
    x = np.floor((np.arange(shape[1]) + 0.5 - left) / (right - left) * across).astype(int)
    seen = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < across))
    return np.where(seen, y[:, None] * across + x, -1)


@dataclass(frozen=True, eq=False)
class _Style:
    """Colours of n tokens: `bright` the kept ones, `tint` (n, 3) of merged tokens and their anchors, where `tinted`."""

    bright: np.ndarray[Any, Any]
    tinted: np.ndarray[Any, Any]
    tint: np.ndarray[Any, Any]

    @classmethod
    def of(cls, selection: Selection, first: int, count: int) -> _Style:
        tokens = slice(first, first + count)
        bright = selection.mask[tokens].numpy()
        if selection.assign is None or not selection.k:
            return cls(bright, np.zeros(count, dtype=bool), np.zeros((count, 3), dtype=np.float32))
        slots = selection.slots[tokens].numpy()
        merged = selection.sizes.numpy() > 1
        tinted = (slots >= 0) & merged[slots.clip(min=0)]
        return cls(bright, tinted, _hues(slots.clip(min=0)))

    @classmethod
    def joined(cls, parts: Sequence[_Style]) -> _Style:
        names = ("bright", "tinted", "tint")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _hues(slots: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return (n, 3) colours that differ clearly in hue between successive slots."""
    unique, back = np.unique(slots, return_inverse=True)
    colours = [colorsys.hsv_to_rgb((0.08 + 0.618034 * int(slot)) % 1, 0.85, 1.0) for slot in unique]
    return (255 * np.array(colours, dtype=np.float32))[back]


def _drawn(pixels: np.ndarray[Any, Any], cells: np.ndarray[Any, Any], style: _Style) -> np.ndarray[Any, Any]:
    grey = pixels.mean(axis=2, keepdims=True)
    dim = 0.28 * (0.4 * pixels + 0.6 * grey)
    seen, at = cells >= 0, cells.clip(min=0)
    bright, tinted = style.bright[at] & seen, style.tinted[at] & seen
    tint = style.tint[at]
    out = np.where(bright[..., None], pixels, dim)
    out = np.where((tinted & ~bright)[..., None], 0.6 * dim + 0.4 * tint, out)
    # A line around each region of kept tokens; around every anchor, in the colour of the tokens merged into it.
    border = _border(bright)
    out = np.where(border[..., None], 0.5 * out + 0.5 * 255, out)
    anchors = bright & tinted & _border(np.where(bright, cells, -1))
    out = np.where(anchors[..., None], tint, out)
    stripes = (np.add.outer(np.arange(cells.shape[0]), np.arange(cells.shape[1])) // 4) % 2
    return np.where(seen[..., None], out, 0.15 * pixels + 0.85 * np.where(stripes, 150.0, 190.0)[..., None])


def _border(region: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mark, as (H, W) bool, the pixels of a region (not False, not -1) that touch a pixel of another value."""
    inner = np.zeros(region.shape, dtype=bool)
    inner[:-1] |= region[:-1] != region[1:]
    inner[1:] |= region[1:] != region[:-1]
    inner[:, :-1] |= region[:, :-1] != region[:, 1:]
    inner[:, 1:] |= region[:, 1:] != region[:, :-1]
    return inner & (region if region.dtype == bool else region >= 0)


def _titled(panel: Image, parts: Sequence[str]) -> Image:
    """Add a line above, in letters small enough for the panel's width; where none are, of the last part alone."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    if not parts:
        return panel
    lines = [(text, _font(size)) for text in (", ".join(parts), parts[-1]) for size in range(13, 8, -1)]
    fitting = (line for line in lines if line[1].getlength(line[0]) < panel.width)
    text, font = next(fitting, lines[-1])
    out = Pillow.new("RGB", (panel.width, panel.height + _TITLE), "white")
    ImageDraw.Draw(out).text((1, 2), text, fill=(40, 40, 40), font=font)
    out.paste(panel, (0, _TITLE))
    return out


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _sheet(panels: Sequence[Image], columns: int) -> Image:
    """Lay panels out in rows of `columns`, each row as high as its highest panel."""
    rows = [list(panels[start : start + columns]) for start in range(0, len(panels), columns)]
    return _stack([_side_by_side(row) for row in rows])


def _side_by_side(panels: Sequence[Image]) -> Image:
    from PIL import Image as Pillow

    width = sum(panel.width for panel in panels) + _MARGIN * (len(panels) - 1)
    out = Pillow.new("RGB", (width, max(panel.height for panel in panels)), "white")
    x = 0
    for panel in panels:
        out.paste(panel, (x, 0))
        x += panel.width + _MARGIN
    return out


def _stack(panels: Sequence[Image]) -> Image:
    from PIL import Image as Pillow

    if len(panels) == 1:
        return panels[0]
    height = sum(panel.height for panel in panels) + _MARGIN * (len(panels) - 1)
    out = Pillow.new("RGB", (max(panel.width for panel in panels), height), "white")
    y = 0
    for panel in panels:
        out.paste(panel, (0, y))
        y += panel.height + _MARGIN
    return out


def _images(pictures: Any) -> list[Image]:
    try:
        from PIL import Image as Pillow
    except ImportError as error:
        raise ConfigError('Drawing needs pillow: pip install "vtc[vision]".') from error

    single = isinstance(pictures, Pillow.Image) or (hasattr(pictures, "ndim") and pictures.ndim == 3)
    images = []
    for picture in [pictures] if single else pictures:
        if isinstance(picture, Pillow.Image):
            images.append(to_rgb(picture))  # as it lies: the model's processor did not turn it either
            continue
        array = picture.cpu().numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
            array = array.transpose(1, 2, 0)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise InputError(
                f"A picture is a PIL image or an array (H, W, 3) of uint8, got {array.shape} of {array.dtype}."
            )
        images.append(Pillow.fromarray(np.ascontiguousarray(array)))
    if not images:
        raise InputError("There are no pictures to draw on.")
    return images
