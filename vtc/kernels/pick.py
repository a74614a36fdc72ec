"""Which tokens differ most from each other.

On a CPU most of the products that the definitions ask for are left out: bounds that only tighten say which rows cannot
win, and what has to be looked at is taken in blocks that stay in the cache. The picks are those of the definitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cosines
from .cosines import rows_of, stripes, upper_blocks, write_block
from .dispatch import op

_TILE = 128  # rows on either side of a product, at first
_SIDE = 1024  # and at most: of noise ever more rows have to be compared
_FINALISTS = 4096  # rows that are compared with all others in one go
_MANY = 8  # where one row in so many is picked, the whole matrix is faster than to do without it
_POOL = 512  # candidates that are kept up to date with every pick
_CHAMPIONS = 192  # rows that are compared with all others, to learn how isolated a row can be
_FIRST = 16  # those of them that begin, as nothing can put them out
_SLACK = 1e-6  # by how much two float32 products of the same rows may differ
_TIE = 2.0**-22  # cosines that differ by less are equal but for rounding


@op("vtc.kernels.triton_pick:farthest_point")
def farthest_point(x: Tensor, k: int, first: int | None = None) -> Tensor:
    """Greedy max-min selection of `k` rows of `x` (N, D) under the distance 1 - cosine.

    Starts at `first`, or at the row that is farthest from its nearest neighbour; then always takes the row that is
    farthest from everything taken. Taken rows are out of the game, so the picks are distinct even among duplicates.
    Lower index wins ties. A zero row has cosine 0 to every other.

    O(N) memory beside `x`, but for the whole matrix where that is small and so many are picked that most of it is
    needed. The similarity of a row to the nearest pick only grows. So the `_POOL` rows where it is least are enough for
    as many picks as stay below what the others had when all were last compared; then all catch up on the picks they
    missed in one product. 64 picks of 2880 random rows take three of those.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order taken.
    """
    x, inverse = rows_of(x)
    k = min(k, x.shape[0])
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
    if k * _MANY > x.shape[0] and 4 * x.shape[0] ** 2 <= cosines.WORKSPACE:
        return _from_matrix(x, inverse, k, first)
    taken = _most_isolated(x, inverse) if first is None else range(x.shape[0])[first]
    picks: list[int] = [taken]
    near = torch.full_like(inverse, -torch.inf)  # similarity to the nearest pick compared with; taken rows: infinite
    caught_up = 0
    while len(picks) < k:
        missed = torch.tensor(picks[caught_up:], device=x.device)
        for rows, similarity in stripes(x, inverse, missed):
            near[rows] = torch.maximum(near[rows], similarity.amax(dim=0))
        near[missed] = torch.inf
        caught_up = len(picks)
        picks.append(int(near.argmin()))  # the first of equals
        if len(picks) == k:
            break
        # The smallest first; one more than the pool holds says what the others have.
        least = near.topk(min(_POOL + 1, near.numel()), largest=False)
        floor = float(least.values[-1])
        pool = least.indices[:-1].sort().values
        pooled, scale, value = x.index_select(0, pool).float(), inverse[pool], near[pool]
        while len(picks) < k:
            taken = picks[-1]
            value = torch.maximum(value, (pooled @ x[taken].float()) * scale * inverse[taken])
            value[pool == taken] = torch.inf
            lowest = int(value.argmin())
            if not float(value[lowest]) < floor:  # at a tie somebody outside may have the lower index
                break
            picks.append(int(pool[lowest]))
    return torch.tensor(picks, device=x.device)


@op("vtc.kernels.triton_pick:max_sum")
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
    x, inverse = rows_of(x)
    k = min(k, x.shape[0])
    x = x.float()
    total = torch.zeros_like(inverse)
    picks: list[int] = []
    for _ in range(k):
        taken = int(total.argmin()) if picks else range(x.shape[0])[int(first)]
        picks.append(taken)
        total += (x @ x[taken]) * inverse * inverse[taken]
        total[taken] = torch.inf
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def _from_matrix(x: Tensor, inverse: Tensor, k: int, first: int | None) -> Tensor:
    """The picks of `farthest_point` from all similarities."""
    table = inverse.new_empty(x.shape[0], x.shape[0])
    for rows, block in upper_blocks(x, inverse):
        write_block(table, rows, block)
    if first is None:
        nearest, partner = table.fill_diagonal_(-torch.inf).max(dim=1)
        taken = _first_of_equals(x, inverse, torch.arange(x.shape[0], device=x.device), partner, nearest)
    else:
        taken = range(x.shape[0])[first]
    picks = [taken]
    near = table[taken].clone()
    while len(picks) < k:
        near[taken] = torch.inf
        taken = int(near.argmin())  # the first of equals
        picks.append(taken)
        torch.maximum(near, table[taken], out=near)
    return torch.tensor(picks, device=x.device)


def _first_of_equals(x: Tensor, inverse: Tensor, rows: Tensor, partner: Tensor, nearest: Tensor) -> int:
    """The first of the `rows` whose nearest row, their `partner`, is least similar."""
    # Two rows that are each other's nearest are equal but for rounding: the same sum for both settles it.
    close = nearest <= nearest.min() + _SLACK
    rows, partner = rows[close], partner[close]
    exact = (x[rows].double() * x[partner].double()).sum(dim=1)
    exact *= inverse[rows] * inverse[partner]
    return int(rows[exact <= exact.min() + _TIE].min())


def _most_isolated(x: Tensor, inverse: Tensor) -> int:
    """Index of the row of `x` whose most similar other row is least similar; the first of equals.

    A row is out as soon as any other is more similar to it than some row, compared with all, has to its nearest. So
    rows are compared among each other first, where one product serves both; those that look most isolated then run
    against all others, which says how isolated a row can be; and in the end those that are left.
    """
    race = _Race(x, inverse)
    tile, rounds = _TILE, 0
    while (size := race.alive.numel()) > max(_CHAMPIONS, 2 * tile):
        race.compare(tile)
        if rounds == 0:
            race.run(_FIRST)
        if rounds % 2 == 0:  # not every time: it reads all of `x`
            race.run(_CHAMPIONS)
        rounds += 1
        if race.alive.numel() > 2 * size // 3:
            tile *= 2
    while race.alive.numel():
        race.run(_FINALISTS)
    return race.winner()


class _Race:
    """Rows of which the most isolated wins.

    Attributes
    ----------
    alive : Tensor
        Rows that may still win and have not been compared with all others.
    """

    def __init__(self, x: Tensor, inverse: Tensor) -> None:
        self.x, self.inverse = x, inverse
        self.alive = torch.arange(x.shape[0], device=x.device)
        self._near = torch.full_like(inverse, -torch.inf)  # similarity to the nearest row compared with so far
        self._ceiling = torch.inf  # how similar the best row so far is to its nearest
        self._finished: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, their nearest, how similar that is
        self._chance = torch.Generator().manual_seed(0)

    def compare(self, tile: int) -> None:
        """Compare every row that is alive with `tile` others."""
        order, size = self.alive, self.alive.numel()
        if size < self.x.shape[0]:  # the first round compares neighbours, which are alike in pictures
            order = order[torch.randperm(size, generator=self._chance)]
        for block in order.split(2 * tile):
            for rows in block[::2].split(_SIDE):
                ours = self.x.index_select(0, rows).float()
                for columns in block[1::2].split(_SIDE) if block.numel() > 1 else ():
                    products = ours @ self.x.index_select(0, columns).float().T
                    products *= self.inverse[rows, None]
                    products *= self.inverse[columns]
                    self._near[rows] = torch.maximum(self._near[rows], products.amax(dim=1))
                    self._near[columns] = torch.maximum(self._near[columns], products.amax(dim=0))
        self._bury()

    def run(self, count: int) -> None:
        """Compare the `count` rows that look most isolated with all others, for as long as they can win."""
        rows = self.alive[self._near[self.alive].argsort()[:count]]
        entered = rows
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
            _forget_self(products, rows, columns)
            self._near[columns] = torch.maximum(self._near[columns], products.amax(dim=0))
            value, place = products.max(dim=1)
            partner = torch.where(value > nearest, place + start, partner)
            nearest = torch.maximum(nearest, value)
            stays = nearest <= self._ceiling + _SLACK
            if not bool(stays.all()):
                rows, partner, nearest, values = rows[stays], partner[stays], nearest[stays], values[stays]
        if rows.numel():
            self._ceiling = min(self._ceiling, float(nearest.min()))
            self._finished.append((rows, partner, nearest))
        self._near[entered] = torch.inf
        self._bury()

    def _bury(self) -> None:
        near = self._near[self.alive]
        self.alive = self.alive[(near <= self._ceiling + _SLACK) & (near < torch.inf)]

    def winner(self) -> int:
        """The first of the rows whose nearest is least similar."""
        rows, partner, nearest = (torch.cat(parts) for parts in zip(*self._finished, strict=True))
        return _first_of_equals(self.x, self.inverse, rows, partner, nearest)


def _forget_self(products: Tensor, rows: Tensor, columns: slice) -> None:
    """Write -inf where a row of `products` (M, columns) meets itself."""
    place = rows - columns.start
    here = (place >= 0) & (place < products.shape[1])
    products[here.nonzero()[:, 0], place[here]] = -torch.inf
