"""Which tokens to take: the best, or those that differ most from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import op

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


@op()
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


@op()
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
