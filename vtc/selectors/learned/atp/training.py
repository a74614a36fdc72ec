"""How the modules of ATP-LLaVA begin, and what they learn from.

A choice has no gradient. So it is measured: every sample is read with several multiples of the planned numbers of
tokens, and how likely the answer changes is known at each. This tells how many tokens the sample needs, and the modules
learn to predict it.
"""

from __future__ import annotations

import math
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

__all__ = ["Study", "begin", "loss", "multiples", "needs", "study"]

_STEPS = 5  # multiples that a sample is read with, from 1 / LARGEST to LARGEST


@dataclass(frozen=True, eq=False)
class Study:
    """What was found out about one sample, or about several that are stacked.

    Attributes
    ----------
    changes
        (..., J): how likely the answer changes, at each multiple.
    reads
        (..., J, places, P, F): what each module reads there of each of P images.
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
    projector
        Not used.
    decoder
        Tells how many numbers a value vector has.
    target
        Fraction of the visual tokens that is left on average over the places; every place keeps half of the one before.
    layout, grid, width
        As in `AtpModule`.
    seed
        Of the weights.

    Raises
    ------
    ConfigError
        The model's sizes are not known, `decoder` among them, or an argument is invalid.
    """
    places = len(AtpSelector().resolve(shape, None).layers or ())
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ConfigError(f"atp: target must be a fraction above 0, got {target!r}.")
    if decoder is None:
        raise ConfigError("atp: modules read value vectors, but the width of the model's is not known.")
    values = decoder.shape["kv_heads"] * decoder.shape["head_width"]
    halves = [0.5**place for place in range(places)]
    shares = [min(1.0, target * half * places / sum(halves)) for half in halves]
    settings: dict[str, Any] = {"shares": shares, "values": values, "layout": layout, "grid": grid, "width": width}
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


def needs(changes: Tensor) -> Tensor:
    """Tell the need (...) of changes (..., J): the logarithm of the multiple at which the answer stops changing.

    Taking the change at a multiple as the probability that more is needed, this is the mean of that logarithm:
    ``log 4 (2 c - 1)`` with c the mean of the changes, as multiples are evenly spaced from -log 4 to log 4.
    """
    return math.log(LARGEST) * (2 * changes.mean(dim=-1) - 1)


def loss(module: AtpModules, found: Study) -> Tensor:
    """Compute how wrongly the modules tell what the sample needs.

        mean over places p and multiples j of  (need_pj - need)^2 - level_p (f_pj - 1)

    where need_pj is what the module at p says having read what was left with multiple j, and f_pj the factor that it
    chooses there, which is taken as a constant; of several images the mean. The second term, whose value is 0 here,
    raises the level while the mean of f is above 1 and lowers it below: it binds the mean over all samples and leaves
    each of them free.
    """
    need = needs(found.changes)[..., None]
    parts = []
    for each, read in zip(module.places, found.reads.unbind(-3), strict=True):
        error = (each.need(read).mean(dim=-1) - need).square().mean()  # type: ignore[operator]
        above = each(read).detach().mean() - 1
        parts.append(error - (each.level - each.level.detach()) * above)  # type: ignore[operator]
    return torch.stack(parts).mean()
