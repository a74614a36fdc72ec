"""Selections that know the truth: what the tokens of the objects are worth, and what all the others are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import GRID


def round_robin(things: Sequence[Thing], budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep one patch of every object and sign, then a second of each, and so on; then random patches.

    Taking turns matters: object patches in random order may spend four on one object and none on another, and then
    a good selector beats this "upper bound". Within a thing, the patch that it fills most comes first.

    Returns
    -------
    ndarray (min(budget, GRID * GRID),) int64
        Ascending patch indices.
    """
    queues = [list(thing.patches) for thing in things if thing.role != "distractor"]
    kept: dict[int, None] = {}
    while any(queues) and len(kept) < budget:
        for queue in queues:
            if queue and len(kept) < budget:
                kept[queue.pop(0)] = None
    return _filled(list(kept), budget, rng)


def anti_oracle(things: Sequence[Thing], budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Keep random patches that no object or sign owns, as long as there are any; ascending."""
    owned = {patch for thing in things if thing.role != "distractor" for patch in thing.patches}
    free = [patch for patch in range(GRID * GRID) if patch not in owned]
    chosen = [free[int(i)] for i in rng.permutation(len(free))[:budget]]
    return _filled(chosen, budget, rng)


def _filled(kept: list[int], budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
    taken = set(kept)
    rest = [patch for patch in range(GRID * GRID) if patch not in taken]
    missing = max(0, min(budget, GRID * GRID) - len(kept))
    extra = [rest[int(i)] for i in rng.permutation(len(rest))[:missing]]
    return np.sort(np.asarray(kept + extra, np.int64))
