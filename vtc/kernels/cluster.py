"""Clustering of tokens within groups: the tokens of a frame, of a window of frames, of a set of static places.

Groups are compared side by side, padded to the longest of a block. How many tokens a group has, the host has to know:
it asks, for which a GPU is waited for, unless the caller says.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vtc.errors import ConfigError

from .cosines import with_inverse_norms
from .dispatch import op
from .host import upload

__all__ = ["density_peaks", "gathered_rows", "nearest_in_group", "padded_groups", "sorted_by_group"]

_BLOCK = 512  # tokens of a group that are compared at a time
_ELEMENTS = 2**22  # distances, and features, held at a time
_LEAST_FILLED = 0.8  # of the longest group of a block
_SHORT = 16  # tokens of a group, up to which padding costs less than another block
_ROUNDING = 4e-6  # share of the squared norms below which a squared distance is rounding
_METRICS = ("cosine", "euclidean")

Run = TypeVar("Run")


@op()
def density_peaks(x: Tensor, group: Tensor, neighbours: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Score every token by its density and its distance to denser tokens of its group (DPC-kNN).

    Distances d are Euclidean, divided by sqrt(D). The density of a token is ``exp(-mean d^2)`` over the `neighbours`
    tokens of its group next to it, itself included; its separation is the distance to the nearest denser token, of the
    densest the largest distance in the group. Cluster centres are the tokens with the largest product. Of equally dense
    tokens the one with the lower index counts as denser. Vectors that differ by rounding alone are equal.

    Groups are compared side by side in blocks of bounded memory, a group of many tokens in blocks of its rows.

    Parameters
    ----------
    x
        (N, D).
    group
        (N,) long, at least 0; -1 for tokens that have no part in it.
    neighbours
        At least 1; groups may be smaller.
    sizes
        How many tokens each group has, where the host knows; None: it asks.

    Returns
    -------
    Tensor
        (N,) float32: logarithm of density times separation, minus infinity for all but the first of equal vectors and
        for tokens without a group.
    """
    n, width = len(x), x.shape[1]
    scores = x.new_full((n + 1,), -torch.inf, dtype=torch.float32)  # what is not there is written behind the last
    order, counts = sorted_by_group(group, sizes)
    runs = sorted(_runs(counts), key=lambda run: -run[1])

    def fits(part: list[tuple[int, int]]) -> bool:
        return _alike(part) and len(part) * part[0][1] * max(part[0][1], width) <= _ELEMENTS

    for part in _blocks(runs, fits):
        index, there = padded_groups(order, part)
        found = _peaks(gathered_rows(x, index), None if _full(part) else there, neighbours)
        scores.scatter_(0, index.masked_fill_(~there, n).flatten(), found.flatten())
    return scores[:n]


def sorted_by_group(group: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, Sequence[int]]:
    """Return the tokens in the order of their groups (N,), without those of group -1, and how many each group has."""
    counts = torch.bincount(group + 1).tolist()[1:] if sizes is None else sizes
    last = group.masked_fill(group < 0, torch.iinfo(group.dtype).max)
    return last.argsort(stable=True)[: sum(counts)], counts


