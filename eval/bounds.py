"""Selections that know what a generated task shows where: the frame that methods are seen in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch

import vtc

Grid = tuple[int, int, int]
"""Steps in time, rows, columns."""


@dataclass(frozen=True)
class TruthSelector(vtc.Selector):
    """Keeps what shows the things that questions may name, or what does not; only for one sample at a time.

    The truth is told in cells of the task's own grid, and looked up in the model's: models cut pictures into more or
    fewer tokens.

    Attributes
    ----------
    things : tuple of tuple of int
        The cells of every thing, best first.
    grid : (int, int, int)
        The grid that these cells are numbered in.
    first : bool
        Whether things go first, a cell of each in turn, or last.
    seed : tuple of int
        For what is drawn beside them.
    """

    name: ClassVar[str] = "truth"
    paper: ClassVar[str] = "none: a task's own knowledge"

    things: tuple[tuple[int, ...], ...] = ()
    grid: Grid = (1, 1, 1)
    first: bool = True
    seed: tuple[int, ...] = (0,)

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        """As many as the budget.

        Raises
        ------
        InputError
            The model looks at the picture in several views, of which the truth knows only the whole.
        """
        from eval.tasks.scenes import oracle

        if len(ctx.grids) != 1 or ctx.n != int(np.prod(ctx.grids[0])):
            raise vtc.InputError(
                f"which tokens matter is known for a picture in one view, and this model makes {len(ctx.grids)} views "
                f"of it ({ctx.n} tokens in grids of {', '.join(map(str, ctx.grids))}): it has no oracle"
            )
        queues = [regridded(cells, self.grid, ctx.grids[0]) for cells in self.things]
        budget, rng = min(ctx.budget, ctx.n), np.random.default_rng(list(self.seed))
        if self.first:
            kept = oracle.in_turns(queues, ctx.n, budget, rng)
        else:
            kept = oracle.others_first({cell for queue in queues for cell in queue}, ctx.n, budget, rng)
        return vtc.Selection.from_indices(ctx.n, torch.from_numpy(kept).to(ctx.features.device))


def regridded(cells: Sequence[int], source: Grid, target: Grid) -> list[int]:
    """The cells of another grid over the same picture that these lie in, or that lie in these; each once, in order."""
    found: dict[int, None] = {}
    for cell in cells:
        places = np.unravel_index(cell, source)
        axes = [_along(int(place), *sizes) for place, *sizes in zip(places, source, target, strict=True)]
        for t, row, column in product(*axes):
            found[(t * target[1] + row) * target[2] + column] = None
    return list(found)


def _along(place: int, source: int, target: int) -> list[int]:
    if target <= source:
        return [place * target // source]
    return [other for other in range(target) if (2 * other + 1) * source // (2 * target) == place]


@functools.cache
def register() -> None:
    """Make it known to `vtc`: not before somebody measures, so that importing this changes no list of methods."""
    vtc.register_selector(TruthSelector)
