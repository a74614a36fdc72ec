"""Bytes and operations of the Triton kernels, by one formula per kernel.

A formula covers all programs of a launch. Masked lanes do not count; repeated loads do, even if they hit a cache. A
test counts every load, store and product in Triton's interpreter and compares. `record` collects the launches of an
operation without running them, so that full shapes cost nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vtc.kernels import aot, dispatch

__all__ = ["FORMULAS", "Launch", "Traffic", "record"]


@dataclass(frozen=True)
class Traffic:
    """Bytes and operations of one or several launches.

    Attributes
    ----------
    loaded, stored : int
        Bytes.
    products : int
        Floating-point operations of matrix products over whole tiles, masked lanes included.
    other : int
        Approximate number of other floating-point operations; an exponential counts as one.
    """

    loaded: int = 0
    stored: int = 0
    products: int = 0
    other: int = 0

    def __add__(self, more: Traffic) -> Traffic:
        return Traffic(
            self.loaded + more.loaded,
            self.stored + more.stored,
            self.products + more.products,
            self.other + more.other,
        )

    @property
    def moved(self) -> int:
        """Sum of bytes loaded and stored."""
        return self.loaded + self.stored


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name, its grid, its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def traffic(self) -> Traffic:
        """Bytes and operations by the formula of the kernel."""
        return FORMULAS[self.kernel](self.grid, SimpleNamespace(**self.arguments))


def _size(pointer: Any) -> int:
    return int(pointer.element_size())


def _mask_bytes(a: Any, batch: int, heads: int, row_blocks: int, column_blocks: int) -> int:
    """Return the bytes that `_visible` loads for all tiles of all heads."""
    if a.KIND == 1:
        return batch * heads * a.length * a.key_length
    if a.KIND == 2:
        tables = 2 if a.BLOCKS else 1
        return 4 * tables * batch * heads * (a.length * column_blocks + a.key_length * row_blocks)
    return 0


def _row_logits(grid: tuple[int, ...], a: Any) -> Traffic:
    blocks, groups = grid[:2]
    batch, rows = groups * a.group // a.heads, a.group * a.length
    together = math.ceil(rows / a.ROWS)
    masked = _mask_bytes(a, batch, a.heads, 1, blocks)
    if a.KIND == 2:  # key positions are read once per tile, and a tile has the rows of several heads
        tables = 2 if a.BLOCKS else 1
        masked = 4 * tables * groups * (rows * blocks + a.key_length * together)
    return Traffic(
        loaded=groups * a.width * _size(a.k) * (a.key_length + blocks * rows) + masked,
        stored=4 * groups * rows * (a.key_length + blocks),
        products=blocks * groups * together * 2 * a.ROWS * a.COLUMNS * a.WIDTH,
        other=4 * groups * rows * a.key_length,  # scale, compare, subtract and exponentiate, add
    )


def _row_finish(grid: tuple[int, ...], a: Any) -> Traffic:
    blocks, lines = grid[:2]
    return Traffic(
        loaded=4 * lines * a.heads * (a.key_length + blocks),
        stored=4 * lines * a.key_length * (a.heads if a.REDUCE == 0 else 1),
        other=3 * lines * a.heads * a.key_length,
    )


def _row_logsumexp(grid: tuple[int, ...], a: Any) -> Traffic:
    row_blocks, lines = grid[:2]
    column_blocks = math.ceil(a.key_length / a.COLUMNS)
    return Traffic(
        loaded=lines * a.width * _size(a.q) * (a.length + row_blocks * a.key_length)
        + _mask_bytes(a, lines // a.heads, a.heads, row_blocks, column_blocks),
        stored=4 * lines * a.length,
        products=lines * row_blocks * column_blocks * 2 * a.ROWS * a.COLUMNS * a.WIDTH,
        other=5 * lines * a.length * a.key_length,  # scale, compare, subtract, exponentiate, add
    )


def _column_sums(grid: tuple[int, ...], a: Any) -> Traffic:
    column_blocks, lines, sets = grid
    row_blocks = math.ceil(a.length / a.ROWS)
    masked = _mask_bytes(a, lines // a.heads, a.heads, row_blocks, column_blocks)
    once = Traffic(
        loaded=lines * (a.width * _size(a.k) * (a.key_length + column_blocks * a.length) + 8 * column_blocks * a.length)
        + masked,
        stored=4 * lines * a.key_length,
        products=lines * row_blocks * column_blocks * 2 * a.ROWS * a.COLUMNS * a.WIDTH,
        other=5 * lines * a.length * a.key_length,  # scale, subtract, exponentiate, multiply, add
    )
    return Traffic(sets * once.loaded, sets * once.stored, sets * once.products, sets * once.other)


def _inverse_norms(grid: tuple[int, ...], a: Any) -> Traffic:
    return Traffic(loaded=a.n * a.width * _size(a.x), stored=4 * a.n, other=2 * a.n * a.width)


def _compare(grid: tuple[int, ...], a: Any) -> Traffic:
    row_blocks, splits, batch = grid
    columns = math.ceil((a.length - a.offset) / a.step)
    firsts = range(0, splits * a.stripe, a.stripe)
    tiles = sum(math.ceil((min(first + a.stripe, columns) - first) / a.COLUMNS) for first in firsts if first < columns)
    row = a.width * _size(a.x)
    per_row = splits * (4 + (8 if a.CHOSEN else 0)) + tiles * row  # its norm, its index, the row
    per_column = row + 4 + (4 if a.REDUCE == 1 else 0)  # the row, its norm, its coverage
    return Traffic(
        loaded=batch * (a.count * per_row + row_blocks * columns * per_column),
        stored=batch * splits * a.count * (8 if a.REDUCE == 0 else 4),
        products=batch * row_blocks * tiles * 2 * a.ROWS * a.COLUMNS * math.ceil(a.width / a.WIDTH) * a.WIDTH,
        other=4 * batch * a.count * columns,  # two norms, compare or subtract, add
    )


def _pick(grid: tuple[int, ...], a: Any) -> Traffic:
    programs, volume = grid[0], a.OBJECTIVE == 2
    row = a.width * _size(a.x)
    done = Traffic(
        # Per program: all results, the pick and its scale. Per row: the row, its scale, its state.
        loaded=programs * (8 * a.programs + row + 4) + a.n * (row + 8),
        stored=8 + 4 * a.n + 8 * programs,
        other=2 * a.n * a.width + 3 * a.n,
    )
    if volume:  # the floor and the reserve results; the factor so far; the reserve
        loaded = programs * (4 + 8 * a.programs + 4 * a.step) + a.n * (4 * a.step + 4)
        done += Traffic(loaded=loaded, stored=4 * a.n + 8 * programs, other=2 * a.step * a.n)
    return done


def _merge(grid: tuple[int, ...], a: Any) -> Traffic:
    slots, stripes = grid
    members, more = int(a.bounds[-1] - a.bounds[0]), 4 if a.WEIGHTED else 0
    return Traffic(
        loaded=16 * slots * stripes + members * ((8 + more) * stripes + a.width * _size(a.x)),
        stored=slots * a.width * _size(a.out),
        other=(2 if a.WEIGHTED else 1) * members * a.width,
    )


def _best(grid: tuple[int, ...], a: Any) -> Traffic:
    scores = int(a.offsets[-1] - a.offsets[0])
    # Four histograms and the marking read the scores; the marking reads the places.
    return Traffic(loaded=24 * grid[0] + scores * (5 * _size(a.scores) + 8), stored=scores)


def _slots(grid: tuple[int, ...], a: Any) -> Traffic:
    return Traffic(loaded=grid[0] * (8 + a.length), stored=grid[0] * 9 * a.width)


def _gather(grid: tuple[int, ...], a: Any) -> Traffic:
    row = sum(shape[0] * shape[4] * _size(source) for shape, source in zip(a.shapes, a.sources, strict=True))
    return Traffic(loaded=grid[0] * grid[1] * (8 + row), stored=grid[0] * grid[1] * row)


def _patch_entropy(grid: tuple[int, ...], a: Any) -> Traffic:
    numbers = a.channels * a.height * a.width
    patch = Traffic(
        loaded=numbers * _size(a.pixels) + (8 * a.channels if a.NORMALISED else 0),
        stored=4,
        other=4 * numbers + 3 * 256,
    )
    return Traffic(grid[0] * patch.loaded, grid[0] * patch.stored, other=grid[0] * patch.other)


def _similarity(grid: tuple[int, ...], a: Any) -> Traffic:
    pairs = int((a.earlier >= 0).sum())
    return Traffic(loaded=8 * a.count + 2 * pairs * a.width * _size(a.x), stored=4 * a.count, other=8 * pairs * a.width)


FORMULAS: dict[str, Callable[[tuple[int, ...], Any], Traffic]] = {
    "_row_logits": _row_logits,
    "_row_finish": _row_finish,
    "_row_logsumexp": _row_logsumexp,
    "_column_sums": _column_sums,
    "_inverse_norms": _inverse_norms,
    "_compare": _compare,
    "_pick": _pick,
    "_merge": _merge,
    "_best": _best,
    "_slots": _slots,
    "_gather": _gather,
    "_patch_entropy": _patch_entropy,
    "_similarity": _similarity,
}
"""Formulas by name of the kernel. They do not hold for ragged sequences, whose work depends on their lengths."""


def _nearest_is_first(a: Any) -> None:
    a.value.zero_()
    if a.place is not None:
        a.place.zero_()


def _first_are_best(a: Any) -> None:
    for start, count in zip(a.offsets.tolist()[:-1], a.counts.tolist(), strict=True):
        a.marks.view(-1)[a.places[start : start + count]] = 1


_SUBSTITUTES: dict[str, Callable[[Any], None]] = {"_compare": _nearest_is_first, "_best": _first_are_best}
"""Substitutes for kernels whose results determine later launches; they write valid values."""


class _Recorder:
    """Replacement of a kernel that records its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[Launch]) -> None:
        self.name, self.names, self.launches = name, list(kernel.arg_names), launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = {**dict(zip(self.names, args, strict=False)), **kwargs}
            self.launches.append(Launch(self.name, tuple(grid), given))
            if self.name in _SUBSTITUTES:
                _SUBSTITUTES[self.name](SimpleNamespace(**given))

        return launch


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Dispatch all operations to Triton inside the block, recording launches instead of running them.

    The results of operations are meaningless.
    """
    launches: list[Launch] = []
    replaced: list[tuple[Any, str, Any]] = [(dispatch, "_check", dispatch._check)]
    for name in aot.modules():
        module: Any = importlib.import_module(name)
        for kernel in {id(spec.kernel): spec.kernel for spec in module.KERNELS}.values():
            place = next(key for key, value in vars(module).items() if value is kernel)
            replaced.append((module, place, kernel))
            setattr(module, place, _Recorder(kernel.__name__, kernel, launches))
    try:
        dispatch._check = lambda *_: None
        with dispatch.use("triton"):
            yield launches
    finally:
        for module, place, kernel in replaced:
            setattr(module, place, kernel)
