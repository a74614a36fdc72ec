"""From what the user asked for (`keep_ratio` or `keep_tokens`) to integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import ConfigError, InputError
from .plain import integer, real, shown

__all__ = ["check_budget", "check_seed", "largest_remainder", "resolve_budget"]


def check_budget(keep_ratio: Any, keep_tokens: Any) -> tuple[float | None, int | None]:
    """Raise unless exactly one of the two is given and it lies in its range; return both as Python's own numbers.

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
        given = "neither"
        if keep_ratio is not None:
            given = f"keep_ratio={shown(keep_ratio)} and keep_tokens={shown(keep_tokens)}"
        raise ConfigError(f"Give exactly one of keep_ratio and keep_tokens; got {given}.")
    if keep_ratio is not None:
        ratio = real(keep_ratio)
        if ratio is None:
            raise ConfigError(f"keep_ratio must be a number in (0, 1], got {shown(keep_ratio)}.")
        if not 0 < ratio <= 1:
            raise ConfigError(f"keep_ratio is the fraction kept and must lie in (0, 1], got {shown(ratio)}.")
        return ratio, None
    tokens = integer(keep_tokens)
    if tokens is None:
        raise ConfigError(f"keep_tokens must be an integer of at least 1, got {shown(keep_tokens)}.")
    if not 1 <= tokens < 2**63:
        raise ConfigError(f"keep_tokens must be at least 1, and an integer of 64 bits, got {shown(tokens)}.")
    return None, tokens


def check_seed(seed: Any) -> int:
    """Return a seed as an int.

    Raises
    ------
    ConfigError
        It is no integer in 0..2**63-1.
    """
    found = integer(seed)
    if found is None or not 0 <= found < 2**63:
        raise ConfigError(f"seed must be an integer in 0..2**63-1, got {shown(seed)}.")
    return found


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
    keep_ratio, keep_tokens = check_budget(keep_ratio, keep_tokens)
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
