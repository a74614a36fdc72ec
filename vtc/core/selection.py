"""What a selector answers (`Selection`), and what a batch of answers becomes (`PackPlan`): all ragged-batch logic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError, InputError
from .context import Grid

__all__ = ["PackPlan", "Selection"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which K of N tokens stay, and optionally where the others go.

    Attributes
    ----------
    n
        N, tokens before.
    keep
        (K,) long, ascending and unique: original index of the token that stands in each slot. Empty and full are legal.
    assign
        (N,) long or None: slot in 0..K-1 that each token flows into, -1 for dropped. A kept token flows into its own
        slot. None: nothing is merged.
    weight
        (N,) float32 or None: coefficient of each token in its slot, ``merged[j] = sum of weight[i] * x[i]``. Used as it
        is, not normalised, so that "target plus mean of the rest" can be said as well as a mean. None: plain mean.

    Raises
    ------
    InputError
        Any of this does not hold.
    """

    n: int
    keep: Tensor
    assign: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        keep, n = self.keep, self.n
        if keep.ndim != 1 or keep.dtype != torch.long:
            raise InputError(f"Selection.keep must be (K,) long, got {tuple(keep.shape)} {keep.dtype}.")
        if keep.numel() and not bool((keep[:-1] < keep[1:]).all() & (keep[0] >= 0) & (keep[-1] < n)):
            raise InputError(f"Selection.keep must be ascending, unique and within 0..{n - 1}, got {_preview(keep)}.")
        if self.assign is not None:
            self._check_assign(self.assign)
        if self.weight is not None:
            self._check_weight(self.weight)
            object.__setattr__(self, "weight", self.weight.float())

    def _check_assign(self, assign: Tensor) -> None:
        if assign.shape != (self.n,) or assign.dtype != torch.long:
            raise InputError(f"Selection.assign must be ({self.n},) long, got {tuple(assign.shape)} {assign.dtype}.")
        if not bool(((assign >= -1) & (assign < self.k)).all()):
            raise InputError(f"Selection.assign must hold slots 0..{self.k - 1} or -1, got {_preview(assign)}.")
        if not torch.equal(assign[self.keep], self._slots()):
            raise InputError("Selection.assign must send every kept token to its own slot: assign[keep] == 0..K-1.")

    def _check_weight(self, weight: Tensor) -> None:
        if self.assign is None:
            raise InputError("Selection.weight says how tokens are merged, so it needs assign, which is None.")
        if weight.shape != (self.n,) or not weight.is_floating_point():
            raise InputError(f"Selection.weight must be ({self.n},) float, got {tuple(weight.shape)} {weight.dtype}.")
        if not bool(torch.isfinite(weight).all()):
            raise InputError("Selection.weight has NaN or infinite entries.")

    @classmethod
    def from_indices(cls, n: int, indices: Tensor) -> Selection:
        """Plain selection of distinct `indices` in any order."""
        return cls(n, indices.sort().values)

    @classmethod
    def full(cls, n: int, device: torch.device | str | None = None) -> Selection:
        """Keep everything."""
        return cls(n, torch.arange(n, device=device))

    @property
    def k(self) -> int:
        """K, tokens after."""
        return self.keep.numel()

    @property
    def mask(self) -> Tensor:
        """(N,) bool: True where the token stays."""
        mask = torch.zeros(self.n, dtype=torch.bool, device=self.keep.device)
        mask[self.keep] = True
        return mask

    @property
    def ratio(self) -> float:
        """Fraction kept; 1.0 of nothing."""
        return self.k / self.n if self.n else 1.0

    @property
    def sizes(self) -> Tensor:
        """(K,) long: how many tokens each slot stands for."""
        assign = self._assign()
        return torch.bincount(assign[assign >= 0], minlength=self.k)

    def merge(self, x: Tensor) -> Tensor:
        """Reduce any per-token tensor (N, ...) to the slots (K, ...).

        Without `assign` this is plain indexing, bit for bit. With it the sums run in float32 (float64 stays) and the
        result has the dtype of `x`. Differentiable.

        Raises
        ------
        InputError
            The first axis is not N, or integers would have to be averaged.
        """
        _check_first_axis(x, self.n, "merge")
        if self.assign is None:
            return x[self.keep.to(x.device)]
        if not x.is_floating_point():
            raise InputError(f"merge averages, which {x.dtype} cannot hold; index with selection.keep instead.")
        return kernels.segment_merge(x, self.assign.to(x.device), self.k, self._weight().to(x.device))

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread (K, ...) back over the tokens (N, ...): each token gets its slot's value, dropped ones zero."""
        _check_first_axis(y, self.k, "unmerge")
        assign = self._assign().to(y.device)
        out = y.new_zeros(self.n, *y.shape[1:])
        member = (assign >= 0).nonzero().squeeze(1)
        return out.index_copy(0, member, y[assign[member]])

    def grid_mask(self, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
        """The mask cut into views: one (t, h, w) bool tensor per grid.

        Raises
        ------
        InputError
            The grids do not hold exactly N tokens.
        """
        sizes = [math.prod(grid) for grid in grids]
        if sum(sizes) != self.n:
            raise InputError(
                f"grids {tuple(grids)} hold {sum(sizes)} tokens, but the selection was made from {self.n}."
            )
        return tuple(part.view(*grid) for part, grid in zip(self.mask.split(sizes), grids, strict=True))

    def then(self, other: Selection) -> Selection:
        """Compose with `other`, which selects among the slots of this one; associative.

        Raises
        ------
        InputError
            `other` was not made from K tokens.
        """
        if other.n != self.k:
            raise InputError(f"The second selection was made from {other.n} tokens, but the first leaves {self.k}.")
        keep = self.keep[other.keep]
        if self.assign is None and other.assign is None:
            return Selection(self.n, keep)
        first, second = self._assign(), other._assign()
        member = first >= 0
        slot = first.clamp(min=0)  # -1 would read the last slot; those entries are replaced below
        if self.k == 0:
            return Selection(self.n, keep, first)
        assign = torch.where(member, second[slot], first)
        weight = torch.where(member, self._weight() * other._weight()[slot], 0.0)
        return Selection(self.n, keep, assign, weight)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; `from_dict` restores them exactly (on the CPU)."""
        return {
            "n": self.n,
            "keep": self.keep.tolist(),
            "assign": None if self.assign is None else self.assign.tolist(),
            "weight": None if self.weight is None else self.weight.tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Selection:
        """Inverse of `to_dict`; validates like the constructor."""
        assign, weight = data.get("assign"), data.get("weight")
        return cls(
            data["n"],
            torch.tensor(data["keep"], dtype=torch.long),
            None if assign is None else torch.tensor(assign, dtype=torch.long),
            None if weight is None else torch.tensor(weight, dtype=torch.float32),
        )

    def _slots(self) -> Tensor:
        return torch.arange(self.k, device=self.keep.device)

    def _assign(self) -> Tensor:
        """`assign`, spelled out if nothing is merged."""
        if self.assign is not None:
            return self.assign
        return torch.full((self.n,), -1, device=self.keep.device).index_copy(0, self.keep, self._slots())

    def _weight(self) -> Tensor:
        """`weight`, spelled out if slots are plain means; what dropped tokens carry is never read."""
        if self.weight is not None:
            return self.weight
        if self.k == 0:
            return torch.zeros(self.n, device=self.keep.device)
        return self.sizes.float().reciprocal()[self._assign().clamp(min=0)]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """How a batch of rows with different numbers of kept tokens becomes one rectangle, and back.

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


def _check_first_axis(x: Tensor, size: int, what: str) -> None:
    if x.ndim < 1 or x.shape[0] != size:
        raise InputError(f"{what} expects {size} entries along the first axis, got shape {tuple(x.shape)}.")


def _check_plane(x: Tensor, dim: int, rows: int, length: int) -> None:
    batch = x.shape[dim - 1] if 1 <= dim < x.ndim else -1
    if batch not in (1, rows) or x.shape[dim] != length:
        raise InputError(
            f"Cannot pack a tensor of shape {tuple(x.shape)} along axis {dim}: expected batch {rows} (or 1) "
            f"at axis {dim - 1} and length {length} at axis {dim}."
        )


def _preview(x: Tensor) -> str:
    head = ", ".join(map(str, x[:8].tolist()))
    return f"[{head}{', ...' if x.numel() > 8 else ''}]"
