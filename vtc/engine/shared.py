"""Rows of a prompt that show the same images: the encoder runs on those of the first row, for all of them.

Several questions about one picture are such a prompt. The processor writes the picture into every row; the towers are
the largest part of a call, and need to see it once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vtc.adapters.base import Layout, rows_of
from vtc.errors import InputError

if TYPE_CHECKING:
    from vtc.engine.encoder import Encoded

__all__ = ["first_row", "for_rows", "output_for_rows"]


def first_row(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the part of an encoder's arguments that belongs to the first of `rows` rows.

    Raises
    ------
    InputError
        The rows show different images.
    """
    return tuple(_first(value, rows) for value in args), {name: _first(value, rows) for name, value in kwargs.items()}


def _first(value: Any, rows: int) -> Any:
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    if len(value) % rows == 0:
        first = value[: len(value) // rows]
        if bool((value.unflatten(0, (rows, -1)) == first).all()):
            return first
    raise InputError(f"the {rows} rows of this prompt do not show the same images, so they cannot share an encoder run")


def output_for_rows(output: Any, rows: int) -> Any:
    """Return an encoder's output as it would be if all `rows` rows had been encoded."""
    repeated = copy.copy(output)
    repeated.pooler_output = _repeated(output.pooler_output, rows)
    layers = getattr(output, "deepstack_features", None)
    if layers is not None:
        repeated.deepstack_features = [_repeated(layer, rows) for layer in layers]
    return repeated


def _repeated(value: Any, rows: int) -> Any:
    return torch.cat([value] * rows) if isinstance(value, torch.Tensor) else type(value)(list(value) * rows)


def for_rows(output: Any, encoded: Encoded, rows: int) -> tuple[Any, Encoded]:
    """Return an output and what was read of it as if all `rows` rows had been encoded."""
    output, layout = output_for_rows(output, rows), encoded.layout
    joined = layout.lengths is None  # then segments are found by their placeholders
    return output, replace(
        encoded,
        features=rows_of(output).detach(),
        layout=Layout(
            None if layout.lengths is None else layout.lengths * rows,
            layout.grids if joined else layout.grids * rows,
            layout.structural.repeat(rows),
            layout.unit,
        ),
        signals={signal: torch.cat([values] * rows) for signal, values in encoded.signals.items()},
        survivors={site: left.repeat(rows) for site, left in encoded.survivors.items()},
        resampled=None if encoded.resampled is None else encoded.resampled * rows,
    )
