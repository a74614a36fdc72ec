"""Write clips and questions as files.

python -m eval.tasks.clips FOLDER --split test --count 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.tasks.clips.files import write_task
from eval.tasks.scenes.sources import SPLITS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=200, help="clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-clip", type=int, default=7, help="questions per clip")
    arguments = parser.parse_args()
    total = write_task(
        arguments.folder, arguments.split, arguments.count, seed=arguments.seed, per_clip=arguments.per_clip
    )
    print(f"{arguments.count} clips, {total} questions in {arguments.folder}")


if __name__ == "__main__":
    main()