def padded_groups(tokens: Tensor, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return runs of the `tokens` (M,) as rows (G, m), and (G, m) bool: there is one.

    A run is the place of its first token and how many it has, not 0. Some other token stands where it has fewer than m.
    """
    table = upload(torch.tensor(runs), tokens.device)
    at = torch.arange(max(length for _, length in runs), device=tokens.device)
    return tokens[(table[:, :1] + at).clamp_(max=len(tokens) - 1)], at < table[:, 1:]


def gathered_rows(x: Tensor, index: Tensor) -> Tensor:
    """(..., D) float32: the rows of `x` (N, D) at `index`, in memory of their own."""
    return x.index_select(0, index.flatten()).float().view(*index.shape, x.shape[1])


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Start and length of every group that has tokens."""
    starts = itertools.accumulate(sizes, initial=0)
    return [(start, size) for start, size in zip(starts, sizes, strict=False) if size]


def _blocks(runs: Sequence[Run], fits: Callable[[list[Run]], bool]) -> Iterator[list[Run]]:
    """Cut a list into parts that fit, or that are of length 1."""
    part: list[Run] = []
    for run in runs:
        if part and not fits([*part, run]):
            yield part
            part = []
        part.append(run)
    if part:
        yield part


def _alike(runs: Sequence[tuple[int, int]]) -> bool:
    """Whether runs of descending length are of similar length, so that little is padded."""
    return runs[-1][1] >= _LEAST_FILLED * runs[0][1] or runs[0][1] <= _SHORT


def _full(runs: Sequence[tuple[int, int]]) -> bool:
    return len({length for _, length in runs}) == 1


def _peaks(x: Tensor, there: Tensor | None, neighbours: int) -> Tensor:
    """Return the scores (G, m) of groups `x` (G, m, D), which is written over; tokens are `there` (G, m), or all."""
    absent = None if there is None else ~there[..., None]
    there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if there is None else there
    if absent is not None:
        x.masked_fill_(absent, 0.0)
    # Relative to the mean of the group, where products lose fewer digits.
    x -= x.sum(dim=1, keepdim=True) / there.sum(dim=1)[:, None, None]
    if absent is not None:
        x.masked_fill_(absent, 0.0)
    lengths = torch.linalg.vector_norm(x, dim=2).square() / x.shape[2]
    rows = max(1, _ELEMENTS // there.numel())
    blocks = range(0, x.shape[1], rows)

    def distances(start: int) -> Tensor:
        ours = slice(start, start + rows)
        both = lengths[:, ours, None] + lengths[:, None]
        squared = torch.baddbmm(both, x[:, ours], x.transpose(1, 2), alpha=-2 / x.shape[2])
        squared.masked_fill_(squared <= _ROUNDING * both, 0.0)
        return squared if absent is None else squared.masked_fill_(absent[:, None, :, 0], torch.inf)

    count = there.sum(dim=1, keepdim=True).clamp(max=neighbours)
    spreads, largest = [], lengths.new_zeros(len(x), 1)
    whole = distances(0) if len(blocks) == 1 else None
    for start in blocks:
        squared = distances(start) if whole is None else whole
        near = squared.topk(min(neighbours, x.shape[1]), dim=2, largest=False).values
        if absent is not None:
            near = near.masked_fill(near == torch.inf, 0.0)
            squared = squared.masked_fill(squared == torch.inf, 0.0) * there[:, start : start + rows, None]
        spreads.append(near.sum(dim=2) / count)
        largest = torch.maximum(largest, squared.flatten(1).amax(dim=1, keepdim=True))
    spread = torch.cat(spreads, dim=1)
    # From the densest on, the first of equals before the others.
    order = spread.argsort(dim=1, stable=True)
    at = torch.arange(x.shape[1], device=x.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, at)
    separations = []
    for start in blocks:
        squared = distances(start) if whole is None else whole
        no_denser = rank[:, None] >= rank[:, start : start + rows, None]
        separations.append(squared.masked_fill_(no_denser, torch.inf).amin(dim=2))
    separation = torch.cat(separations, dim=1)
    separation = torch.where(separation == torch.inf, largest, separation)
    return 0.5 * separation.log() - spread


@op()
def nearest_in_group(
    x: Tensor,
    group: Tensor,
    targets: Tensor,
    metric: str = "cosine",
    *,
    target_group: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    target_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Find for every token the most similar target of its own group; ties go to the target named first.

    Every group is compared with its targets alone, a group of many tokens in blocks of them.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    group
        (N,) long, at least 0; -1 for tokens that are not looked at.
    targets
        (T,) long: tokens.
    metric
        "cosine", or "euclidean": the least distance.
    target_group
        (T,) long: the group that each target is one of; None: its own in `group`.
    sizes, target_sizes
        How many tokens, and targets, each group has, where the host knows; None: it asks.

    Returns
    -------
    Tensor
        (N,) long: place among `targets`, -1 without a group, and where the group has none.

    Raises
    ------
    ConfigError
        There is no such metric.
    """
    if metric not in _METRICS:
        raise ConfigError(f"nearest_in_group: metric is one of {', '.join(_METRICS)}; got {metric!r}.")
    x, inverse = with_inverse_norms(x)
    n, width = x.shape
    found = torch.full((n + 1,), -1, dtype=torch.long, device=x.device)  # what is not there is written behind the last
    place, goals = sorted_by_group(group[targets] if target_group is None else target_group, target_sizes)
    order, counts = sorted_by_group(group, sizes)
    named = targets[place]
    vectors = x.index_select(0, named).float()
    if metric == "cosine":
        vectors *= inverse[named, None]
        half = None
    else:
        half = torch.linalg.vector_norm(vectors, dim=1).square_() / 2
    numbers = torch.arange(len(place), device=x.device)
    first, first_goal = (itertools.accumulate(each, initial=0) for each in (counts, goals))
    runs = [
        ((start + at, min(_BLOCK, count - at)), (goal, many))
        for start, count, goal, many in zip(first, counts, first_goal, goals, strict=False)
        for at in range(0, count, _BLOCK)
        if many
    ]
    runs.sort(key=lambda run: -run[0][1])

    def fits(part: list[tuple[tuple[int, int], tuple[int, int]]]) -> bool:
        rows, columns = (max(length for _, length in side) for side in zip(*part, strict=True))
        alike = _alike([ours for ours, _ in part])
        return alike and len(part) * max(rows * columns, (rows + columns) * width) <= _ELEMENTS

    for part in _blocks(runs, fits):
        ours, theirs = ([run[side] for run in part] for side in (0, 1))
        (index, there), (at, goal) = padded_groups(order, ours), padded_groups(numbers, theirs)
        closeness = gathered_rows(x, index) @ gathered_rows(vectors, at).transpose(1, 2)
        if half is not None:
            closeness -= half[at][:, None]
        if not _full(theirs):
            closeness.masked_fill_(~goal[:, None], -torch.inf)
        best = at.gather(1, closeness.argmax(dim=2))  # the first of equals
        found.scatter_(0, index.masked_fill_(~there, n).flatten(), place[best].flatten())
    return found[:n]
