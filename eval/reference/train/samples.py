"""Choose the ten sample scenes and three sample clips of ``vtc-reference`` and write them, with questions.

    python -m eval.reference.train.samples

Chosen by what they hold (objects, a digit, a sign, in some a lone cup with one thing left of it; in clips motion, and
things that appear and disappear), out of a seed that no measurement uses, and never by what a model answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from eval.reference.train.export import PACKAGE
from eval.tasks.clips.clip import LENGTHS, Clip, make_clip
from eval.tasks.clips.files import write_mp4
from eval.tasks.clips.questions import ask as ask_clip
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


def chosen_clips(count: int = 3) -> Iterator[Clip]:
    """The first clips, of one length each in turn, in which all that questions are about happens."""
    found = index = 0
    while found < count:
        clip = make_clip("test", SEED, index, (LENGTHS[found % len(LENGTHS)],))
        index += 1
        objects = clip.objects
        events = any(thing.first for thing in objects), any(thing.last < clip.length for thing in objects)
        if len(objects) >= 3 and any(thing.direction for thing in objects) and all(events):
            found += 1
            yield clip


def write_clips(folder: Path, per_clip: int = 7) -> int:
    """Write the clips and ``questions.jsonl``; returns how many questions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, clip in enumerate(chosen_clips(), 1):
        name = f"clip-{number:02d}.mp4"
        write_mp4(folder / name, clip.frames)
        questions = ask_clip(clip, per_clip)
        lines += [{"video": name, "question": q.text, "answer": q.answer, "kind": q.kind} for q in questions]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=PACKAGE)
    arguments = parser.parse_args()
    folder = arguments.package / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, questions) in enumerate(chosen(), 1):
        name = f"scene-{number:02d}.png"
        Image.fromarray(scene.image).save(folder / name)
        lines += [{"image": name, "question": q.text, "answer": q.answer, "kind": q.kind} for q in questions]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} questions about {number} scenes in {folder}")
    print(f"{write_clips(arguments.package / 'clips')} questions about clips")


if __name__ == "__main__":
    main()
