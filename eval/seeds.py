"""Which pictures and clips of the generated tasks are for exploring, which for comparing and which for confirming.

A rule that was chosen on pictures looks better on them than it is. So the three purposes have seeds of their own:
explore freely, compare candidates on others, and confirm what was written down on seeds that nobody has looked at
(`eval.confirm`).
"""

from __future__ import annotations

from vtc import ConfigError

RANGES = {"exploring": range(1000), "comparing": range(1000, 2000), "confirming": range(2000, 3000)}
"""Seeds of the generated tasks by purpose; disjoint."""

DEFAULT = "exploring:0"


def seed_of(text: str, *, confirm: bool = False) -> int:
    """Return the seed behind a purpose and a number, such as ``comparing:3``; without a number the first one.

    Parameters
    ----------
    text : str
    confirm : bool
        Whether the seed is drawn in order to confirm; nothing else may draw those.

    Raises
    ------
    ConfigError
        There is no such seed, or it is for another purpose.
    """
    purpose, _, number = text.partition(":")
    if purpose not in RANGES or not (number or "0").isdecimal() or int(number or 0) >= len(RANGES[purpose]):
        raise ConfigError(f"a draw is PURPOSE:N with a purpose of {', '.join(RANGES)} and N below 1000; got {text!r}")
    if (purpose == "confirming") != confirm:
        raise ConfigError(
            "confirming seeds are for `python -m eval confirm`, which draws no others: "
            f"{text!r} would be looked at before the rule is written down"
        )
    return RANGES[purpose][int(number or 0)]
