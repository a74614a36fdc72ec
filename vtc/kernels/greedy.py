"""Greedy subset selection with diminishing gains: an outdated gain is an upper bound, which suffices for most rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import cosines
from .cosines import products, squared_norms, stripes, upper_blocks, with_inverse_norms, write_block
from .dispatch import op, queues
from .graphs import replayed

_POOL = 512  # candidates updated with every pick
_BATCH = 32  # gains recomputed at a time
_HOST_SHARE = 16  # times the workspace that a matrix may take on the host, as without it every row is computed often
_RANK = 1e-5  # share of the largest squared norm below which a residual is rounding


@op("vtc.kernels.triton_pick:dpp_greedy")
def dpp_greedy(
    x: Tensor, k: int, relevance: Tensor | None = None, places: Tensor | None = None, ridge: float = 0.0
) -> Tensor:
    """Select `k` rows of `x` by greedy MAP inference of a determinantal point process (CDPruner, arXiv 2506.10967).

    The kernel is ``relevance[i] * cosine(i, j) * relevance[j]``. With `places` the cosine is multiplied by
    ``exp(-|places[i] - places[j]|**2 / 2)``, so that rows far from each other are never redundant; `ridge` is added to
    the cosine of a row with itself. Every pick is the row that most increases the determinant: the row with the largest
    residual, the part of its diagonal entry that the picks do not explain, updated by one row of a Cholesky factor per
    pick. Ties go to the lower index. When all residuals are rounding, the most relevant of the other rows follow.

    Needs O(N k) memory. Residuals only shrink, so a pool of `_POOL` rows is updated with every pick as long as its best
    exceeds the bound of the other rows; then all rows are updated in one product.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other and residual 0.
    k
        Number of picks.
    relevance
        (N,), not negative; None: all equal.
    places
        (N, P) coordinates in units of the width of the Gaussian; None: places do not count.
    ridge
        Not negative.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    n = x.shape[0]
    k = min(k, n)
    weight = torch.ones_like(inverse) if relevance is None else relevance.float()
    scale = inverse * weight
    axes = None if places is None else places.float().T.contiguous()
    left = squared_norms(inverse, weight) + ridge * weight.square()
    least = _RANK * float(left.max()) if n else 0.0
    factor = x.new_empty(k, n, dtype=torch.float32)
    picks: list[int] = []
    pivots: list[float] = []  # residual of every pick when it was picked
    applied = 0  # picks that `left` includes
    while len(picks) < k:
        _apply_picks(x, scale, axes, left, factor, picks, pivots, applied)
        applied = len(picks)
        best = int(left.argmax())  # the first of equals
        if not float(left[best]) > least:
            left[picks] = -torch.inf
            rest = weight.masked_fill(left == -torch.inf, -torch.inf).sort(descending=True, stable=True).indices
            picks += rest[: k - len(picks)].tolist()
            break
        top = left.topk(min(_POOL + 1, n))
        bound = float(top.values[-1])
        pool = top.indices[:-1].sort().values
        pooled, pool_scale, pool_left = x.index_select(0, pool).float(), scale[pool], left[pool]
        pool_axes = pool_scale if axes is None else axes[:, pool]
        pool_factor = factor.new_empty(k, pool.numel())
        pool_factor[:applied] = factor[:applied].index_select(1, pool)
        column, pivot = factor[:applied, best], float(left[best])
        while True:
            step = len(picks)
            picks.append(best)
            pivots.append(pivot)
            if len(picks) == k or not pool.numel():
                break
            row = (pooled @ x[best].float()) * pool_scale * scale[best]
            if axes is not None:
                row *= _nearness(pool_axes, axes[:, best : best + 1])[0]
            pool_factor[step] = (row - column @ pool_factor[:step]) / pivot**0.5
            pool_left -= pool_factor[step].square()
            pool_left[pool == best] = -torch.inf
            place = int(pool_left.argmax())
            best, pivot = int(pool[place]), float(pool_left[place])
            if not pivot > max(bound, least):  # at a tie a row outside may have the lower index
                break
            column = pool_factor[: step + 1, place]
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def _nearness(axes: Tensor, others: Tensor) -> Tensor:
    """Return ``exp(-distance**2 / 2)`` (M, N) of places `others` (P, M) to places `axes` (P, N), one row per axis."""
    apart = others[:, :, None] - axes[:, None]
    return apart.square_().sum(dim=0).mul_(-0.5).exp_()


