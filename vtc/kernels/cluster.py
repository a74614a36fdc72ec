"""Clustering of tokens within groups: the tokens of a frame, of a window of frames, of a set of static places.

Groups are compared side by side, padded to the longest of a block. For that the host has to know how many tokens a
group has. A GPU, which would have to be waited for, is only asked if the caller does not say how many at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vtc.errors import ConfigError

from .dispatch import op, queues
from .host import upload

__all__ = ["counts_of", "density_clusters", "density_peaks", "gathered_rows", "nearest_in_group", "padded_groups"]

_BLOCK = 512  # tokens of a group that are compared at a time
_ELEMENTS = 2**22  # distances, and features, held at a time
_LEAST_FILLED = 0.8  # of the longest group of a block
_SHORT = 16  # tokens of a group, up to which padding costs less than another block
_ROUNDING = 4e-6  # share of the squared norms below which a squared distance is rounding
_FAR = 1e38  # beyond every squared distance; added where a branch on a random mask would be slow
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
        How many tokens each group has at most; None: a GPU is asked.

    Returns
    -------
    Tensor
        (N,) float32: logarithm of density times separation, minus infinity for all but the first of equal vectors and
        for tokens without a group.
    """
    scores = x.new_full((len(x) + 1,), -torch.inf, dtype=torch.float32)  # what is not there is written behind the last
    for _, index, there in _side_by_side(group, sizes, x.shape[1]):
        found = _Distances(gathered_rows(x, index.clamp(max=len(x) - 1)), there).peaks(neighbours)
        scores.scatter_(0, index.flatten(), found.flatten())
    return scores[:-1]


@op()
def density_clusters(
    x: Tensor, group: Tensor, counts: Tensor, neighbours: int, sizes: Sequence[int] | None = None
) -> Tensor:
    """Cluster the tokens of every group around those with the highest scores of `density_peaks` (DPC-kNN).

    Every token joins the nearest centre of its group, of equals the first; centres stay with themselves.

    Parameters
    ----------
    x
        (N, D).
    group
        (N,) long, 0 to G - 1; -1 for tokens that have no part in it.
    counts
        (G,) long: clusters of every group, at most as many as it has tokens.
    neighbours
        At least 1; groups may be smaller.
    sizes
        How many tokens each group has at most; None: a GPU is asked.

    Returns
    -------
    Tensor
        (N,) long: the token at the centre of the cluster of every token; -1 without a group, and without clusters.
    """
    n = len(x)
    joined = group.new_full((n + 1,), -1)  # what is not there is written behind the last
    for groups, index, there in _side_by_side(group, sizes, x.shape[1], len(counts)):
        distances = _Distances(gathered_rows(x, index.clamp(max=n - 1)), there)
        place = distances.clusters(distances.peaks(neighbours), counts.index_select(0, groups)[:, None])
        centre = index.gather(1, place.clamp(min=0)).masked_fill_(place < 0, -1)
        joined.scatter_(0, index.flatten(), centre.flatten())
    return joined[:-1]


def counts_of(group: Tensor, groups: int) -> Tensor:
    """(G,) long: how many tokens each of G groups has; `group` (N,) long, -1 for tokens of none."""
    counts = group.new_zeros(groups + 1).index_add_(0, group + 1, torch.ones_like(group))
    return counts[1:]


def padded_groups(order: Tensor, starts: Tensor, counts: Tensor, longest: int) -> Tensor:
    """(G, longest) long: runs of the tokens `order` (N,), one a row, with N where one is shorter.

    `starts` (G,) are the places of their first tokens, `counts` (G,) how many they have.
    """
    at = torch.arange(longest, device=order.device)
    tokens = order[(starts[:, None] + at).clamp_(max=len(order) - 1)]
    return tokens.masked_fill_(at >= counts[:, None], len(order))


def gathered_rows(x: Tensor, index: Tensor) -> Tensor:
    """(..., D) float32: the rows of `x` (N, D) at `index`, in memory of their own."""
    return x.index_select(0, index.flatten()).float().view(*index.shape, x.shape[1])


