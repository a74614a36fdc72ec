"""Choose the ten sample scenes of ``vtc-reference`` and write them, with five questions each.

    python -m eval.reference.train.samples

Chosen by what they hold (objects, a digit, a sign, in some a lone cup with one thing left of it), out of a seed that no
measurement uses, and never by what a model answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from eval.reference.train.export import PACKAGE
from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import Scene, make_scene
from eval.tasks.scenes.vocabulary import KINDS

SEED = 2
CUP_QUESTION = "What is left of the cup?"


def cup_question(scene: Scene) -> Question | None:
    """The README's question, where the scene has exactly one answer to it."""
    for seed in range(40):
        for question in ask(scene, 12, kinds=("relation",), seed=seed):
            if question.text == CUP_QUESTION:
                return question
    return None


def chosen(count: int = 10, with_cup: int = 4) -> Iterator[tuple[Scene, list[Question]]]:
    """The scenes and their questions: the first that are rich enough, some of them with the cup question in front."""
    cups = others = index = 0
    while cups + others < count:
        scene = make_scene("test", SEED, index)
        index += 1
        rich = 3 <= len(scene.objects) <= 5 and scene.signs and any(thing.text for thing in scene.objects)
        if not rich:
            continue
        cup = cup_question(scene)
        if cup is not None and cups < with_cup:
            cups += 1
            yield scene, [cup, *ask(scene, 4, kinds=("colour", "place", "digit", "reading"))]
        elif cup is None and others < count - with_cup:
            others += 1
            yield scene, list(ask(scene, 5, kinds=KINDS))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=PACKAGE / "samples")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, questions) in enumerate(chosen(), 1):
        name = f"scene-{number:02d}.png"
        Image.fromarray(scene.image).save(arguments.folder / name)
        lines += [{"image": name, "question": q.text, "answer": q.answer, "kind": q.kind} for q in questions]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (arguments.folder / "questions.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} questions about {number} scenes in {arguments.folder}")


if __name__ == "__main__":
    main()
