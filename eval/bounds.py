"""Selections that use the ground truth of a generated task: upper and lower bounds for methods."""

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
    """Keeps the tokens of the objects that questions may name, or the other tokens; for one sample at a time.

    Objects are given as cells of the task's grid and mapped to the model's grid, which may be finer or coarser.

    Attributes
    ----------
    things : tuple of tuple of int
        The cells of every object, best first.
    grid : (int, int, int)
        The grid that these cells index.
    first : bool
        Keep the objects first, one cell of each in turn; otherwise last.
    seed : tuple of int
        Seed of the random tokens that fill the budget.
    """

    name: ClassVar[str] = "truth"
    paper: ClassVar[str] = "none: the ground truth of a task"

    things: tuple[tuple[int, ...], ...] = ()
    grid: Grid = (1, 1, 1)
    first: bool = True
    seed: tuple[int, ...] = (0,)

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        """Keep as many tokens as the budget.

        Raises
        ------
        InputError
            The model encodes the picture in several views; the truth is known for the whole picture only.
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
    """Map cells to the cells of another grid that contain them or lie in them; each once, in order."""
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
    """Register the selector on first use, so that importing this module does not change the list of methods."""
    vtc.register_selector(TruthSelector)
