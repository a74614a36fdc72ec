"""Specification of the shared operations, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "attention_exchange",
    "bipartite_merge",
    "context_relevance",
    "farthest_point",
    "max_sum",
    "pagerank",
    "patch_entropy",
    "recycle_cells",
    "topk_indices",
]

_BLOCK = 512  # rows of the similarity matrix that exist at a time
_WORKSPACE = 64 * 2**20  # bytes up to which all of it may


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest of `scores` (N,), best first, the lower index first among equals.

    `torch.topk` leaves the order of ties to the back end, so two devices could keep different tokens; a stable sort
    cannot.

    Returns
    -------
    Tensor
        (min(k, N),) long.
    """
    return scores.sort(descending=True, stable=True).indices[:k]


def farthest_point(x: Tensor, k: int, first: int | None = None) -> Tensor:
    """Greedy max-min selection of `k` rows of `x` (N, D) under the distance 1 - cosine.

    Starts at `first`, or at the row that is farthest from its nearest neighbour; then always takes the row that is
    farthest from everything taken. Taken rows are out of the game, so the picks are distinct even among duplicates.
    Lower index wins ties. A zero row has cosine 0 to every other.

    Up to N = 4096 the similarities are computed once, as one product in `_WORKSPACE` bytes; a pick then reads one row.
    Beyond that each pick is one matrix-vector product, in O(N) memory beside one normalised float32 copy of `x`.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order taken.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=1, eps=1e-12)
    n = unit.shape[0]
    k = min(k, n)
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    if k == 0:
        return picks
    table = _similarities(unit) if 4 * n * n <= _WORKSPACE else None
    if first is not None:
        taken = torch.tensor(first, device=x.device)
    else:
        taken = (_nearest_similarity(unit) if table is None else table.amax(dim=1)).argmin()
    similarity = torch.full((n,), -torch.inf, device=x.device)  # to the closest row taken so far
    for step in range(k):
        if step:
            taken = similarity.argmin()  # argmin returns the first of equals
        picks[step] = taken
        # A tensor index: a GPU is never waited for.
        row = (unit if table is None else table).index_select(0, taken.view(1)).squeeze(0)
        similarity = torch.maximum(similarity, row if table is not None else unit @ row)
        similarity.index_fill_(0, taken.view(1), torch.inf)
    return picks


def _similarities(unit: Tensor) -> Tensor:
    """(N, N): `unit` @ `unit`.T with -inf on the diagonal; the matrix is symmetric, so half of it is multiplied out."""
    n = unit.shape[0]
    table = unit.new_empty(n, n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        block = unit[start:stop] @ unit[start:].T
        table[start:stop, start:] = block
        table[start:, start:stop] = block.T
    return table.fill_diagonal_(-torch.inf)


def _nearest_similarity(unit: Tensor) -> Tensor:
    """(N,): similarity of every row of `unit` (N, D) to the row most similar to it, itself excluded."""
    n = unit.shape[0]
    best = torch.full((n,), -torch.inf, device=unit.device)
    for start in range(0, n, _BLOCK):
        block = (
            unit[start : start + _BLOCK] @ unit[start:].T
        )  # the matrix is symmetric: columns from `start` on suffice
        block.fill_diagonal_(-torch.inf)
        stop = start + block.shape[0]
        best[start:stop] = torch.maximum(best[start:stop], block.amax(dim=1))
        best[start:] = torch.maximum(best[start:], block.amax(dim=0))
    return best


def max_sum(x: Tensor, k: int, first: int | Tensor) -> Tensor:
    """Greedy max-sum selection of `k` rows of `x` (N, D): always the row least similar to all taken ones together.

    Like `farthest_point`, with the sum of the cosines to the taken rows in place of the largest of them (ToDRE, arXiv
    2505.18757v2, section 3). That sum is one running vector, so a step is one matrix-vector product. Starts at `first`;
    picks are distinct; the lower index wins ties. A zero row has cosine 0 to every other.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order taken.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=1, eps=1e-12)
    k = min(k, unit.shape[0])
    picks = torch.empty(k, dtype=torch.long, device=x.device)
    taken = torch.as_tensor(first, dtype=torch.long, device=x.device)
    similarity = torch.zeros(unit.shape[0], device=x.device)  # to all rows taken so far, summed
    for step in range(k):
        if step:
            taken = similarity.argmin()
        picks[step] = taken
        row = unit.index_select(0, taken.view(1)).squeeze(0)
        similarity = (similarity + unit @ row).index_fill(0, taken.view(1), torch.inf)
    return picks


