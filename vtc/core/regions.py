"""Regions: what a user marks in the pictures of a prompt, and where its tokens are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError, InputError

__all__ = ["Region", "given_regions", "regions"]

_GIVEN: ContextVar[tuple[Region | None, ...] | None] = ContextVar("vtc_regions", default=None)


@dataclass(frozen=True, eq=False)
class Region:
    """A part of one picture: a box, or any pixels.

    Attributes
    ----------
    size
        Width and height of the picture, in pixels.
    box
        Left, top, right and bottom in pixels: the edges, as `PIL.Image.crop` counts them; of a mask, around its pixels.
    mask
        (height, width) bool, or None: the whole box.
    fit
        How the picture comes to the tower, as in `regions`; None: as the family does by default.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    mask: Tensor | None = None
    fit: str | None = None

    def cells(self, grid: tuple[int, int], fit: str, device: Any = None) -> Tensor:
        """Compute how much of each token's cell is inside, and where that begins: (rows * columns, 3) float32.

        Parameters
        ----------
        grid
            Rows and columns of the tokens.
        fit
            What the family does by default, where the region does not say.
        device
            Of the result.

        Returns
        -------
        Tensor
            The share of the cell that is inside, and x and y of its upper left corner, 0 at the first and 1 at the last
            pixel of the picture.
        """
        (width, height), (rows, columns) = self.size, grid
        side = {"crop": min(width, height), "pad": max(width, height)}.get(self.fit or fit)
        across, down = (width, height) if side is None else (side, side)
        left, top = (width - across) / 2, (height - down) / 2  # of what the grid covers; outside the picture if padded
        x = left + across * torch.arange(columns + 1, dtype=torch.float64) / columns
        y = top + down * torch.arange(rows + 1, dtype=torch.float64) / rows
        if self.mask is None:
            within = [_overlap(edges, self.box[axis], self.box[axis + 2]) for axis, edges in ((1, y), (0, x))]
            share = within[0][:, None] * within[1]
        else:
            edges = (-round(left), round(left + across) - width, -round(top), round(top + down) - height)
            seen = functional.pad(self.mask[None, None].double(), edges)
            share = functional.adaptive_avg_pool2d(seen, grid)[0, 0]
        corner = torch.meshgrid(y[:-1] / max(1, height - 1), x[:-1] / max(1, width - 1), indexing="ij")
        return torch.stack([share, corner[1], corner[0]], dim=-1).flatten(0, 1).to(device, torch.float32)


def given_regions() -> tuple[Region | None, ...] | None:
    """Return what `regions` was given in this thread or task; None outside of it."""
    return _GIVEN.get()


@contextmanager
def regions(marked: Sequence[Any], sizes: Sequence[Any] | Any = None, fit: str | None = None) -> Iterator[None]:
    """Say which part of every picture is asked about, for methods that read regions, while entered.

        with vtc.regions([(30, 40, 90, 110)], image):
            model.generate(**inputs)

    Parameters
    ----------
    marked : sequence
        One entry for every picture of the prompts, row by row: a box (left, top, right, bottom) in pixels of the
        picture that the user has, its edges as `PIL.Image.crop` takes them; a mask (height, width) of that picture,
        bool or numbers of which 0 is outside; or None: the whole picture.
    sizes : picture, (width, height), or a sequence of these, optional
        The pictures, or their sizes; one stands for all. Boxes need it.
    fit : {"crop", "pad", "stretch"}, optional
        What the processor makes of a picture that is not square, for families that show squares: the square in its
        middle, the one around it, or the whole squeezed. None: what processors of the family do by default.

    Raises
    ------
    ConfigError
        `fit` is none of these.
    InputError
        An entry is none of these; a box has no area, reaches over the edge or comes without a size; a mask is empty or
        of another size than the picture.
    """
    if isinstance(marked, (str, bytes)) or not hasattr(marked, "__len__") or not hasattr(marked, "__getitem__"):
        raise InputError(f"regions are a list with one entry for every picture, got {type(marked).__name__}")
    listed = isinstance(sizes, (list, tuple)) and not all(isinstance(part, (int, float)) for part in sizes)
    if fit not in (None, "crop", "pad", "stretch"):
        raise ConfigError(f"fit must be crop, pad or stretch, got {fit!r}.")
    known = list(sizes) if listed else [sizes] * len(marked)
    if len(known) != len(marked):
        raise InputError(f"there are {len(marked)} regions, but the sizes of {len(known)} pictures")
    found = [_region(number, *pair) for number, pair in enumerate(zip(marked, known, strict=True))]
    token = _GIVEN.set(tuple(region and replace(region, fit=fit) for region in found))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def _region(number: int, entry: Any, size: Any) -> Region | None:
    """Check one entry, and give it one form."""
    if entry is None:
        return None
    size = _size(number, size)
    try:
        values = torch.as_tensor(entry)
        values = values if values.dtype == torch.bool else values.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"region {number} must be a box of four numbers, a mask or None, got {entry!r}") from error
    if values.ndim == 2:
        return _masked(number, values != 0, size)
    if values.shape != (4,):
        raise InputError(
            f"region {number} must be a box (left, top, right, bottom), a mask (height, width) or None; got the shape "
            f"{tuple(values.shape)}"
        )
    if size is None:
        raise InputError(f"region {number} is a box, so the size of its picture is needed: regions(boxes, images)")
    left, top, right, bottom = box = tuple(float(value) for value in values)
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise InputError(
            f"region {number}: the box {box} must have an area and lie in its picture of {size[0]} x {size[1]} pixels"
        )
    return Region(size, (left, top, right, bottom))


def _masked(number: int, mask: Tensor, size: tuple[int, int] | None) -> Region:
    height, width = mask.shape
    if size not in (None, (width, height)):
        raise InputError(f"region {number}: the mask is {width} x {height} pixels, its picture {size[0]} x {size[1]}")
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if not len(rows):
        raise InputError(f"region {number}: the mask is empty")
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Region((width, height), box, mask.cpu())


def _size(number: int, given: Any) -> tuple[int, int] | None:
    """Return the width and height that a picture has, or that are given."""
    if given is None:
        return None
    found = getattr(given, "size", given)
    if callable(found) or isinstance(found, int):  # an array or a tensor, rows first
        found = (given.shape[1], given.shape[0])
    try:
        width, height = (int(value) for value in found)
    except (TypeError, ValueError) as error:
        raise InputError(f"picture {number} must be a picture or its (width, height), got {given!r}") from error
    if width < 1 or height < 1:
        raise InputError(f"picture {number} must have a width and a height, got {width} x {height}")
    return width, height


def _overlap(edges: Tensor, low: float, high: float) -> Tensor:
    """Compute the share of each interval between successive `edges` that lies in `low` .. `high`."""
    inside = edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)
    return inside.clamp(min=0) / edges.diff()
