"""How the modules of ATP-LLaVA begin, and what they learn from.

A choice has no gradient. So it is measured: every sample is read with several multiples of the planned numbers of
tokens, and how likely the answer changes is known at each. Between them the loss is a line, and the modules learn to
find for every sample the multiple where another token is no longer worth its price.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....core.stage import ModelShape
from ....errors import ConfigError
from ..decoder import Decoder
from ..folder import Modules, begin_module
from .method import AtpSelector
from .module import LARGEST, AtpModules, following_the_plan

__all__ = ["Study", "begin", "loss", "multiples", "study"]

_STEPS = 5  # multiples that a sample is read with, from 1 / LARGEST to LARGEST


@dataclass(frozen=True, eq=False)
class Study:
    """What was found out about one sample.

    Attributes
    ----------
    changes
        (J,): how likely the answer changes, at each multiple.
    reads
        (J, places, P, F): what each module reads there of each of P images.
    """

    changes: Tensor
    reads: Tensor


def begin(
    shape: ModelShape,
    projector: Mapping[str, Tensor] | None = None,
    decoder: Decoder | None = None,
    *,
    target: float = 0.125,
    layout: str = "sorted",
    grid: int = 24,
    width: int = 16,
    seed: int = 0,
) -> tuple[Modules, AtpModules]:
    """Make untrained modules for a model: they keep what is planned of every image.

    Parameters
    ----------
    shape
        Of the model.
    projector, decoder
        Not used.
    target
        Fraction of the visual tokens that is left on average over the places; every place keeps half of the one before.
    layout, grid, width
        As in `AtpModule`.
    seed
        Of the weights.

    Raises
    ------
    ConfigError
        The model's sizes are not known, or an argument is invalid.
    """
    places = len(AtpSelector().resolve(shape, None).layers or ())
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ConfigError(f"atp: target must be a fraction above 0, got {target!r}.")
    halves = [0.5**place for place in range(places)]
    shares = [min(1.0, target * half * places / sum(halves)) for half in halves]
    settings: dict[str, Any] = {"shares": shares, "layout": layout, "grid": grid, "width": width}
    return begin_module(AtpSelector.name, shape, AtpModules, settings, seed)


def multiples() -> Tensor:
    """(J,): the multiples that a sample is read with."""
    return LARGEST ** torch.linspace(-1, 1, _STEPS)


def _places(module: AtpModules) -> range:
    return range(len(module.places))


@torch.no_grad()
def study(module: AtpModules, read: Callable[[], Tensor]) -> Study:
    """Read one sample with every multiple; `read` gives the loss L of its answer, averaged over the tokens.

    1 - exp(-L) is about how likely a token changes. It is bounded, so that no single sample rules.
    """
    changes, reads = [], []
    for multiple in multiples().tolist():
        with following_the_plan(multiple) as noted:
            changes.append(-torch.expm1(-read().float().cpu()))
        reads.append(
            torch.stack([torch.stack([read for at, read in noted if at == place]) for place in _places(module)])
        )
    return Study(torch.stack(changes), torch.stack(reads))


def loss(module: AtpModules, found: Study) -> Tensor:
    """Compute how likely the answer changes at the multiples that the modules choose, plus the price of the tokens.

        mean over places p and multiples j of  change(f_pj) + price_p (f_pj - 1)

    where f_pj is what the module at p chooses having read what was left with multiple j, of several images the mean.
    The price rises while the mean of f is above 1 and falls below: it binds the mean over all samples and leaves each
    of them free.
    """
    chosen = [each(read).mean(dim=-1) for each, read in zip(module.places, found.reads.unbind(1), strict=True)]
    factors = torch.stack(chosen)
    place = (1 + torch.log(factors) / torch.log(torch.tensor(LARGEST))) * (_STEPS - 1) / 2  # (places, J) in 0 .. J - 1
    # Averaged half a step up and down: at the corner of a line every image would stay, as each price between its slopes
    # is met there.
    place = (place[..., None] + torch.linspace(-0.5, 0.5, 9)).clamp(0, _STEPS - 1)
    low = place.detach().long().clamp(0, _STEPS - 2)
    change = torch.lerp(found.changes[low], found.changes[low + 1], place - low).mean(dim=-1)
    above, price = factors.mean(dim=1) - 1, module.price.exp()
    # The last term has the value 0; down its slope the price goes up.
    return (change.mean(dim=1) + price.detach() * above - (price - price.detach()) * above.detach()).mean()
