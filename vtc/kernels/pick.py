"""Greedy selection of tokens that differ most from each other.

The PyTorch implementations skip most products of the definitions: monotone bounds exclude rows that cannot be picked,
and the remaining rows are compared in blocks that fit into the cache. The picks are those of the definitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cosines
from .cosines import stripes, upper_blocks, with_inverse_norms, write_block
from .dispatch import op

_TILE = 128  # initial number of rows on either side of a product
_MAX_TILE = 1024  # its limit; on noise the tiles grow
_FINAL_BATCH = 4096  # remaining candidates compared with all rows at a time
_DENSE_SHARE = 8  # with more than one pick per this many rows, computing the whole matrix is faster
_SMALL = 1024  # rows up to which half as many picks make it faster
_DENSE_SHARE_OF_SUMS = 20  # the same where every pick would be compared with all rows
_CACHED = 2**22  # numbers; that many rows are read again much faster
_POOL = 512  # candidates updated with every pick
_GUESSED = 2048  # candidates among which picks of sums are guessed
_AHEAD = 64  # most picks guessed at a time
_PROBES = 192  # candidates compared with all rows after a round, which lowers the bound
_FIRST_PROBES = 16  # their number while there is no bound that could end their comparison early
_SLACK = 1e-6  # most that two float32 products of the same rows differ by
_TIE = 2.0**-22  # cosines that differ by less are equal up to rounding


@op("vtc.kernels.triton_pick:farthest_point")
def farthest_point(x: Tensor, k: int, first: int | Tensor | None = None) -> Tensor:
    """Select `k` rows of `x` (N, D) by greedy max-min under the distance 1 - cosine.

    Starts at `first`, or at the row that is farthest from its nearest neighbour; then takes in every step the row that
    is farthest from all picks. Picks are distinct even among duplicates. Ties go to the lower index. A zero row has
    cosine 0 to every other.

    Needs O(N) memory beside `x`, except for the whole matrix where that is small and many rows are picked. The
    similarity of a row to its nearest pick only grows. Therefore a pool of the `_POOL` rows where it is lowest suffices
    as long as its best stays below the bound of the other rows; then all rows are updated with the recent picks in one
    product. 64 picks of 2880 random rows need three such updates.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    k = min(k, x.shape[0])
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
    first = None if first is None else int(first)
    if _is_dense(x.shape[0], k):
        return _from_matrix(x, inverse, k, first)
    taken = _most_isolated(x, inverse) if first is None else range(x.shape[0])[first]
    return _from_pools(x, inverse, k, taken)


