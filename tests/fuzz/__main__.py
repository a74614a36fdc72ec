"""Fuzz for as long as one likes: `python -m tests.fuzz --minutes 30 --seed 1`.

Every failure is printed once, with the smallest example that shows it, and the campaign goes on behind it. The exit
status is 1 if there was one. The same seed finds the same examples, as far as the time reaches.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from tests import tiny
from tests.fuzz import campaign, modes, models, stateless

PARTS = ("models", "selections", "configs", "files")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", help="names of tests/tiny.py, with commas (all)")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}, with commas (all)")
    parser.add_argument("--steps", type=int, default=20, help="of one example of the machine (20)")
    parser.add_argument("--refusals", action="store_true", help="list at the end what was refused, and how often")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = PARTS if args.only is None else args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: no {', '.join(sorted(unknown))}")
    families = tiny.FAMILIES if args.families is None else [tiny.family(name) for name in args.families.split(",")]
    parts: dict[str, Callable[[int], None]] = {}
    for part in wanted:
        if part == "models":
            for family in families:
                parts[str(family)] = functools.partial(_use, family, args.steps)
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


if __name__ == "__main__":
    sys.exit(main())
