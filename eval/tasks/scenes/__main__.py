"""Write scenes to a folder: ``python -m eval.tasks.scenes --split test --n 400 --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.tasks.scenes.sources import SPLITS
from eval.tasks.scenes.writer import write


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.tasks.scenes", description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--n", type=int, default=400, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=10, help="questions per scene, at most")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    written = write(arguments.out, arguments.split, arguments.n, seed=arguments.seed, per_scene=arguments.questions)
    print(f"{arguments.n} images and {written} questions in {arguments.out}")


if __name__ == "__main__":
    main()