def _kernel_rows(x: Tensor, scale: Tensor, axes: Tensor | None, others: Tensor) -> Tensor:
    """Return the rows `others` (M, N) of the kernel of `dpp_greedy`, without its ridge."""
    if axes is None:
        return products(x, scale, others)
    there = axes[:, others]
    return torch.cat([part.mul_(_nearness(axes[:, rows], there)) for rows, part in stripes(x, scale, others)], dim=1)


def _apply_picks(
    x: Tensor,
    scale: Tensor,
    axes: Tensor | None,
    left: Tensor,
    factor: Tensor,
    picks: list[int],
    pivots: list[float],
    known: int,
) -> None:
    """Compute the rows of the Cholesky factor for the picks from `known` on and update the residuals `left`."""
    if known == len(picks):
        return
    recent = torch.tensor(picks[known:], device=x.device)
    new = factor[known : len(picks)]
    torch.sub(_kernel_rows(x, scale, axes, recent), factor[:known].index_select(1, recent).T @ factor[:known], out=new)
    for step, pick in enumerate(picks[known:]):
        new[step] -= new[:step, pick] @ new[:step]
        new[step] /= pivots[known + step] ** 0.5
        left -= new[step].square()
    left[recent] = -torch.inf


def stores(x: Tensor) -> bool:
    """Return whether the similarity matrix of the rows of `x` (N, D) is kept; then a GPU is not waited for."""
    return 4 * x.shape[0] ** 2 <= (1 if queues(x) else _HOST_SHARE) * cosines.WORKSPACE


@op()
@replayed(stores)
def coverage_greedy(x: Tensor, k: int, weight: Tensor | None = None, combine: str = "multiply") -> Tensor:
    """Select `k` rows of `x` by greedy facility location, so that they cover all rows best (SCOPE, arXiv 2510.24214).

    The coverage of a row is the cosine to its most similar pick, at least 0. Every pick is the row with the largest
    gain, the sum of the increases of all coverages, times its weight or plus it. Ties go to the lower index.

    Gains only shrink, so a gain is recomputed only while its last value is the largest (lazy greedy). Up to N = 16384,
    on a GPU 4096, the similarity matrix is computed once, as half a product, and kept; beyond that the rows of
    candidates are computed on demand in O(N) memory. Which gain is the largest is asked in between, for which a GPU
    would be waited for; there all gains of a stored matrix are computed anew for every pick instead, and the launches
    of all picks recorded as one.

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    k
        Number of picks.
    weight
        (N,), not negative if `combine` is "multiply"; None: coverage only.
    combine
        "multiply" or "add".

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    return lazy_greedy(SimilarityRows(x, inverse), k, weight, combine, torch.zeros_like(inverse))


class Similarities(Protocol):
    """Access to the similarities of N rows to M that are to be covered, as `lazy_greedy` requires it."""

    @property
    def stored(self) -> bool:
        """Return whether the similarities of all rows are in memory."""

    def gains(self, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the gains (K,) of all or the `chosen` rows over the coverage `covered` (M,)."""

    def row(self, index: Tensor) -> Tensor:
        """Return the similarities (M,) of the row `index` (1,)."""


