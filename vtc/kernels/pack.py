"""Selection of tokens and packing of a batch: the choice and all gathers in one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import InputError

from .dispatch import op, queues

__all__ = ["Packed", "gather_planes", "select_gather", "topk_indices"]


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed batch.

    Attributes
    ----------
    index
        (B, T) long: column of every slot. Columns are distinct within a row, and those of kept tokens ascend; padding
        slots hold dropped columns.
    mask
        (B, T) bool: True for kept tokens, False for padding.
    lengths
        (B,) long: kept tokens per row, at most T.
    planes
        The gathered planes, with T in place of L and B in place of a batch axis of 1. Values in padding slots are
        arbitrary, but finite if the plane is.
    marked
        The rows of kept tokens of the planes that have one row per marked token.
    """

    index: Tensor
    mask: Tensor
    lengths: Tensor
    planes: tuple[Tensor, ...]
    marked: tuple[Tensor, ...]


@op("vtc.kernels.triton_pack:topk_indices")
def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Return the ascending indices of the `k` highest `scores` (N,); ties go to the lower index, NaN is lowest.

    `torch.topk` resolves ties differently on different devices, which could then keep different tokens.

    Returns
    -------
    Tensor
        (min(k, N),) long.
    """
    k = max(0, min(k, scores.numel()))
    if 0 < k < scores.numel() and not queues(scores):
        value, index = scores.topk(k + 1)  # NaN first
        found = value.tolist()
        if found[k - 1] > found[k] and not math.isnan(found[0]):
            return index[:k].sort().values  # nothing ties with what is left, so that any order of equals will do
    # The number of them is known, so that a GPU need not be waited for.
    return torch.nonzero_static(_best(scores, k), size=k).squeeze(1)


@op("vtc.kernels.triton_pack:select_gather")
def select_gather(
    keep: Tensor,
    planes: Sequence[Tensor] = (),
    axes: Sequence[int] = (),
    *,
    scores: Tensor | None = None,
    columns: Tensor | None = None,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    threshold: float | None = None,
    marks: Tensor | None = None,
    marked: Sequence[Tensor] = (),
    side: str = "left",
) -> Packed:
    """Select the best tokens of every segment and pack them, with the tokens that always stay, into a padded batch.

    Parameters
    ----------
    keep
        (B, L) bool: tokens that stay regardless of scores, such as text.
    planes
        Tensors to gather: embeddings (B, L, D), position ids (B, L) or (3, B, L), masks; a batch axis of size 1 is
        shared by all rows.
    axes
        Axis of the L columns of every plane; the batch axis is the one before.
    scores
        (M,): scores of the candidate tokens, segment after segment; None: no candidates.
    columns
        (M,) long: places of the candidates, ``row * L + column``, ascending within a segment, distinct, not in `keep`.
    offsets
        (S + 1,) long: boundaries of the S segments among the M candidates.
    counts
        (S,) long: number of candidates that stay per segment; ties go to the lower column.
    threshold
        Instead of `counts`: lowest score that stays.
    marks
        (B, L) bool: tokens that have a row in every plane of `marked`.
    marked
        Planes (marks, ...) with one row per marked token, ordered by row and column, such as deepstack features.
    side
        Padding side of shorter rows, "left" or "right".

    Raises
    ------
    InputError
        `scores` without columns, offsets and one of `counts` and `threshold`.
    """
    check_scores(scores, columns, offsets, counts, threshold)
    if scores is not None and columns is not None and offsets is not None:
        stays = _stays(scores, offsets, counts, threshold)
        keep = keep.flatten().index_fill(0, columns[stays], True).view_as(keep)
    index, mask, lengths = _slots(keep, side)
    rows: tuple[Tensor, ...] = ()
    if marks is not None and marked:
        staying = keep[marks.to(keep.device)].nonzero().squeeze(1)
        rows = tuple(plane.index_select(0, staying.to(plane.device)) for plane in marked)
    return Packed(index, mask, lengths, _gathered(index, planes, axes), rows)


@op("vtc.kernels.triton_pack:gather_planes")
def gather_planes(index: Tensor, planes: Sequence[Tensor], axes: Sequence[int]) -> tuple[Tensor, ...]:
    """Gather planes by an existing `index` (B, T); arguments and result as in `select_gather`."""
    return _gathered(index, planes, axes)


def check_scores(
    scores: Tensor | None,
    columns: Tensor | None,
    offsets: Tensor | None,
    counts: Tensor | None,
    threshold: float | None,
) -> None:
    """Raise `InputError` if there are scores without the arguments that they require."""
    incomplete = columns is None or offsets is None or (counts is None) == (threshold is None)
    if scores is not None and incomplete:
        raise InputError("scores need columns, offsets and either counts or a threshold.")


def _best(scores: Tensor, k: int) -> Tensor:
    """Return (N,) bool: the `k` highest scores; ties go to the lower index."""
    if k >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = scores.topk(k, sorted=False).values.amin()
    best = scores > least
    ties = scores == least
    return best | (ties & (ties.cumsum(0) <= k - best.sum()))


def _stays(scores: Tensor, offsets: Tensor, counts: Tensor | None, threshold: float | None) -> Tensor:
    """Return (M,) bool: the candidates that stay."""
    if counts is None:
        return scores >= threshold  # type: ignore[operator]
    bounds = offsets.tolist()
    parts = [
        _best(scores[start:stop], count)
        for start, stop, count in zip(bounds[:-1], bounds[1:], counts.tolist(), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(scores, dtype=torch.bool)


def _slots(keep: Tensor, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, mask and lengths of `Packed`."""
    batch, length = keep.shape
    lengths = keep.sum(dim=1)
    sizes = lengths.tolist()
    width = max(sizes, default=0)
    if all(size == width for size in sizes):
        index = keep.nonzero()[:, 1].view(batch, width)
        return index, torch.ones_like(index, dtype=torch.bool), lengths
    # Kept columns go to one end in order; dropped columns fill the remaining slots at the other end.
    kept = keep.long().cumsum(dim=1)
    dropped = torch.arange(1, length + 1, device=keep.device) - kept
    if side == "left":
        slot = torch.where(keep, width - lengths[:, None] + kept, dropped - (length - width)) - 1
    else:
        slot = torch.where(keep, kept, lengths[:, None] + dropped) - 1
    index = keep.new_empty(batch, width, dtype=torch.long)
    row, column = ((slot >= 0) & (slot < width)).nonzero(as_tuple=True)
    index[row, slot[row, column]] = column
    place = torch.arange(width, device=keep.device)
    mask = place >= width - lengths[:, None] if side == "left" else place < lengths[:, None]
    return index, mask, lengths


def _gathered(index: Tensor, planes: Sequence[Tensor], axes: Sequence[int]) -> tuple[Tensor, ...]:
    """Gather every plane in one copy, with one flat index of rows and columns."""
    flat: dict[tuple[int, torch.device], Tensor] = {}
    out = []
    for plane, axis in zip(planes, axes, strict=True):
        batch, length = plane.shape[axis - 1], plane.shape[axis]
        step = length if batch > 1 else 0
        if (step, plane.device) not in flat:
            starts = torch.arange(len(index), device=index.device)[:, None] * step
            flat[step, plane.device] = (index + starts).flatten().to(plane.device)
        merged = plane.flatten(axis - 1, axis)
        taken = merged.index_select(axis - 1, flat[step, plane.device])
        out.append(taken.unflatten(axis - 1, tuple(index.shape)))
    return tuple(out)
