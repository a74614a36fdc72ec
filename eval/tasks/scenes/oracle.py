"""Selections from the ground truth: the tokens of the objects, or all the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import GRID


def round_robin(things: Sequence[Thing], budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep the patches of objects and signs in turns, within each the patch that it fills most first."""
    return in_turns([thing.patches for thing in things if thing.role != "distractor"], GRID * GRID, budget, rng)


def anti_oracle(things: Sequence[Thing], budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep random patches without object or sign, as long as there are any."""
    owned = {patch for thing in things if thing.role != "distractor" for patch in thing.patches}
    return others_first(owned, GRID * GRID, budget, rng)


def in_turns(queues: Iterable[Sequence[int]], total: int, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep the first token of every queue, then the second of each, and so on; then random ones.

    Without turns, one object may get four tokens and another none, and a good selector exceeds this upper bound.

    Parameters
    ----------
    queues : iterable of sequence of int
        The tokens of each object, best first.
    total : int
        Number of tokens.
    budget : int
    rng : Generator

    Returns
    -------
    ndarray (min(budget, total),) int64
        Ascending token indices.
    """
    left = [list(queue) for queue in queues]
    kept: dict[int, None] = {}
    while any(left) and len(kept) < budget:
        for queue in left:
            if queue and len(kept) < budget:
                kept[queue.pop(0)] = None
    return _filled(list(kept), total, budget, rng)


def others_first(owned: set[int], total: int, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep random tokens that are not `owned`, as long as there are any; ascending."""
    free = [token for token in range(total) if token not in owned]
    chosen = [free[int(i)] for i in rng.permutation(len(free))[:budget]]
    return _filled(chosen, total, budget, rng)


def _filled(kept: list[int], total: int, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    taken = set(kept)
    rest = [token for token in range(total) if token not in taken]
    missing = max(0, min(budget, total) - len(kept))
    extra = [rest[int(i)] for i in rng.permutation(len(rest))[:missing]]
    return np.sort(np.asarray(kept + extra, np.int64))