def lazy_greedy(rows: Similarities, k: int, weight: Tensor | None, combine: str, covered: Tensor) -> Tensor:
    """Return the picks of `coverage_greedy`; `covered` (M,) is zeros."""
    gain = rows.gains(covered)
    n = len(gain)
    k = min(k, n)

    if rows.stored and queues(covered):
        return _eager_greedy(rows, k, weight, combine, covered, gain)
    best = _score(gain, weight, combine)
    picks: list[int] = []
    while len(picks) < k:
        top = best.argmax(dim=0, keepdim=True)  # the first of equals
        current: set[int] = set()  # rows whose gain is up to date
        while picks and int(top) not in current:
            candidates = best.topk(min(_BATCH, n - len(picks))).indices
            candidates[:1] = top  # of more equals than these are, it need not be among them
            scores = rows.gains(covered, candidates)
            best[candidates] = _score(scores, None if weight is None else weight[candidates], combine)
            current.update(candidates.tolist())
            top = best.argmax(dim=0, keepdim=True)
        picks.append(int(top))
        best[top] = -torch.inf
        covered = torch.maximum(covered, rows.row(top))
    return torch.tensor(picks, dtype=torch.long, device=covered.device)


def _score(gain: Tensor, weight: Tensor | None, combine: str) -> Tensor:
    if weight is None:
        return gain
    return gain * weight.float() if combine == "multiply" else gain + weight.float()


def _eager_greedy(
    rows: Similarities, k: int, weight: Tensor | None, combine: str, covered: Tensor, gain: Tensor
) -> Tensor:
    """Return the picks of `lazy_greedy` without reading a value on the way; `gain` (N,) are the first gains."""
    everything = torch.arange(len(gain), device=gain.device)
    picks = torch.empty(k, dtype=torch.long, device=gain.device)
    taken = torch.zeros_like(gain, dtype=torch.bool)
    for step in range(k):
        if step:
            gain = rows.gains(covered, everything)
        score = _score(gain, weight, combine).masked_fill(taken, -torch.inf)
        place = score.argmax(dim=0, keepdim=True)  # the first of equals; one entry, as a number would be read
        picks[step : step + 1] = place
        taken.index_fill_(0, place, True)
        covered = torch.maximum(covered, rows.row(place))
    return picks


class SimilarityRows:
    """Rows of the similarity matrix: the whole matrix if it is small, else a cache of recently used rows."""

    def __init__(self, x: Tensor, inverse: Tensor) -> None:
        self.x, self.inverse = x, inverse
        self.table = inverse.new_empty(len(x), len(x)) if stores(x) else None
        self.cache: dict[int, Tensor] = {}

    @property
    def stored(self) -> bool:
        """Whether there is the whole matrix."""
        return self.table is not None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the upper half of the matrix as `upper_blocks` and write it into the table, if there is one."""
        for rows, block in upper_blocks(self.x, self.inverse):
            if self.table is not None:
                write_block(self.table, rows, block)
            yield rows, block

    def gains(self, covered: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return gains; those of all rows are computed once, before any coverage, from half of the symmetric matrix."""
        if chosen is not None:
            return (self.rows(chosen) - covered).clamp_(min=0).sum(dim=1)
        total = torch.zeros_like(self.inverse)
        for rows, block in self.blocks():
            block.clamp_(min=0)
            total[rows.start :] += block.sum(dim=0)
            total[rows] += block[:, len(block) :].sum(dim=1)
        return total

    def row(self, index: Tensor) -> Tensor:
        """Return one row."""
        return self.rows(index)[0]

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows `indices` (M, N)."""
        if self.table is not None:
            return self.table.index_select(0, indices)
        requested = indices.tolist()
        new = [index for index in requested if index not in self.cache]
        if new:
            fresh = products(self.x, self.inverse, torch.tensor(new, device=self.x.device))
            self.cache |= dict(zip(new, fresh.unbind(0), strict=True))
        rows = torch.stack([self.cache[index] for index in requested])
        while len(self.cache) > 4 * _BATCH:  # the oldest first
            del self.cache[next(iter(self.cache))]
        return rows
