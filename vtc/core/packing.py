"""Packing: how a batch of rows that keep different numbers of tokens becomes one rectangle, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError, InputError

__all__ = ["PackPlan"]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Plan by which a batch of rows with different numbers of kept tokens becomes one rectangle, and back.

    Attributes
    ----------
    index
        (B, T) long: source column of every packed slot. Within a row all are distinct and kept ones are in original
        order; padding slots point at some dropped column, so that every gather is in range.
    mask
        (B, T) bool: True for kept tokens, False for padding.
    lengths
        (B,) long: kept tokens per row; T is the largest.
    source_length
        L, columns before packing.
    side
        Where the padding goes: "left" right-aligns the tokens, as generation wants it; "right" left-aligns them.
    """

    index: Tensor
    mask: Tensor
    lengths: Tensor
    source_length: int
    side: str = "left"

    @classmethod
    def from_keep(cls, keep: Tensor, side: str = "left") -> PackPlan:
        """Plan from keep (B, L) bool: True for every token, of whatever kind, that stays.

        Raises
        ------
        InputError
            `keep` is not a two-axis boolean tensor.
        ConfigError
            `side` is neither "left" nor "right".
        """
        return cls.pack(keep, side=side)[0]

    @classmethod
    def pack(
        cls,
        keep: Tensor,
        planes: Sequence[Tensor] = (),
        dims: Sequence[int] = (),
        *,
        marks: Tensor | None = None,
        marked: Sequence[Tensor] = (),
        side: str = "left",
    ) -> tuple[PackPlan, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Make a plan and carry it out, in one operation.

        Parameters
        ----------
        keep, side
            As in `from_keep`.
        planes, dims
            What to pack, along which axes, each as in `take`.
        marks
            (B, L) bool: tokens that have a row in each of `marked`.
        marked
            Planes (marks, ...) of which the rows of kept tokens stay.

        Returns
        -------
        plan, planes, marked

        Raises
        ------
        InputError, ConfigError
            As `from_keep` and `take`.
        """
        if keep.ndim != 2 or keep.dtype != torch.bool:
            raise InputError(f"keep must be (B, L) bool, got {tuple(keep.shape)} {keep.dtype}.")
        if side not in ("left", "right"):
            raise ConfigError(f'side must be "left" or "right", got {side!r}.')
        rows, length = keep.shape
        for x, dim in zip(planes, dims, strict=True):
            _check_plane(x, dim, rows, length)
        packed = kernels.select_gather(keep, planes, dims, marks=marks, marked=marked, side=side)
        return cls(packed.index, packed.mask, packed.lengths, length, side), packed.planes, packed.marked

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """Pack `x` along `dim`, whose batch axis is the one before: (B, L, ...) with 1, position ids (A, B, L) with 2.

        A batch axis of size 1 is shared by all rows. What lands in padding slots is arbitrary but finite whenever `x`
        is. Differentiable.

        Returns
        -------
        Tensor
            `x` with its batch axis of size B and axis `dim` of size T.

        Raises
        ------
        InputError
            The shape does not fit the plan.
        """
        _check_plane(x, dim, len(self.index), self.source_length)
        return kernels.gather_planes(self.index, [x], [dim])[0]

    def scatter(self, y: Tensor) -> Tensor:
        """Undo `take`: (B, T, ...) to (B, L, ...), zero where a token was dropped. Differentiable.

        Raises
        ------
        InputError
            The shape does not fit the plan.
        """
        rows, width = self.index.shape
        if y.ndim < 2 or y.shape[:2] != (rows, width):
            raise InputError(f"Cannot scatter a tensor of shape {tuple(y.shape)}: expected ({rows}, {width}, ...).")
        # The kept columns of all rows are distinct, so plain writing (no accumulation) is exact and deterministic.
        starts = torch.arange(rows, device=self.index.device)[:, None] * self.source_length
        flat, mask = (self.index + starts).flatten(), self.mask.flatten()
        values = y.flatten(0, 1)
        if not bool(mask.all()):
            flat, values = flat[mask], values[mask.to(y.device)]
        out = y.new_zeros(rows * self.source_length, *y.shape[2:])
        return out.index_copy_(0, flat.to(y.device), values).unflatten(0, (rows, self.source_length))


def _check_plane(x: Tensor, dim: int, rows: int, length: int) -> None:
    batch = x.shape[dim - 1] if 1 <= dim < x.ndim else -1
    if batch not in (1, rows) or x.shape[dim] != length:
        raise InputError(
            f"Cannot pack a tensor of shape {tuple(x.shape)} along axis {dim}: expected batch {rows} (or 1) "
            f"at axis {dim - 1} and length {length} at axis {dim}."
        )
