"""Which tokens differ most from each other.

On a CPU most of the products that the definitions ask for are left out: bounds that only tighten say which rows cannot
win, and what has to be looked at is taken in blocks that stay in the cache. The picks are those of the definitions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cosines import rows_of, stripes
from .dispatch import op

_TILE = 128  # rows on either side of a product, at first
_SIDE = 1024  # and at most: of noise ever more rows have to be compared
_FINALISTS = 4096  # rows that are compared with all others in one go
_POOL = 512  # candidates that are kept up to date with every pick
_CHAMPIONS = 16  # rows that are compared with everything, to learn how isolated a row can be
_SLACK = 1e-6  # by how much two float32 products of the same rows may differ
_TIE = 2.0**-22  # cosines that differ by less are equal but for rounding


@op("vtc.kernels.triton_pick:farthest_point")
def farthest_point(x: Tensor, k: int, first: int | None = None) -> Tensor:
    """Greedy max-min selection of `k` rows of `x` (N, D) under the distance 1 - cosine.

    Starts at `first`, or at the row that is farthest from its nearest neighbour; then always takes the row that is
    farthest from everything taken. Taken rows are out of the game, so the picks are distinct even among duplicates.
    Lower index wins ties. A zero row has cosine 0 to every other.

    O(N) memory beside `x`. The similarity of a row to the nearest pick only grows. So the `_POOL` rows where it is
    least are enough for as many picks as stay below what the others had when all were last compared; then all catch up
    on the picks they missed in one product. 64 picks of 2880 random rows take three of those.

    Returns
    -------
    Tensor
        (min(k, N),) long, in the order taken.
    """
    x, inverse = rows_of(x)
    k = min(k, x.shape[0])
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
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


def _most_isolated(x: Tensor, inverse: Tensor) -> int:
    """Index of the row of `x` whose most similar other row is least similar; the first of equals.

    A row is out as soon as any other is more similar to it than some row, compared with all, has to its nearest. So
    rows are compared among each other first, where one product serves both, and only those that are left with all.
    """
    n = x.shape[0]
    near = torch.full_like(inverse, -torch.inf)  # similarity to the nearest row compared with so far
    alive = torch.arange(n, device=x.device)
    ceiling = torch.inf
    generator = torch.Generator().manual_seed(0)
    tile = _TILE
    while (size := alive.numel()) > 2 * tile:
        # The first round compares neighbours, which are alike in pictures; later ones whom chance brings together.
        order = alive if size == n else alive[torch.randperm(size, generator=generator)]
        for block in order.split(2 * tile):
            _compare(x, inverse, block[::2], block[1::2], near)
        champions = alive[near[alive].argsort()[:_CHAMPIONS]]
        closest = torch.full((champions.numel(),), -torch.inf)
        for rows, products in stripes(x, inverse, champions):
            _forget_self(products, champions, rows)
            near[rows] = torch.maximum(near[rows], products.amax(dim=0))
            closest = torch.maximum(closest, products.amax(dim=1))
        ceiling = min(ceiling, float(closest.min()))
        alive = alive[near[alive] <= ceiling + _SLACK]
        if alive.numel() > 2 * size // 3:
            tile *= 2
    finalists: list[tuple[Tensor, Tensor, Tensor]] = []
    for some in alive.split(_FINALISTS):
        some, partner, near = _nearest(x, inverse, some, ceiling)
        if near.numel():
            ceiling = min(ceiling, float(near.min()))
        finalists.append((some, partner, near))
    alive, partner, near = (torch.cat(parts) for parts in zip(*finalists, strict=True))
    # Two rows that are each other's nearest are equal but for rounding: the same sum for both settles it.
    close = near <= near.min() + _SLACK
    alive, partner = alive[close], partner[close]
    exact = (x[alive].double() * x[partner].double()).sum(dim=1) * (inverse[alive] * inverse[partner])
    return int(alive[(exact <= exact.min() + _TIE).nonzero()[0]])


def _nearest(x: Tensor, inverse: Tensor, alive: Tensor, ceiling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the rows `alive` to which nothing is more similar than `ceiling`, their nearest rows, how similar."""
    partner = torch.zeros_like(alive)
    near = torch.full((alive.numel(),), -torch.inf)
    values = x.index_select(0, alive).float()
    for start in range(0, x.shape[0], 2 * _TILE):
        rows = slice(start, start + 2 * _TILE)
        products = ((values @ x[rows].float().T) * inverse[alive, None]) * inverse[rows]
        _forget_self(products, alive, rows)
        value, place = products.max(dim=1)
        partner = torch.where(value > near, place + start, partner)
        near = torch.maximum(near, value)
        stays = near <= ceiling + _SLACK
        if not bool(stays.all()):
            alive, partner, near, values = alive[stays], partner[stays], near[stays], values[stays]
    return alive, partner, near


def _compare(x: Tensor, inverse: Tensor, left: Tensor, right: Tensor, near: Tensor) -> None:
    """Compare all rows `left` with all rows `right`, for either's `near`, `_SIDE` of each at a time."""
    if not right.numel():
        return
    for rows in left.split(_SIDE):
        ours = x.index_select(0, rows).float()
        for columns in right.split(_SIDE):
            products = ours @ x.index_select(0, columns).float().T
            products *= inverse[rows, None]
            products *= inverse[columns]
            near[rows] = torch.maximum(near[rows], products.amax(dim=1))
            near[columns] = torch.maximum(near[columns], products.amax(dim=0))


def _forget_self(products: Tensor, rows: Tensor, columns: slice) -> None:
    """Write -inf where a row of `products` (M, columns) meets itself."""
    place = rows - columns.start
    here = (place >= 0) & (place < products.shape[1])
    products[here.nonzero()[:, 0], place[here]] = -torch.inf
