"""Fuzz for as long as one likes: `python -m tests.fuzz --minutes 30 --seed 1`.

Every failure is printed once, with the smallest example that shows it, and the campaign goes on behind it. The exit
status is 1 if there was one. The same seed finds the same examples, as far as the time reaches.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import sys
import warnings
from collections.abc import Callable, Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests import tiny
from tests.fuzz import campaign, faults, interrupts, models, modes, stateless

PARTS = ("models", "selections", "configs", "files", "faults")
BY_DEFAULT = PARTS[:-1]
"""Faults take seconds each, and are asked for by name."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", help="names of tests/tiny.py, with commas (all)")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}, with commas (all but faults)")
    parser.add_argument("--steps", type=int, default=20, help="of one example of the machine (20)")
    parser.add_argument("--refusals", action="store_true", help="list at the end what was refused, and how often")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = BY_DEFAULT if args.only is None else args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: no {', '.join(sorted(unknown))}")
    families = tiny.FAMILIES if args.families is None else [tiny.family(name) for name in args.families.split(",")]
    parts: dict[str, Callable[[int], None]] = {}
    for part in wanted:
        if part == "models":
            for family in families:
                parts[str(family)] = functools.partial(_use, family, args.steps)
        elif part == "faults":
            parts["faults"] = functools.partial(_break, families)
            parts["interrupts"] = interrupts.explore
        else:
            for name in stateless.PROPERTIES[part]:
                parts[name] = functools.partial(_draw, part, name)
    found = campaign.explore(parts, minutes=args.minutes, seed=args.seed)
    if args.refusals:
        for message, count in sorted(modes.COUNTS.items()):
            if message.startswith("refused"):
                print(f"{count:6} {message}")
    return 1 if found.known else 0


def _use(family: tiny.Family, steps: int, seed: int) -> None:
    models.run(family, examples=10, steps=steps, seed=seed)


def _draw(part: str, name: str, seed: int) -> None:
    stateless.run(part, name, seed=seed)


def _break(families: Sequence[tiny.Family], seed: int) -> None:
    """All faults of one family, setting and mode."""
    draw = random.Random(seed)
    family = draw.choice(families)
    while True:
        setting, way = draw.choice(modes.settings(family)), draw.choice(modes.modes(family))
        if not modes.can(family, "ragged", way) or way.name in ("gradients", "hidden-states"):
            continue
        if modes.expected(family, setting, "ragged", way).error is None:
            break
    what = f"{family}, {setting.name}, {way.name}"
    try:
        with campaign.watched(), pytest.MonkeyPatch.context() as patch:
            for _ in faults.fail_in_calls(faults.Patient(family, setting, way.name), patch, most=4):
                pass
        with campaign.watched():
            for _ in faults.run_out_of_memory(faults.Patient(family, setting, way.name), stride=draw.randint(3, 40)):
                pass
        with campaign.watched(), pytest.MonkeyPatch.context() as patch:
            earlier = draw.choice((None, *modes.settings(family)))
            for _ in faults.fail_in_compress(faults.Patient(family, setting, way.name), patch, earlier):
                pass
    except AssertionError as error:
        raise AssertionError(f"{error} ({what})") from error
    finally:
        models.forget_what_is_open()


if __name__ == "__main__":
    sys.exit(main())
