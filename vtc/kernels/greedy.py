"""Greedy subsets whose gains only ever shrink: a gain of a while ago is a bound, and most rows need no other."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import cosines
from .cosines import products, rows_of, squared_norms, upper_blocks, write_block
from .dispatch import op

_POOL = 512  # candidates that are kept up to date with every pick
_BATCH = 32  # gains that are brought up to date in one go
_RANK = 1e-5  # of the largest: what is left of a row's norm when it adds nothing but rounding


@op("vtc.kernels.triton_pick:dpp_greedy")
def dpp_greedy(x: Tensor, k: int, relevance: Tensor | None = None) -> Tensor:
    """Greedy MAP of a determinantal point process over the rows of `x` (CDPruner, arXiv 2506.10967).

    The kernel is ``relevance[i] * cosine(i, j) * relevance[j]``. Every pick is the row that adds most to the
    determinant; that is what the picks so far leave of its squared norm, updated by one row of a Cholesky factor per
    pick. Lower index wins ties. Once no row adds more than rounding the most relevant of the others follow.

    O(N k) memory. What is left of a row only shrinks, so only a pool of `_POOL` rows follows every pick, for as long as
    its best is better than what the others had; then all catch up in one product.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other and nothing to add.
    k
        How many.
    relevance
        (N,), not negative; None: all equal.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order taken.
    """
    x, inverse = rows_of(x)
    n = x.shape[0]
    k = min(k, n)
    weight = torch.ones_like(inverse) if relevance is None else relevance.float()
    scale = inverse * weight
    left = squared_norms(inverse, weight)
    least = _RANK * float(left.max()) if n else 0.0
    factor = x.new_empty(k, n, dtype=torch.float32)
    picks: list[int] = []
    pivots: list[float] = []  # what was left of every pick when it was taken
    caught_up = 0
    while len(picks) < k:
        _catch_up(x, scale, left, factor, picks, pivots, caught_up)
        caught_up = len(picks)
        best = int(left.argmax())  # the first of equals
        if not float(left[best]) > least:
            left[picks] = -torch.inf
            rest = weight.masked_fill(left == -torch.inf, -torch.inf).sort(descending=True, stable=True).indices
            picks += rest[: k - len(picks)].tolist()
            break
        top = left.topk(min(_POOL + 1, n))
        ceiling = float(top.values[-1])
        pool = top.indices[:-1].sort().values
        pooled, pool_scale, pool_left = x.index_select(0, pool).float(), scale[pool], left[pool]
        pool_factor = factor.new_empty(k, pool.numel())
        pool_factor[:caught_up] = factor[:caught_up].index_select(1, pool)
        column, pivot = factor[:caught_up, best], float(left[best])
        while True:
            step = len(picks)
            picks.append(best)
            pivots.append(pivot)
            if len(picks) == k or not pool.numel():
                break
            row = (pooled @ x[best].float()) * pool_scale * scale[best] - column @ pool_factor[:step]
            pool_factor[step] = row / pivot**0.5
            pool_left -= pool_factor[step].square()
            pool_left[pool == best] = -torch.inf
            place = int(pool_left.argmax())
            best, pivot = int(pool[place]), float(pool_left[place])
            if not pivot > max(ceiling, least):  # at a tie somebody outside may have the lower index
                break
            column = pool_factor[: step + 1, place]
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def _catch_up(
    x: Tensor, scale: Tensor, left: Tensor, factor: Tensor, picks: list[int], pivots: list[float], known: int
) -> None:
    """Rows of the Cholesky factor for the picks from `known` on, and what they leave of every row."""
    if known == len(picks):
        return
    missed = torch.tensor(picks[known:], device=x.device)
    new = factor[known : len(picks)]
    torch.sub(products(x, scale, missed), factor[:known].index_select(1, missed).T @ factor[:known], out=new)
    for step, pick in enumerate(picks[known:]):
        new[step] -= new[:step, pick] @ new[:step]
        new[step] /= pivots[known + step] ** 0.5
        left -= new[step].square()
    left[missed] = -torch.inf


@op("vtc.kernels.triton_pick:coverage_greedy")
def coverage_greedy(x: Tensor, k: int, weight: Tensor | None = None, combine: str = "multiply") -> Tensor:
    """Greedy facility location: the rows of `x` that cover all others best (SCOPE, arXiv 2510.24214).

    A row is covered as well as its most similar pick is similar to it (cosine, at least 0). Every pick is the row with
    the largest sum of what it adds to the coverage of all rows, times its weight or plus it. Lower index wins ties.

    What a row adds only shrinks, so it is computed anew only where its last value is the largest. Up to N = 4096 the
    similarities are computed once, as half a product; beyond that a candidate's row is computed when it is needed, in
    O(N) memory.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    k
        How many.
    weight
        (N,), not negative where it multiplies; None: coverage alone.
    combine
        "multiply" or "add".

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order taken.
    """
    x, inverse = rows_of(x)
    return pick_covering(_SimilarityRows(x, inverse), k, weight, combine, torch.zeros_like(inverse))


class Similarities(Protocol):
    """What picking by coverage asks of the similarities of N rows."""

    def gains(self, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
        """(M,): for all rows, or those `chosen`, the sum of what their similarities are above `covered` (N,)."""

    def row(self, index: Tensor) -> Tensor:
        """(N,): similarities of the row `index` (1,) to all."""


def pick_covering(rows: Similarities, k: int, weight: Tensor | None, combine: str, covered: Tensor) -> Tensor:
    """The picks of `coverage_greedy`; `covered` (N,) is zeros."""
    n = len(covered)
    k = min(k, n)
    gain = rows.gains(covered)

    def score(indices: Tensor | slice) -> Tensor:
        if weight is None:
            return gain[indices]
        part = weight.float()[indices]
        return gain[indices] * part if combine == "multiply" else gain[indices] + part

    best = score(slice(None)).clone()
    current = torch.ones_like(covered, dtype=torch.bool)  # whether `gain` is what the row adds now
    picks: list[int] = []
    while len(picks) < k:
        place = int(best.argmax())  # the first of equals
        while not current[place]:
            candidates = best.topk(min(_BATCH, n - len(picks))).indices
            candidates = torch.cat([candidates[~current[candidates]], candidates.new_tensor([place])]).unique()
            gain[candidates] = rows.gains(covered, candidates)
            best[candidates] = score(candidates)
            current[candidates] = True
            place = int(best.argmax())
        picks.append(place)
        best[place] = -torch.inf
        covered = torch.maximum(covered, rows.row(torch.tensor([place], device=covered.device)))
        current.zero_()
    return torch.tensor(picks, dtype=torch.long, device=covered.device)


class _SimilarityRows:
    """Rows of the similarity matrix: all of it while it is small, else those that were asked for lately."""

    def __init__(self, x: Tensor, inverse: Tensor) -> None:
        self.x, self.inverse = x, inverse
        n = x.shape[0]
        self.table = inverse.new_empty(n, n) if 4 * n * n <= cosines.WORKSPACE else None
        self.kept: dict[int, Tensor] = {}

    def gains(self, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Of some rows; of all, as nothing is covered yet, by half of the product, the matrix being symmetric."""
        if chosen is not None:
            return (self._rows(chosen) - covered).clamp_(min=0).sum(dim=1)
        total = torch.zeros_like(self.inverse)
        for rows, block in upper_blocks(self.x, self.inverse):
            if self.table is not None:
                write_block(self.table, rows, block)
            block.clamp_(min=0)
            total[rows.start :] += block.sum(dim=0)
            total[rows] += block[:, len(block) :].sum(dim=1)
        return total

    def row(self, index: Tensor) -> Tensor:
        """One row."""
        return self._rows(index)[0]

    def _rows(self, indices: Tensor) -> Tensor:
        """(M, N): the rows `indices`."""
        if self.table is not None:
            return self.table.index_select(0, indices)
        wanted = indices.tolist()
        new = [index for index in wanted if index not in self.kept]
        if new:
            fresh = products(self.x, self.inverse, torch.tensor(new, device=self.x.device))
            self.kept |= dict(zip(new, fresh.unbind(0), strict=True))
        rows = torch.stack([self.kept[index] for index in wanted])
        while len(self.kept) > 4 * _BATCH:  # the oldest first
            del self.kept[next(iter(self.kept))]
        return rows
