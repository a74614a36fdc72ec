"""Writes scenes as files: ``images/*.png`` and ``questions.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import Scene, make_scene
from eval.tasks.scenes.sources import Split
from vtc.files import replacing


def record(scene: Scene) -> list[dict[str, Any]]:
    """Return the things in the scene as plain JSON types (``box`` = left, top, width, height in pixels)."""
    return [
        {
            "role": t.role,
            "name": t.name,
            "colour": t.colour,
            "text": t.text,
            "box": list(t.box),
            "patches": list(t.patches),
        }
        for t in scene.things
    ]


def write(folder: Path, split: Split, count: int, *, seed: int = 0, per_scene: int = 10) -> int:
    """Write ``count`` scenes with up to ``per_scene`` questions each.

    Every line of ``questions.jsonl`` holds ``question_id``, ``image`` (path below ``folder``), ``question``,
    ``answer``, ``kind``, ``options``, ``targets`` (indices into ``objects``) and ``objects`` (see :func:`record`).

    Returns
    -------
    int
        Number of questions written.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    written = 0
    with replacing(folder / "questions.jsonl") as file, file.open("w", encoding="utf-8") as lines:
        for index in range(count):
            scene = make_scene(split, seed, index)
            name = f"images/{split}-{seed}-{index:05d}.png"
            with replacing(folder / name) as picture:
                Image.fromarray(scene.image).save(picture)
            things = record(scene)
            for number, question in enumerate(ask(scene, per_scene)):
                line = {
                    "question_id": f"{split}-{seed}-{index:05d}-{number:02d}",
                    "image": name,
                    "question": question.text,
                    "answer": question.answer,
                    "kind": question.kind,
                    "options": list(question.options),
                    "targets": list(question.targets),
                    "objects": things,
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
    return written
