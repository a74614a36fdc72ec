"""Write the offline task for lmms-eval: ``python -m eval.lmms --n 20 --out DIR``, then ``--include_path DIR``.

The questions are those of ``python -m eval run --task scenes``, in the same order; the task's name is ``vtc_scenes``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eval.tasks.scenes.writer import write
from vtc.files import write_text

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.lmms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="number of scenes, each with up to ten questions")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    written = write(folder, "test", arguments.n)
    questions = json.dumps(str(folder / "questions.jsonl"))  # a YAML string, whatever is in the path
    task = (HERE / "task.yaml").read_text(encoding="utf-8").replace("QUESTIONS", questions)
    write_text(folder / "utils.py", (HERE / "utils.py").read_text(encoding="utf-8"))
    write_text(folder / "vtc_scenes.yaml", task)
    print(f"vtc_scenes in {folder}: {arguments.n} images and {written} questions")


if __name__ == "__main__":
    main()
