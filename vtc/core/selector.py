"""The two classes that every method extends."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..errors import InputError
from .context import VisualContext
from .ranges import Range
from .selection import Selection
from .signals import Signal
from .sites import BeforeDecoder, DecoderLayer, Site
from .stage import ModelShape, Stage

__all__ = ["ScoreSelector", "Selector"]


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
        Signals that it must be given besides the features. Methods for which this depends on their options override
        `stages`.
    sites
        Kinds of sites where a user may place it with ``at=``, as long as it has one stage and its signals can be read
        there.
    reads_features
        False if it works without the features. Only `vtc.select` asks, where the caller may have none.
    adaptive
        True if the method itself decides how many tokens stay; the budget is then at most a ceiling.
    trained
        True if it needs more than a model's tensors: modules of its own, which ``vtc train`` makes and its option
        ``modules`` names, or regions that the user marks.
    instead
        Options to propose where a model cannot supply a signal.
    cost
        Operations that grow fastest, of its signals and its choice, in the N tokens, K kept, T of text and the width d;
        for `vtc methods`. Empty: not said.
    inputs
        What it is made for, "image" or "video" or both; for `vtc methods`. It runs on either.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    requires: ClassVar[tuple[Signal, ...]] = ()
    sites: ClassVar[tuple[type[Site], ...]] = (BeforeDecoder, DecoderLayer)
    reads_features: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    instead: ClassVar[Mapping[type[Signal], str]] = {}
    cost: ClassVar[str] = ""
    inputs: ClassVar[tuple[str, ...]] = ("image", "video")

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Return the stages of the method in the order of their sites; by default one, before the language model.

        Parameters
        ----------
        shape
            Sizes of the model; None: no model, only the first stage is asked for.
        keep_ratio
            Fraction that the configuration keeps; None if it names a count.
        """
        return (Stage(requires=self.requires),)

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> Selector:
        """Settle options that were left open, for one model and budget; by default there are none.

        Parameters as in `stages`. The result is asked for the stages, and selects.
        """
        return self

    def moved(self, stage: Stage, site: Site) -> Stage:
        """Return the only stage of the method for another of its `sites`; by default nothing else changes.

        Methods that merge where that is possible, or that read less where less can be read, override it.
        """
        return dataclasses.replace(stage, site=site)

    def layer_changes(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return what is to be added to the outputs of linear layers of the language model; by default nothing.

        A trained method may bring a low-rank adapter of the decoder. Layers are named as within the language model, and
        what is called gets the layer's input. It is so in every pass while the method is installed and not disabled,
        with pictures or without.
        """
        return {}

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
            A score is NaN, or their number is not that of the tokens.
        """
        scores = self.score(ctx)
        if scores.shape != (ctx.n,):
            raise InputError(f"{self.name} computed scores {tuple(scores.shape)}; {ctx.n} tokens need ({ctx.n},).")
        try:
            return Selection.best(scores, ctx.budget)
        except InputError:
            inputs = sorted({signal.name for stage in self.stages() for signal in stage.requires}) or ["features"]
            raise InputError(f"{self.name} computed NaN scores; its inputs ({inputs}) are broken.") from None
