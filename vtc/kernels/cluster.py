"""Clustering of tokens within groups: the tokens of a frame, of a window of frames, of a set of static places."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import ConfigError

from .cosines import with_inverse_norms
from .dispatch import op

__all__ = ["density_peaks", "nearest_in_group", "padded_groups"]

_BLOCK = 512  # rows compared at a time
_ELEMENTS = 2**22  # distances, and features, held at a time
_ROUNDING = 4e-6  # share of the squared norms below which a squared distance is rounding
_METRICS = ("cosine", "euclidean")


@op()
def density_peaks(x: Tensor, group: Tensor, neighbours: int) -> Tensor:
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

    Returns
    -------
    Tensor
        (N,) float32: logarithm of density times separation, minus infinity for all but the first of equal vectors and
        for tokens without a group.
    """
    scores = x.new_full((len(x),), -torch.inf, dtype=torch.float32)
    grouped = (group >= 0).nonzero()[:, 0]
    if not len(grouped):
        return scores
    members, there = padded_groups(grouped, group[grouped])
    size = members.shape[1]
    step = max(1, min(_ELEMENTS // size**2, _ELEMENTS // (size * max(1, x.shape[1]))))
    for index, exists in zip(members.split(step), there.split(step), strict=True):
        scores[index[exists]] = _peaks(x[index].float(), exists, neighbours)[exists]
    return scores


def padded_groups(tokens: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `tokens` (M,) as rows (G, m), one for every `group` (M,) that occurs, and (G, m) bool: one is there.

    Tokens keep their order; where a group has fewer than m, 0 stands.
    """
    sizes = group.unique(return_counts=True)[1]
    there = torch.arange(int(sizes.max()), device=group.device) < sizes[:, None]
    ordered = tokens[group.argsort(stable=True)]
    return torch.zeros_like(there, dtype=torch.long).masked_scatter_(there, ordered), there


def _peaks(x: Tensor, there: Tensor, neighbours: int) -> Tensor:
    """Return the scores (G, m) of groups `x` (G, m, D) whose tokens are `there` (G, m); `x` is written over."""
    absent = None if bool(there.all()) else ~there[..., None]
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
        spreads.append(near.masked_fill(near == torch.inf, 0.0).sum(dim=2) / count)
        finite = squared.masked_fill(squared == torch.inf, 0.0) * there[:, start : start + rows, None]
        largest = torch.maximum(largest, finite.flatten(1).amax(dim=1, keepdim=True))
    spread = torch.cat(spreads, dim=1)
    at = torch.arange(x.shape[1], device=x.device)
    separations = []
    for start in blocks:
        squared = distances(start) if whole is None else whole
        ours = spread[:, start : start + rows, None]
        earlier = at < at[start : start + rows, None]
        denser = (spread[:, None] < ours) | ((spread[:, None] == ours) & earlier)
        separations.append(squared.masked_fill_(~denser, torch.inf).amin(dim=2))
    separation = torch.cat(separations, dim=1)
    separation = torch.where(separation == torch.inf, largest, separation)
    return 0.5 * separation.log() - spread


@op()
def nearest_in_group(x: Tensor, group: Tensor, targets: Tensor, metric: str = "cosine") -> Tensor:
    """Find for every token the most similar target of its own group; ties go to the target named first.

    Tokens are sorted by group and processed in blocks, each compared with the targets of its groups alone.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    group
        (N,) long, at least 0; -1 for tokens that are not looked at.
    targets
        (T,) long: tokens of groups.
    metric
        "cosine", or "euclidean": the least distance.

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
    found = torch.full_like(inverse, -1, dtype=torch.long)
    order = (group >= 0).nonzero()[:, 0]
    if not len(targets) or not len(order):
        return found
    place = group[targets].argsort(stable=True)
    targets = targets[place]
    of = group[targets].contiguous()
    goals = x.index_select(0, targets).float()
    goals = goals * inverse[targets, None] if metric == "cosine" else goals
    half = goals.square().sum(dim=1) / 2
    order = order[group[order].argsort(stable=True)]
    sorted_group = group[order]
    # About a group per block: it is compared with the targets of all groups that it has a part in.
    size = min(_BLOCK, max(64, len(order) // len(of.unique())))
    last = torch.arange(size - 1, len(order) + size - 1, size, device=order.device).clamp(max=len(order) - 1)
    starts = torch.searchsorted(of, sorted_group[::size].contiguous()).tolist()
    stops = torch.searchsorted(of, sorted_group[last], right=True).tolist()
    for rows, start, stop in zip(order.split(size), starts, stops, strict=True):
        if start == stop:
            continue
        closeness = x.index_select(0, rows).float() @ goals[start:stop].T
        if metric == "euclidean":
            closeness -= half[start:stop]
        closeness.masked_fill_(group[rows, None] != of[start:stop], -torch.inf)
        at = closeness.argmax(dim=1)  # the first of equals
        alone = closeness.amax(dim=1) == -torch.inf
        found[rows] = place[at + start].masked_fill(alone, -1)
    return found
