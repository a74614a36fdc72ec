"""Pieces of trained modules: positions on the grid of tokens, and checks of sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["between_layers", "check_layers", "check_sizes", "place_codes"]


def place_codes(coords: Tensor, width: int) -> Tensor:
    """Compute codes (N, width) of the rows and columns of tokens: half of a vector for the column, half for the row.

    Each half is ``[sin(p w_i), cos(p w_i)]`` with ``w_i = 10000^(-4 i / width)``, i = 0 .. width / 4 - 1.

    Parameters
    ----------
    coords
        (N, 4) long: view, t, row and column.
    width
        A multiple of 4.
    """
    steps = torch.arange(width // 4, dtype=torch.float32, device=coords.device)
    rate = 10000.0 ** (-steps / (width / 4))
    angles = [coords[:, axis, None].float() * rate for axis in (3, 2)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def between_layers(depth: int, every: int | None) -> list[int]:
    """Return the decoder layers (0-based) before which modules stand: every few of `depth`, from the first few on.

    None: every fourth, or in a shallow decoder so many that there are two.

    Raises
    ------
    ConfigError
        There is no such layer.
    """
    step = min(4, max(1, depth // 3)) if every is None else every
    if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step < depth:
        raise ConfigError(f"every must be an integer between 1 and {depth - 1}, the last decoder layer; got {every!r}.")
    return list(range(step, depth, step))


def check_sizes(method: str, **sizes: int) -> None:
    """Raise ConfigError unless all of these are integers of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{method}: {name} must be an integer of at least 1, got {value!r}.")


def check_layers(method: str, name: str, layers: Sequence[int], first: int) -> tuple[int, ...]:
    """Return layers as a tuple; raise ConfigError unless they are ascending integers of at least `first`."""
    given = tuple(layers) if isinstance(layers, (list, tuple)) else ()
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= first for layer in given)
    if not given or not whole or any(a >= b for a, b in itertools.pairwise(given)):
        raise ConfigError(f"{method}: {name} must be ascending layers from {first} on, got {layers!r}.")
    return given