@op("vtc.kernels.triton_pick:relevant_farthest_point")
def relevant_farthest_point(x: Tensor, k: int, bonus: Tensor) -> Tensor:
    """Select `k` rows of `x` (N, D) by greedy max-min under the distance 1 - cosine plus a bonus of every row.

    Like `farthest_point`, but that it starts at the row with the largest bonus and then takes in every step the one
    with the largest sum of its bonus and its distance to the nearest pick (ReDiPrune, arXiv 2603.24680).

    Parameters
    ----------
    x
        (N, D): a zero row has cosine 0 to every other.
    k
        Number of picks.
    bonus
        (N,).

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    k = min(k, x.shape[0])
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
    bonus = bonus.float()
    first = int(bonus.argmax())
    if _is_dense(x.shape[0], k):
        return _from_matrix(x, inverse, k, first, bonus)
    return _from_pools(x, inverse, k, first, bonus)


def _is_dense(n: int, k: int) -> bool:
    """Return whether `k` picks of `n` rows are found faster with the whole matrix, which fits into the workspace."""
    return k * _DENSE_SHARE * (2 if n <= _SMALL else 1) > n and 4 * n**2 <= cosines.WORKSPACE


def _from_pools(x: Tensor, inverse: Tensor, k: int, taken: int, bonus: Tensor | None = None) -> Tensor:
    """Return `k` picks from `taken` on, computing few similarities."""
    bonus = torch.zeros_like(inverse) if bonus is None else bonus
    picks: list[int] = [taken]
    near = torch.full_like(inverse, -torch.inf)  # similarity to the nearest of the applied picks; infinite for picks
    applied = 0  # picks that `near` includes
    while len(picks) < k:
        recent = torch.tensor(picks[applied:], device=x.device)
        for rows, similarity in stripes(x, inverse, recent):
            near[rows] = torch.maximum(near[rows], similarity.amax(dim=0))
        near[recent] = torch.inf
        applied = len(picks)
        rank = near - bonus
        picks.append(int(rank.argmin()))  # the first of equals
        if len(picks) == k:
            break
        # One row more than the pool holds gives the bound of all rows outside.
        least = rank.topk(min(_POOL + 1, rank.numel()), largest=False)
        bound = float(least.values[-1])
        pool = least.indices[:-1].sort().values
        pooled, scale, value, extra = x.index_select(0, pool).float(), inverse[pool], near[pool], bonus[pool]
        while len(picks) < k:
            taken = picks[-1]
            value = torch.maximum(value, (pooled @ x[taken].float()) * scale * inverse[taken])
            value[pool == taken] = torch.inf
            rank = value - extra
            lowest = int(rank.argmin())
            if not float(rank[lowest]) < bound:  # at a tie a row outside may have the lower index
                break
            picks.append(int(pool[lowest]))
    return torch.tensor(picks, device=x.device)


@op("vtc.kernels.triton_pick:max_sum")
def max_sum(x: Tensor, k: int, first: int | Tensor) -> Tensor:
    """Select `k` rows of `x` (N, D) by greedy max-sum: in every step the row least similar to all picks together.

    Like `farthest_point`, with the sum of the cosines to the picks in place of the largest (ToDRE, arXiv 2505.18757v2,
    section 3). Starts at `first`. Picks are distinct, and ties go to the lower index. A zero row has cosine 0 to every
    other.

    The sum is a running vector, so that a step is one matrix-vector product where the rows fit into a cache. Where they
    do not, and many are picked, the whole matrix is computed instead, if it is small. Else the next picks are guessed
    among the rows with the lowest sums, and one product with all rows shows how many of the guesses are right.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order of the picks.
    """
    x, inverse = with_inverse_norms(x)
    n = x.shape[0]
    k = min(k, n)
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
    taken = range(n)[int(first)]
    table = None
    if x.numel() > _CACHED:
        if k * _DENSE_SHARE_OF_SUMS <= n or 4 * n**2 > cosines.WORKSPACE:
            return _from_guesses(x, inverse, k, taken)
        table = _table(x, inverse)
    else:
        x = x.float()
    total = torch.zeros_like(inverse)
    picks = [taken]
    while len(picks) < k:
        total += (x @ x[taken]) * inverse * inverse[taken] if table is None else table[taken]
        total[taken] = torch.inf
        taken = int(total.argmin())  # the first of equals
        picks.append(taken)
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def _from_guesses(x: Tensor, inverse: Tensor, k: int, taken: int) -> Tensor:
    """Return the picks of `max_sum` from `taken` on, reading `x` once for all of them that can be guessed."""
    total = torch.zeros_like(inverse)  # infinite for picks
    picks: list[int] = []
    ahead = 1
    while len(picks) < k:
        guesses = [taken]
        if ahead > 1:
            pool = total.topk(min(_GUESSED, total.numel()), largest=False).indices.sort().values
            pooled, scale, value = x.index_select(0, pool).float(), inverse[pool], total[pool]
            while len(guesses) < min(ahead, k - len(picks)):
                value += (pooled @ x[guesses[-1]].float()) * scale * inverse[guesses[-1]]
                value[pool == guesses[-1]] = torch.inf
                guesses.append(int(pool[value.argmin()]))
        rows = cosines.products(x, inverse, torch.tensor(guesses, device=x.device))
        right = 0
        for guess, row in zip(guesses, rows, strict=True):
            if guess != taken:
                break
            total += row
            total[guess] = torch.inf
            picks.append(guess)
            right += 1
            taken = int(total.argmin())  # the first of equals
        ahead = min(_AHEAD, 2 * right if right == len(guesses) else right + 1)
    return torch.tensor(picks, device=x.device)


def _table(x: Tensor, inverse: Tensor) -> Tensor:
    """(N, N): the whole similarity matrix."""
    table = inverse.new_empty(x.shape[0], x.shape[0])
    for rows, block in upper_blocks(x, inverse):
        write_block(table, rows, block)
    return table


def _from_matrix(x: Tensor, inverse: Tensor, k: int, first: int | None, bonus: Tensor | None = None) -> Tensor:
    """Return the picks of `farthest_point`, or with a bonus the others, from the whole similarity matrix."""
    table = _table(x, inverse)
    if first is None:
        nearest, partner = table.fill_diagonal_(-torch.inf).max(dim=1)
        taken = _first_of_equals(x, inverse, torch.arange(x.shape[0], device=x.device), partner, nearest)
    else:
        taken = range(x.shape[0])[first]
    picks = [taken]
    near = table[taken].clone()
    while len(picks) < k:
        near[taken] = torch.inf
        taken = int((near if bonus is None else near - bonus).argmin())  # the first of equals
        picks.append(taken)
        torch.maximum(near, table[taken], out=near)
    return torch.tensor(picks, device=x.device)


def _first_of_equals(x: Tensor, inverse: Tensor, rows: Tensor, partner: Tensor, nearest: Tensor) -> int:
    """Return the first of the `rows` whose similarity to its nearest row `partner` is lowest."""
    # Two rows that are each other's nearest tie up to rounding, so both get the same product in float64.
    close = nearest <= nearest.min() + _SLACK
    rows, partner = rows[close], partner[close]
    exact = (x[rows].double() * x[partner].double()).sum(dim=1)
    exact *= inverse[rows] * inverse[partner]
    return int(rows[exact <= exact.min() + _TIE].min())


def _most_isolated(x: Tensor, inverse: Tensor) -> int:
    """Return the index of the row of `x` whose most similar other row is least similar; the first of equals.

    A row is excluded as soon as it is more similar to any other row than the best fully compared row is to its nearest.
    Therefore candidates are first compared with each other, where one product serves both sides. After a round, those
    that seem most isolated are compared with all rows, which lowers the bound. At the end the remaining candidates are.
    """
    search = _IsolationSearch(x, inverse)
    tile, rounds = _TILE, 0
    while (size := search.candidates.numel()) > max(_PROBES, 2 * tile):
        search.compare_candidates(tile)
        if rounds == 0:
            search.compare_with_all(_FIRST_PROBES)
        if rounds % 2 == 0:  # not in every round, because it reads all of `x`
            search.compare_with_all(_PROBES)
        rounds += 1
        if search.candidates.numel() > 2 * size // 3:
            tile *= 2
    while search.candidates.numel():
        search.compare_with_all(_FINAL_BATCH)
    return search.best()


class _IsolationSearch:
    """Branch-and-bound search for the row whose nearest row is least similar.

    Attributes
    ----------
    candidates : Tensor
        Rows that can still be the result and have not been compared with all others.
    """

    def __init__(self, x: Tensor, inverse: Tensor) -> None:
        self.x, self.inverse = x, inverse
        self.candidates = torch.arange(x.shape[0], device=x.device)
        self._near = torch.full_like(inverse, -torch.inf)  # similarity to the nearest row compared with so far
        self._bound = torch.inf  # similarity of the best fully compared row to its nearest
        self._compared: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, their nearest rows, the similarity of these
        self._generator = torch.Generator().manual_seed(0)

    def compare_candidates(self, tile: int) -> None:
        """Compare every candidate with `tile` others."""
        order, size = self.candidates, self.candidates.numel()
        if size < self.x.shape[0]:  # the first round compares neighbours, which are similar in images
            order = order[torch.randperm(size, generator=self._generator)]
        for block in order.split(2 * tile):
            for rows in block[::2].split(_MAX_TILE):
                ours = self.x.index_select(0, rows).float()
                for columns in block[1::2].split(_MAX_TILE) if block.numel() > 1 else ():
                    products = ours @ self.x.index_select(0, columns).float().T
                    products *= self.inverse[rows, None]
                    products *= self.inverse[columns]
                    self._near[rows] = torch.maximum(self._near[rows], products.amax(dim=1))
                    self._near[columns] = torch.maximum(self._near[columns], products.amax(dim=0))
        self._exclude()

    def compare_with_all(self, count: int) -> None:
        """Compare the `count` candidates that seem most isolated with all rows, as long as they stay in the bound."""
        chosen = self.candidates[self._near[self.candidates].argsort()[:count]]
        rows = chosen
        partner = torch.zeros_like(rows)
        nearest = torch.full_like(self.inverse[rows], -torch.inf)
        values = self.x.index_select(0, rows).float()
        for start in range(0, self.x.shape[0], 2 * _TILE):
            if not rows.numel():
                break
            columns = slice(start, start + 2 * _TILE)
            products = values @ self.x[columns].float().T
            products *= self.inverse[rows, None]
            products *= self.inverse[columns]
            _mask_diagonal(products, rows, columns)
            self._near[columns] = torch.maximum(self._near[columns], products.amax(dim=0))
            value, place = products.max(dim=1)
            partner = torch.where(value > nearest, place + start, partner)
            nearest = torch.maximum(nearest, value)
            stays = nearest <= self._bound + _SLACK
            if not bool(stays.all()):
                rows, partner, nearest, values = rows[stays], partner[stays], nearest[stays], values[stays]
        if rows.numel():
            self._bound = min(self._bound, float(nearest.min()))
            self._compared.append((rows, partner, nearest))
        self._near[chosen] = torch.inf
        self._exclude()

    def _exclude(self) -> None:
        """Drop candidates beyond the bound and those that have been compared with all rows."""
        near = self._near[self.candidates]
        self.candidates = self.candidates[(near <= self._bound + _SLACK) & (near < torch.inf)]

    def best(self) -> int:
        """Return the first of the rows whose nearest row is least similar."""
        rows, partner, nearest = (torch.cat(parts) for parts in zip(*self._compared, strict=True))
        return _first_of_equals(self.x, self.inverse, rows, partner, nearest)


def _mask_diagonal(products: Tensor, rows: Tensor, columns: slice) -> None:
    """Write -inf where `products` (M, columns) holds the product of a row with itself."""
    place = rows - columns.start
    inside = (place >= 0) & (place < products.shape[1])
    products[inside.nonzero()[:, 0], place[inside]] = -torch.inf
