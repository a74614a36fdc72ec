"""The two classes that every method extends."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import Need, Stage, VisualContext
from ..core.ranges import Range
from ..core.selection import Selection
from ..errors import InputError

__all__ = ["ScoreSelector", "Selector"]

_TOWER_ATTENTION = frozenset(
    {Need.CLS_ATTENTION, Need.RECEIVED_ATTENTION, Need.ATTENTION, Need.KEYS, Need.CONTEXT_RELEVANCE}
)


class Selector(ABC):
    """A method: tensors of one image or video in, one `Selection` out.

    Subclasses are frozen dataclasses whose fields are the method's options, each with a default, checked in
    ``__post_init__``. They are pure: no randomness but ``ctx.generator``, no state, float32 inside, and exactly
    ``min(ctx.budget, N)`` distinct indices out.

    Class attributes
    ----------------
    name
        Method id, lower case.
    paper
        Where the method comes from.
    requires
        What it must be given besides the features. Methods for which this depends on their options override `stages`.
    reads_features
        False if it works without the features. Only `vtc.select` asks, where the caller may have none.
    adaptive
        True if the method itself decides how many tokens stay; the budget is then at most a ceiling.
    instead
        Options to propose where a model cannot give something that the method needs.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    requires: ClassVar[frozenset[Need]] = frozenset()
    reads_features: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False
    instead: ClassVar[Mapping[Need, str]] = {}

    def stages(self, depth: int | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Where tokens are removed; by default once, before the language model.

        Parameters
        ----------
        depth
            Decoder layers of the model; None: no model, only the first stage is asked for.
        keep_ratio
            Fraction that the configuration keeps; None if it names a count.
        """
        return (Stage(requires=self.requires),)

    def resolve(self, depth: int | None, keep_ratio: float | None) -> Selector:
        """Settle options that were left open, for one model and budget; by default there are none.

        Parameters as in `stages`. What comes back is asked for the stages, and chooses.
        """
        return self

    def plan(self, depth: int, keep_ratio: float | None) -> tuple[Stage, ...]:
        """`stages` on one model; an override may leave out the parameters that its stages do not depend on."""
        known = inspect.signature(self.stages).parameters
        given: dict[str, Any] = {"depth": depth, "keep_ratio": keep_ratio}
        return self.stages(**{name: value for name, value in given.items() if name in known})

    def parameters(self, need: Need) -> Mapping[str, Any]:
        """Arguments of the computation behind `need`, where it has some."""
        return {}

    def vision_layers(self, depth: int, feature_layer: int) -> tuple[int, ...]:
        """Layers of the vision tower (0-based) whose attention or keys the method wants, in the order it wants them.

        Parameters
        ----------
        depth
            Number of layers of the tower.
        feature_layer
            Layer whose output feeds the projector; by default the one that is tapped, if anything of the tower is
            needed.
        """
        needed = frozenset().union(*(stage.requires for stage in self.stages()))
        return (feature_layer,) if needed & _TOWER_ATTENTION else ()

    @abstractmethod
    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> Mapping[str, Range]:
        """Options that `vtc.calibrate` may choose, and between what; by default there are none.

        What a range allows need not be possible in every combination: those that are not are passed over.

        Parameters
        ----------
        depth
            Decoder layers of the model.
        keep_ratio
            The budget.
        """
        return {}

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults."""
        return {item.name: item.default for item in dataclasses.fields(cls) if item.init}  # type: ignore[arg-type]


class ScoreSelector(Selector):
    """A method that only ranks: the best scores stay, the lower index winning ties."""

    @abstractmethod
    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) float32, higher is better."""

    def select(self, ctx: VisualContext) -> Selection:
        """Exact top-k of `score`.

        Raises
        ------
        InputError
            A score is NaN.
        """
        scores = self.score(ctx)
        if bool(torch.isnan(scores).any()):
            raise InputError(f"{self.name} computed NaN scores; its inputs ({sorted(self._inputs())}) are broken.")
        return Selection(ctx.n, kernels.topk_indices(scores, min(ctx.budget, ctx.n)))

    def _inputs(self) -> set[str]:
        return {need.value for stage in self.stages() for need in stage.requires} or {"features"}
