"""Selections that were made beforehand, so that a task that knows the truth can frame the methods."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

import vtc


@dataclass(frozen=True)
class GivenSelector(vtc.Selector):
    """Keeps the tokens it is told to, out of `of`; only meaningful for one sample at a time."""

    name: ClassVar[str] = "given"
    paper: ClassVar[str] = "none: indices chosen by the caller"

    keep: tuple[int, ...] = ()
    of: int = 0

    def select(self, ctx: vtc.VisualContext) -> vtc.Selection:
        """The given indices.

        Raises
        ------
        InputError
            They are not as many as the budget, or were chosen for another number of tokens.
        """
        if ctx.n != self.of or len(self.keep) != min(ctx.budget, ctx.n):
            raise vtc.InputError(
                f"{len(self.keep)} of {self.of} tokens were chosen beforehand, but the model has {ctx.n} and a budget "
                f"of {ctx.budget}; the truth is only known for models with a token per patch"
            )
        return vtc.Selection.from_indices(ctx.n, torch.tensor(self.keep, device=ctx.features.device))


@functools.cache
def register() -> None:
    """Make it known to `vtc`: not before somebody measures, so that importing this changes no list of methods."""
    vtc.register_selector(GivenSelector)
