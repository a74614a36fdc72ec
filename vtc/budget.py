"""From what the user asked for (`keep_ratio` or `keep_tokens`) to integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import ConfigError, InputError

__all__ = ["check_budget", "largest_remainder", "resolve_budget"]


def check_budget(keep_ratio: float | None, keep_tokens: int | None) -> None:
    """Raise unless exactly one of the two is given and it lies in its range.

    Parameters
    ----------
    keep_ratio
        Fraction of visual tokens to keep, in (0, 1].
    keep_tokens
        Number of visual tokens to keep per image or video, at least 1.

    Raises
    ------
    ConfigError
        Both or neither given, wrong type, out of range.
    """
    if (keep_ratio is None) == (keep_tokens is None):
        given = "neither" if keep_ratio is None else f"keep_ratio={keep_ratio!r} and keep_tokens={keep_tokens!r}"
        raise ConfigError(f"Give exactly one of keep_ratio and keep_tokens; got {given}.")
    if keep_ratio is not None:
        if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, (int, float)):
            raise ConfigError(f"keep_ratio must be a number in (0, 1], got {keep_ratio!r}.")
        if not (math.isfinite(keep_ratio) and 0 < keep_ratio <= 1):
            raise ConfigError(f"keep_ratio is the fraction kept and must lie in (0, 1], got {keep_ratio!r}.")
    elif isinstance(keep_tokens, bool) or not isinstance(keep_tokens, int):
        raise ConfigError(f"keep_tokens must be an integer of at least 1, got {keep_tokens!r}.")
    elif keep_tokens < 1:
        raise ConfigError(f"keep_tokens must be at least 1, got {keep_tokens}.")


def resolve_budget(n: int, keep_ratio: float | None = None, keep_tokens: int | None = None) -> int:
    """Compute the number of tokens to keep of `n`.

    A ratio is rounded half to even, as Python's `round` does and as the released code of most methods does; the result
    is at least 1 and at most `n`.

    Raises
    ------
    ConfigError
        The request is invalid (see `check_budget`).
    InputError
        There are no tokens to keep (`n` < 1).
    """
    check_budget(keep_ratio, keep_tokens)
    if n < 1:
        raise InputError(f"There are no visual tokens to select from (n={n}).")
    wanted = keep_tokens if keep_tokens is not None else round(n * keep_ratio)  # type: ignore[operator]
    return min(max(wanted, 1), n)


def largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """Share `total` among parts in proportion to their `sizes`, exactly, by the method of largest remainders.

    Every part gets the floor of its exact share; what is left goes one each to the largest remainders, the earlier part
    winning ties. Integer arithmetic throughout. With ``total <= sum(sizes)`` no part gets more than its size.
    """
    whole = sum(sizes)
    if whole < 1 or min(sizes) < 0 or total < 0:
        raise InputError(f"Cannot share {total} among parts of sizes {list(sizes)}.")
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda part: -(total * sizes[part] % whole))  # sorted() is stable
    for part in by_remainder[: total - sum(shares)]:
        shares[part] += 1
    return shares
