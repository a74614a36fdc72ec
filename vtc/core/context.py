"""`VisualContext`: what a selector gets to know about the tokens of one image or video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from .grids import Grid, count_tokens, grid_coords
from .signals import Signal, named_signal
from .sites import BeforeDecoder, Site

__all__ = ["VisualContext", "check_finite"]

_LARGEST = 1e15


@dataclass(eq=False)
class VisualContext:
    """Facts about the N scorable (non-structural) tokens of one segment, for a selector.

    ``ctx[ClsAttention]`` is the value of a signal that the selector requires; where it requires several of one type,
    ``ctx[ClsAttention(layers=(3,))]`` tells them apart.

    Attributes
    ----------
    features
        (N, D) as the language model will see them.
    budget
        How many tokens to keep.
    generator
        CPU generator, the only source of randomness a selector may use.
    grids
        Views in token order, each (t, h, w).
    modality
        "image" or "video".
    site
        Where the tokens leave.
    keep_ratio
        Fraction that `budget` was rounded from, for methods that round in their own way; None if a count was asked for.
    structural
        How many structural tokens of the segment stay beside the N, for methods that count them in their budget.
    other_visuals
        How many other images and videos the prompt has; tiles that stand apart in the prompt count as images.
    tokens_at_input
        N when the segment entered the language model, or inside a tower this tower, for schedules that refer to it;
        None: this very N.
    signals
        Values of the signals, in the form that each of them describes.
    """

    features: Tensor
    budget: int
    generator: torch.Generator
    grids: tuple[Grid, ...]
    modality: str = "image"
    site: Site = field(default_factory=BeforeDecoder)
    keep_ratio: float | None = None
    structural: int = 0
    other_visuals: int = 0
    tokens_at_input: int | None = None
    signals: Mapping[Signal, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        """N, the number of scorable tokens."""
        return self.features.shape[0]

    def __getitem__(self, signal: type[Signal] | Signal) -> Tensor:
        """Return the value of a signal, named by its type or, where there are several of the type, by itself.

        Raises
        ------
        InputError
            It was not supplied, or the type does not say which of several is meant.
        """
        return named_signal(self.signals, signal)

    def coords(self) -> Tensor:
        """(N, 4) long: (view, t, row, column) of every token, on the features' device."""
        return grid_coords(self.grids, self.features.device)

    def check(self) -> VisualContext:
        """Check shapes against N and that every number is finite; returns the context itself.

        Raises
        ------
        InputError
            Naming the field and what is wrong with it.
        """
        n = self.n
        if n == 0:
            raise InputError("features are empty: there are no visual tokens to select from.")
        if count_tokens(self.grids) != n:
            raise InputError(f"grids {self.grids} hold {count_tokens(self.grids)} tokens, but features have {n} rows.")
        for signal, value in self.signals.items():
            signal.check(value, n)
        check_finite({"features": self.features, **{signal.name: value for signal, value in self.signals.items()}})
        return self


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Raise InputError, naming them, if some of these tensors hold NaN or infinite numbers."""
    present = {name: value for name, value in values.items() if value.numel()}
    if not present:
        return
    # A tensor is finite exactly if its extremes are (NaN wins both), and finding them allocates nothing.
    device = next(iter(present.values())).device
    extremes = [torch.stack(value.aminmax()).to(device, torch.float32) for value in present.values()]
    # Methods square features and sum the squares in float32.
    limits = torch.tensor([_LARGEST if name == "features" else torch.inf for name in present], device=device)
    # NaN is below no limit. One transfer: a GPU is waited for once.
    finite = (torch.stack(extremes).abs() < limits[:, None]).all(dim=1).tolist()
    bad = [name for name, good in zip(present, finite, strict=True) if not good]
    if bad:
        raise InputError(
            f"{', '.join(bad)}: NaN or infinite values, or features above {_LARGEST:g}. Check the image, and the "
            "precision of the vision tower."
        )