def bipartite_merge(metric: Tensor, r: int, order: str = "original") -> tuple[Tensor, Tensor]:
    """Merge `r` of N tokens into their most similar partner (AIM, arXiv 2412.03248; the matching is ToMe's).

    Tokens at even places are sources, those at odd places destinations. The `r` sources with the most similar
    destination (cosine) flow into it, several into one if that is so; everything else stays. `r` is limited to N // 2;
    at 0 and below, and for a single token, nothing is merged.

    Parameters
    ----------
    metric
        (B, N, d): what similarity is measured on. A zero row has cosine 0 to every other.
    r
        How many tokens to merge away.
    order
        "original": slots in the order of the tokens that stand in them. "author": as the released code has them,
        sources that stayed first, by descending similarity, then all destinations. The two differ only where sources
        stay, and matter where slots are merged again.

    Returns
    -------
    anchors
        (B, N - r) long: the token that stands in each slot.
    assign
        (B, N) long: the slot that each token flows into; a slot's value is the plain mean of its tokens.
    """
    batch, n = metric.shape[:2]
    r = max(0, min(r, n // 2))
    unit = torch.nn.functional.normalize(metric.float(), dim=-1, eps=1e-12)
    source = torch.arange(0, n, 2, device=metric.device)
    destination = torch.arange(1, n, 2, device=metric.device)
    if r == 0:
        every = torch.arange(n, device=metric.device).expand(batch, n)
        return every, every
    best, partner = _best_partner(unit[:, ::2], unit[:, 1::2])
    ranked = best.sort(dim=1, descending=True, stable=True).indices
    merged, staying = ranked[:, :r], ranked[:, r:]
    anchors = torch.cat([source[staying], destination.expand(batch, -1)], dim=1)
    if order == "original":
        anchors = anchors.sort(dim=1).values
    slots = torch.arange(n - r, device=metric.device).expand(batch, -1)
    assign = torch.empty(batch, n, dtype=torch.long, device=metric.device).scatter_(1, anchors, slots)
    target = assign.gather(1, destination[partner.gather(1, merged)])
    return anchors, assign.scatter_(1, source[merged], target)


def _best_partner(source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) largest product of every row of `source` (B, S, d) with `destination` (B, T, d), and where it is."""
    values, places = [], []
    for block in source.split(_BLOCK, dim=1):
        similarity = block @ destination.transpose(1, 2)
        places.append(similarity.argmax(dim=-1))  # the first of equals
        values.append(similarity.amax(dim=-1))
    return torch.cat(values, dim=1), torch.cat(places, dim=1)


def pagerank(logits: Tensor, temperature: float = 0.1, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """Importance of tokens by a random walk along sharpened attention (AIM, arXiv 2412.03248, as released).

    All queries start with the same weight, which flows along ``softmax(logits / temperature)``; a fraction `damping` of
    it is dealt out evenly again at every step. Queries that see no key are padding: they neither start with weight nor
    receive any.

    Parameters
    ----------
    logits
        (B, H, N, N), masked entries at the least value of the dtype or minus infinity.

    Returns
    -------
    Tensor
        (B, N) float32: root of the mean over heads of the squared weights.
    """
    logits = logits.float()
    visible = logits > torch.finfo(torch.float32).min / 2
    exists = visible.any(dim=-1)  # (B, H, N)
    walk = (logits / temperature).masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(nan=0.0)
    start = exists / exists.sum(dim=-1, keepdim=True).clamp(min=1)
    weight = start
    for _ in range(iterations):
        weight = (weight[:, :, None] @ walk)[:, :, 0] * (1 - damping) + damping * start
    return weight.square().mean(dim=1).sqrt()


def context_relevance(attention: Tensor, t: float, reduction: str = "mean") -> Tensor:
    """Attention that every token receives from the context set (VFlowOpt, arXiv 2508.05211, section 3).

    The context set are the tokens that receive more than `t` times the average attention; if nobody does, it is all.

    Parameters
    ----------
    attention
        (..., N, N): attention averaged over heads, rows are queries.
    t
        Threshold of the context set.
    reduction
        "mean" over the set's rows, as released, or their "sum", as in the paper.

    Returns
    -------
    Tensor
        (..., N) float32.
    """
    attention = attention.float()
    member = context_set(attention.mean(dim=-2), t)
    relevance = (attention * member[..., :, None]).sum(dim=-2)
    return relevance / member.sum(dim=-1, keepdim=True) if reduction == "mean" else relevance


def context_set(received: Tensor, t: float) -> Tensor:
    """(..., N) bool: tokens whose `received` attention is more than `t` times the average; all if there is none."""
    member = received > t * received.mean(dim=-1, keepdim=True)
    return member | ~member.any(dim=-1, keepdim=True)


def patch_entropy(patches: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Entropy, in bits, of the grey values of every patch (VFlowOpt, arXiv 2508.05211, as released).

    A pixel's grey value is the rounded sum of 0.3333 of each of its 8-bit channels; one histogram of all patches at
    once counts them in 256 bins.

    Parameters
    ----------
    patches
        (..., C, P): pixels of each patch, C channels of P values in 0..1.
    mean, std
        (C,): undo this normalisation first. Values then come from whole 8-bit numbers and are rounded to them; without
        it they are truncated, as released.

    Returns
    -------
    Tensor
        (...) float32, between 0 and 8.
    """
    pixels = patches.float()
    if mean is None or std is None:
        levels = (pixels * 255).trunc()
    else:
        levels = ((pixels * std[:, None] + mean[:, None]) * 255).round()
    weight = 0.3333 * 3 / patches.shape[-2]
    grey = (levels.clamp(0, 255) * weight).sum(dim=-2).round().long().clamp(0, 255)
    shape, size = grey.shape[:-1], grey.shape[-1]
    grey = grey.reshape(-1, size)
    bins = torch.arange(grey.shape[0], device=grey.device)[:, None] * 256 + grey
    share = torch.bincount(bins.flatten(), minlength=256 * grey.shape[0]).view(-1, 256).float() / size
    return -(share * (share + 1e-10).log2()).sum(dim=-1).view(shape)


def recycle_cells(scores: Tensor, low: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens `low` of each cell into the best of them (VFlowOpt, arXiv 2508.05211, section 3).

    Parameters
    ----------
    scores
        (N,): the weights of a cell's tokens are in proportion to them; equal where they sum to nothing.
    low
        (M,) long: tokens to recycle; all others stay as they are.
    cell
        (N,) long: number of the cell that each token lies in.

    Returns
    -------
    keep
        (K,) long, ascending: the tokens that are not low, and the best of every cell that has low ones (the lower index
        among equals).
    assign
        (N,) long: slot that each token flows into.
    weight
        (N,) float32: its coefficient there; 1 for tokens that are not low.
    """
    n = scores.numel()
    scores = scores.float()
    low = low.sort().values
    _, group = cell[low].unique(return_inverse=True)
    count = int(group.max()) + 1 if low.numel() else 0
    # By group, then by descending score, then by index: the first of every group is its anchor.
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


def attention_exchange(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """Which part of their attention the text gives to the visual tokens, and they to the text (ToDRE, 2505.18757).

    Parameters
    ----------
    attention
        (H, N, N): attention probabilities, rows are queries.
    text, visual
        (N,) bool, or indices.

    Returns
    -------
    Tensor
        (2,) float32: text to vision, vision to text. 0 for a group that is empty.
    """
    mean = attention.float().mean(dim=0)
    return torch.stack([_share(mean[text].sum(dim=0), visual), _share(mean[visual].sum(dim=0), text)])


def _share(mass: Tensor, part: Tensor) -> Tensor:
    """Which fraction of `mass` (N,) lies in `part`; 0 of nothing."""
    return mass[part].sum() / mass.sum().clamp(min=torch.finfo(torch.float32).tiny)