def _by_group(group: Tensor, sizes: Sequence[int] | None, groups: int | None) -> tuple[Tensor, Tensor, Sequence[int]]:
    """Return tokens in the order of their groups (N,), counts of the groups (G,), and the most that the host knows.

    Those of no group come last. What the host can know without waiting, it looks up instead.
    """
    if groups is None:
        groups = int(group.max()) + 1 if sizes is None and len(group) else len(sizes or ())
    counts = counts_of(group, groups)
    order = group.masked_fill(group < 0, groups).argsort(stable=True)
    return order, counts, counts.tolist() if sizes is None or not queues(group) else sizes


def _side_by_side(
    group: Tensor, sizes: Sequence[int] | None, width: int, groups: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield groups of similar length (g,), their tokens (g, m), and which of these there are (g, m), or None for all.

    The tokens that there are not have the number N.
    """
    order, counts, most = _by_group(group, sizes, groups)
    starts = counts.cumsum(0) - counts
    runs = [(number, min(size, len(order))) for number, size in enumerate(most) if size and len(order)]
    runs.sort(key=lambda run: -run[1])

    def fits(part: list[tuple[int, int]]) -> bool:
        lengths = [size for _, size in part]
        return _alike(lengths) and len(part) * lengths[0] * max(lengths[0], width) <= _ELEMENTS

    for part in _blocks(runs, fits):
        numbers = upload(torch.tensor([number for number, _ in part]), group.device)
        index = padded_groups(order, starts[numbers], counts[numbers], part[0][1])
        full = not queues(group) and part[0][1] == part[-1][1]
        yield numbers, index, None if full else index < len(order)


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


def _alike(lengths: Sequence[int]) -> bool:
    """Whether descending lengths are similar, so that little is padded."""
    return lengths[-1] >= _LEAST_FILLED * lengths[0] or lengths[0] <= _SHORT


class _Distances:
    """Squared distances, divided by D, between the tokens of each group, computed in blocks of rows.

    Those to a token that is not there are infinite; those of one are arbitrary.

    Parameters
    ----------
    x
        (G, m, D), which is written over.
    there
        (G, m) bool: which tokens there are; None: all.
    """

    def __init__(self, x: Tensor, there: Tensor | None) -> None:
        self.there = there
        # Relative to the mean of the group, where products lose fewer digits.
        if there is None:
            x -= x.mean(dim=1, keepdim=True)
        else:
            x.mul_(there[..., None])
            x -= x.sum(dim=1, keepdim=True) / there.sum(dim=1)[:, None, None].clamp(min=1)
        self.x = x
        self.lengths = torch.linalg.vector_norm(x, dim=2).square_().div_(x.shape[2])
        self.from_all = self.lengths if there is None else self.lengths.masked_fill(~there, torch.inf)
        self.rows = max(1, _ELEMENTS // self.lengths.numel())
        self.whole = self._block(0) if self.rows >= x.shape[1] else None

    def _block(self, start: int) -> Tensor:
        ours = slice(start, start + self.rows)
        both = self.lengths[:, ours, None] + self.from_all[:, None]
        products = self.x[:, ours] @ self.x.transpose(1, 2)
        if products.shape[1] == products.shape[2]:
            # The same from either side, so that two tokens that are next to each other are equally dense.
            products = (products + products.transpose(1, 2)).div_(2)
        squared = torch.add(both, products, alpha=-2 / self.x.shape[2])
        return squared.masked_fill_(squared < both.mul_(_ROUNDING), 0.0)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.x.shape[1], self.rows):
            yield slice(start, start + self.rows), self._block(start) if self.whole is None else self.whole

    def peaks(self, neighbours: int) -> Tensor:
        """(G, m): the scores of `density_peaks`; minus infinity for what is not there."""
        there, spreads, largest = self.there, [], []
        for rows, squared in self._blocks():
            near = squared.topk(min(neighbours, squared.shape[2]), dim=2, largest=False).values
            if there is None:
                spreads.append(near.mean(dim=2))
                largest.append(squared.amax(dim=2))
            else:
                count = there.sum(dim=1, keepdim=True).clamp(min=1, max=neighbours)
                spreads.append(near.masked_fill_(near == torch.inf, 0.0).sum(dim=2) / count)
                largest.append(torch.where(there[:, None], squared, 0.0).amax(dim=2) * there[:, rows])
        spread = torch.cat(spreads, dim=1)
        # From the densest on, the first of equals before the others.
        rank = _ranks(spread, descending=False)
        nearest = [
            torch.add(squared, rank[:, None] >= rank[:, rows, None], alpha=_FAR).amin(dim=2)
            for rows, squared in self._blocks()
        ]
        separation = torch.cat(nearest, dim=1)
        separation = torch.where(separation < _FAR, separation, torch.cat(largest, dim=1).amax(dim=1, keepdim=True))
        scores = separation.log_().mul_(0.5).sub_(spread)
        return scores if there is None else scores.masked_fill_(~there, -torch.inf)

    def clusters(self, scores: Tensor, counts: Tensor) -> Tensor:
        """(G, m): the place of the centre nearest to each token, if the best `counts` (G, 1) are centres; -1: none."""
        centre = _ranks(scores, descending=True) < counts
        nearest = [
            torch.add(squared, ~centre[:, None], alpha=_FAR).argmin(dim=2)  # the first of equals
            for _, squared in self._blocks()
        ]
        own = torch.arange(scores.shape[1], device=scores.device)
        return torch.where(centre, own, torch.cat(nearest, dim=1)).masked_fill_(counts == 0, -1)


def _ranks(values: Tensor, descending: bool) -> Tensor:
    """(G, m) long: the place of every value in the order of its row, the first of equals before the others."""
    order = values.argsort(dim=1, descending=descending, stable=True)
    at = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, at)


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
        How many tokens, and targets, each group has at most; None: a GPU is asked.

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
    x = x.detach()
    n, width = x.shape
    found = torch.full((n + 1,), -1, dtype=torch.long, device=x.device)  # what is not there is written behind the last
    goal_group = group[targets] if target_group is None else target_group
    groups = max(map(len, filter(None, (sizes, target_sizes))), default=None)
    if groups is None:
        groups = 1 + int(torch.cat([group, goal_group]).max()) if n else 0
    order, counts, most = _by_group(group, sizes, groups)
    place, goals, most_goals = _by_group(goal_group, target_sizes, groups)
    named = targets[place]
    vectors = x.index_select(0, named).float()
    if metric == "cosine":
        vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_(min=1e-12)
        half = None
    else:
        half = torch.linalg.vector_norm(vectors, dim=1).square_() / 2
    runs = [
        (number, at, min(_BLOCK, size - at), goal_size)
        for number, (size, goal_size) in enumerate(zip(most, most_goals, strict=False))
        for at in range(0, size, _BLOCK)
        if goal_size
    ]
    runs.sort(key=lambda run: -run[2])

    def fits(part: list[tuple[int, int, int, int]]) -> bool:
        rows, columns = part[0][2], max(goal_size for _, _, _, goal_size in part)
        alike = _alike([size for _, _, size, _ in part])
        return alike and len(part) * max(rows * columns, (rows + columns) * width) <= _ELEMENTS

    starts, goal_starts = counts.cumsum(0) - counts, goals.cumsum(0) - goals
    numbers = torch.arange(len(place), device=x.device)
    for part in _blocks(runs, fits):
        number, skipped = upload(torch.tensor([run[:2] for run in part]), x.device).unbind(1)
        index = padded_groups(order, starts[number] + skipped, counts[number] - skipped, part[0][2])
        columns = [run[3] for run in part]
        at = padded_groups(numbers, goal_starts[number], goals[number], max(columns))
        goal = at.clamp(max=len(place) - 1)
        closeness = gathered_rows(x, index.clamp(max=n - 1)) @ gathered_rows(vectors, goal).transpose(1, 2)
        if half is not None:
            closeness -= half[goal][:, None]
        if queues(x) or min(columns) < max(columns):
            closeness.masked_fill_((at == len(place))[:, None], -torch.inf)
        best = at.gather(1, closeness.argmax(dim=2))  # the first of equals
        reached = place[best.clamp(max=len(place) - 1)].masked_fill_(best == len(place), -1)
        found.scatter_(0, index.flatten(), reached.flatten())
    return found[:n]
