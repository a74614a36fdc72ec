"""Merging of tokens into others."""

from __future__ import annotations

import torch
from torch import Tensor

from .cosines import with_inverse_norms
from .dispatch import op, queues

_BLOCK = 512  # rows of the similarity matrix computed at a time


@op("vtc.kernels.triton_merge:bipartite_merge")
def bipartite_merge(metric: Tensor, r: int, order: str = "original", first: int = 0) -> tuple[Tensor, Tensor]:
    """Merge `r` of N tokens into their most similar partner (AIM, arXiv 2412.03248; the matching is ToMe's).

    Every second token is a source, from token `first` on, and the others are destinations. The `r` sources that are
    most similar (cosine) to any destination are merged into it, possibly several into one; all other tokens stay. `r`
    is limited to N // 2; for `r` <= 0 and for a single token nothing is merged.

    Parameters
    ----------
    metric
        (B, N, d): features whose similarity counts. A zero row has cosine 0 to every other.
    r
        Number of tokens to merge away.
    order
        "original": slots in the order of their anchor tokens. "author": as in the released code, first the sources that
        stay, by descending similarity, then all destinations. The order matters where slots are merged again.
    first
        0 or 1: where the sources begin. 1 counts like a sequence with one protected token in front.

    Returns
    -------
    anchors
        (B, N - r) long: anchor token of every slot.
    assign
        (B, N) long: slot of every token; the value of a slot is the unweighted mean of its tokens.
    """
    batch, n = metric.shape[:2]
    r = max(0, min(r, n // 2))
    unit = torch.nn.functional.normalize(metric.float(), dim=-1, eps=1e-12)
    tokens = torch.arange(n, device=metric.device)
    if r == 0:
        return tokens.expand(batch, n), tokens.expand(batch, n)
    best, partner = _best_partner(unit[:, first::2], unit[:, 1 - first :: 2])
    return slots_of_matching(best, partner, n, r, order, first)


def slots_of_matching(
    best: Tensor, partner: Tensor, n: int, r: int, order: str, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the result of `bipartite_merge` for the best destinations `partner` of the sources and their similarity.

    `best` and `partner` are (B, S).
    """
    batch, device = len(best), best.device
    source, destination = torch.arange(first, n, 2, device=device), torch.arange(1 - first, n, 2, device=device)
    ranked = best.sort(dim=1, descending=True, stable=True).indices
    merged, staying = ranked[:, :r], ranked[:, r:]
    anchors = torch.cat([source[staying], destination.expand(batch, -1)], dim=1)
    if order == "original":
        anchors = anchors.sort(dim=1).values
    slots = torch.arange(n - r, device=device).expand(batch, -1)
    assign = torch.empty(batch, n, dtype=torch.long, device=device).scatter_(1, anchors, slots)
    target = assign.gather(1, destination[partner.gather(1, merged)])
    return anchors, assign.scatter_(1, source[merged], target)


def _best_partner(source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest product (B, S) of every row of `source` (B, S, d) with `destination` (B, T, d) and its index."""
    values, places = [], []
    for block in source.split(_BLOCK, dim=1):
        similarity = block @ destination.transpose(1, 2)
        places.append(similarity.argmax(dim=-1))  # the first of equals
        values.append(similarity.amax(dim=-1))
    return torch.cat(values, dim=1), torch.cat(places, dim=1)


@op()
def nearest_slots(metric: Tensor, keep: Tensor, targets: Tensor | None = None) -> Tensor:
    """Assign every token to a kept one: itself, or of the `targets` the one whose metric has the largest cosine.

    Ties go to the target named first. Needs O(K) memory per token of a block.

    Parameters
    ----------
    metric
        (N, d): a zero row has cosine 0 to every other.
    keep
        (K,) long, ascending and unique.
    targets
        (T,) long: which of the kept ones others may join; None: all.

    Returns
    -------
    Tensor
        (N,) long: slot of every token, 0 to K - 1; -1 for what is not kept if there are no targets.
    """
    metric, inverse = with_inverse_norms(metric)
    targets = keep if targets is None else targets.contiguous()
    slots = torch.arange(len(keep), device=keep.device)
    assign = torch.full_like(inverse, -1, dtype=torch.long).index_copy_(0, keep, slots)
    if not len(targets):
        return assign
    unit = metric.index_select(0, targets).float() * inverse[targets, None]
    place = torch.searchsorted(keep, targets)
    if queues(metric):  # how many others there are is not asked: the kept ones are compared as well
        nearest = [
            place[(rows.float() * scale[:, None] @ unit.T).argmax(dim=1)]
            for rows, scale in zip(metric.split(_BLOCK), inverse.split(_BLOCK), strict=True)
        ]
        return torch.where(assign < 0, torch.cat(nearest), assign)
    for rows in (assign < 0).nonzero()[:, 0].split(_BLOCK):
        similarity = metric.index_select(0, rows).float() * inverse[rows, None] @ unit.T
        assign[rows] = place[similarity.argmax(dim=1)]  # the first of equals
    return assign


@op("vtc.kernels.triton_merge:segment_merge")
def segment_merge(x: Tensor, slot: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Sum the rows of every slot with weights, in the order of the rows on every device.

    Sums are computed in float32 (float64 for float64) and rounded once. Differentiable with respect to `x`.

    Parameters
    ----------
    x
        (N, ...): floating point.
    slot
        (N,) long: slot of every row, 0 to `count` - 1, or -1 for none.
    count
        Number of slots, K.
    weight
        (N,); None: all 1.

    Returns
    -------
    Tensor
        (K, ...), of the dtype of `x`; 0 for an empty slot.
    """
    rows = x.reshape(len(x), -1) if x.numel() else x.new_zeros(len(x), x.shape[1:].numel())
    rows = rows if x.dtype == torch.float64 else rows.float()
    ordered, order = slot.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(count + 1, device=slot.device))
    order = order[int(bounds[0]) : int(bounds[-1])]
    if not order.numel() or not rows.shape[1]:
        return x.new_zeros(count, *x.shape[1:])
    share = None if weight is None else weight.to(rows.dtype).index_select(0, order)
    bag = torch.nn.functional.embedding_bag
    merged = bag(order, rows, bounds - bounds[0], mode="sum", per_sample_weights=share, include_last_offset=True)
    return merged.to(x.dtype).view(count, *x.shape[1:])


def recycle_cells(scores: Tensor, low: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens `low` of every grid cell into the best of them (VFlowOpt, arXiv 2508.05211, section 3).

    Parameters
    ----------
    scores
        (N,): the weights of the tokens of a cell are proportional to them, or equal if their sum is 0.
    low
        (M,) long: tokens to merge; all others stay unchanged.
    cell
        (N,) long: grid cell of every token.

    Returns
    -------
    keep
        (K,) long, ascending: the tokens not in `low`, and of every cell the best token in `low` (the lower index among
        equals).
    assign
        (N,) long: slot of every token.
    weight
        (N,) float32: weight of every token in its slot; 1 for tokens not in `low`.
    """
    n = scores.numel()
    scores = scores.float()
    low = low.sort().values
    _, group = cell[low].unique(return_inverse=True)
    count = int(group.max()) + 1 if low.numel() else 0
    # Sorted by group, then by descending score, then by index, so that the first of every group is its anchor.
    ranked = scores[low].sort(descending=True, stable=True).indices
    ranked = ranked[group[ranked].sort(stable=True).indices]
    first = torch.ones_like(ranked, dtype=torch.bool)
    first[1:] = group[ranked][1:] != group[ranked][:-1]
    anchors = low[ranked[first]]  # of groups 0..count-1, in this order
    kept = torch.ones(n, dtype=torch.bool, device=scores.device)
    kept[low] = False
    kept[anchors] = True
    keep = kept.nonzero()[:, 0]
    slot = kept.long().cumsum(0) - 1
    assign = slot.clone()
    assign[low] = slot[anchors[group]]
    total = scores.new_zeros(count).index_add_(0, group, scores[low])
    size = torch.bincount(group, minlength=count).float()
    weight = torch.ones_like(scores)
    empty = total.abs() < torch.finfo(torch.float32).tiny
    weight[low] = torch.where(empty[group], 1 / size[group], scores[low] / total[group].masked_fill(empty[group], 1))
    return keep, assign, weight
