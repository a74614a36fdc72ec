"""Measure the ``qwen2_5_vl`` reference model through its processor, ``generate`` and ``vtc.compress``.

    python -m eval.reference.train.qwen_evaluate --questions 1000 --folder eval/reference/results

writes ``qwen2_5_vl.json`` and ``qwen2_5_vl.md``: accuracy per kind on the test split with all tokens, beside the
answer that is most common in training, and accuracy against the share of tokens kept. An answer counts if the whole
generated text is the right one. Clips are read back from H.264 files, as a user's would be."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.video_utils import VideoMetadata

import vtc
import vtc.reference
from eval.tasks.clips import questions as clip_questions
from eval.tasks.clips.clip import FPS, make_clip
from eval.tasks.clips.files import read_mp4, write_mp4
from eval.tasks.scenes import questions as scene_questions
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.scene import make_scene

NAME: Final = "qwen2_5_vl"
METHODS: Final = ("random", "uniform", "divprune", "fastv")
RATIOS: Final = (0.5, 0.25, 0.11, 0.056)
MODALITIES: Final = ("image", "video")


@dataclass(frozen=True, eq=False)
class Item:
    """One question with its picture or frames, ``(H, W, 3)`` or ``(T, H, W, 3)`` uint8."""

    pixels: NDArray[np.uint8]
    question: Question


def items(modality: str, count: int, per_source: int = 9, seed: int = 0) -> list[Item]:
    """The first ``count`` questions of the test split, all kinds in turn."""
    found: list[Item] = []
    index = 0
    while len(found) < count:
        if modality == "image":
            scene = make_scene("test", seed, index)
            pixels, asked = scene.image, scene_questions.ask(scene, per_source)
        else:
            clip = make_clip("test", seed, index)
            asked = clip_questions.ask(clip, per_source)
            with tempfile.TemporaryDirectory() as folder:
                write_mp4(Path(folder) / "clip.mp4", clip.frames)
                pixels = read_mp4(Path(folder) / "clip.mp4")
        found += [Item(pixels, question) for question in asked]
        index += 1
    return found[:count]


def majority(modality: str, sources: int = 400) -> dict[str, str]:
    """The most common answer of every kind in the training split."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(sources):
        if modality == "image":
            asked = scene_questions.ask(make_scene("train", 0, index), 9)
        else:
            asked = clip_questions.ask(make_clip("train", 0, index, (8,)), 9)
        for question in asked:
            answers[question.kind][question.answer] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}


def prompt(processor: Any, modality: str, question: str) -> str:
    """What the chat template makes of a question about one picture or video."""
    content = [{"type": modality}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def inputs_of(processor: Any, modality: str, batch: Sequence[Item]) -> Any:
    """Model inputs of a batch of questions of one modality."""
    text = [prompt(processor, modality, item.question.text) for item in batch]
    if modality == "image":
        return processor(images=[item.pixels for item in batch], text=text, padding=True, return_tensors="pt")
    metadata = [
        VideoMetadata(total_num_frames=len(i.pixels), fps=FPS, frames_indices=range(len(i.pixels))) for i in batch
    ]
    videos = [item.pixels for item in batch]
    return processor(videos=videos, video_metadata=metadata, text=text, padding=True, return_tensors="pt")


@torch.no_grad()
def answers(model: Any, processor: Any, modality: str, asked: Sequence[Item], batch: int = 18) -> Iterator[str]:
    """Generated answers, in order."""
    for start in range(0, len(asked), batch):
        inputs = inputs_of(processor, modality, asked[start : start + batch])
        with torch.autocast("cpu", torch.bfloat16):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        yield from (text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))


def accuracy(given: Sequence[str], asked: Sequence[Item]) -> dict[str, float]:
    """Share of right answers by kind and over all."""
    right: dict[str, list[bool]] = defaultdict(list)
    for text, item in zip(given, asked, strict=True):
        right[item.question.kind].append(text == item.question.answer)
    table = {kind: round(float(np.mean(hits)), 4) for kind, hits in right.items()}
    return table | {"all": round(float(np.mean([hit for hits in right.values() for hit in hits])), 4)}


def measure(model: Any, processor: Any, full: int, pruned: int) -> dict[str, Any]:
    """Everything: full accuracy on ``full`` questions, curves on the first ``pruned`` of them."""
    result: dict[str, Any] = {}
    for modality in MODALITIES:
        asked = items(modality, full)
        common = majority(modality)
        began = time.time()
        given = list(answers(model, processor, modality, asked))
        entry: dict[str, Any] = {
            "questions": full,
            "full": accuracy(given, asked),
            "majority": accuracy([common.get(item.question.kind, "") for item in asked], asked),
            "seconds": round(time.time() - began, 1),
            "curve_questions": pruned,
            "curves": {"full": accuracy(given[:pruned], asked[:pruned])},
        }
        print(modality, entry["full"], flush=True)
        for method in METHODS:
            for ratio in RATIOS:
                with vtc.compressed(model, method, keep_ratio=ratio):
                    table = accuracy(list(answers(model, processor, modality, asked[:pruned])), asked[:pruned])
                entry["curves"][f"{method} {ratio}"] = table
                print(modality, method, ratio, table["all"], flush=True)
        result[modality] = entry
    return result


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [f"# Accuracy of the `{NAME}` reference model", "", result["conditions"], ""]
    for modality in MODALITIES:
        entry = result[modality]
        error = math.sqrt(0.25 / entry["curve_questions"])
        lines += [f"## {modality.capitalize()}: all tokens, {entry['questions']} questions", ""]
        lines += ["| kind | accuracy | most common answer |", "| --- | --- | --- |"]
        lines += [f"| {kind} | {value:.3f} | {entry['majority'][kind]:.3f} |" for kind, value in entry["full"].items()]
        lines += ["", f"## {modality.capitalize()}: share of tokens kept, {entry['curve_questions']} questions", ""]
        lines += [f"Standard error at most {error:.3f}. All tokens: {entry['curves']['full']['all']:.3f}.", ""]
        lines += ["| method | " + " | ".join(f"{100 * ratio:g} %" for ratio in RATIOS) + " |"]
        lines += ["| --- " * (1 + len(RATIOS)) + "|"]
        for method in METHODS:
            values = " | ".join(f"{entry['curves'][f'{method} {ratio}']['all']:.3f}" for ratio in RATIOS)
            lines.append(f"| {method} | {values} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=1000, help="per modality, all tokens")
    parser.add_argument("--curve-questions", type=int, default=360, help="per modality, method and ratio")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = vtc.reference.load(NAME)
    result = measure(model, processor, arguments.questions, arguments.curve_questions)
    command = (
        f"python -m eval.reference.train.qwen_evaluate --questions {arguments.questions} "
        f"--curve-questions {arguments.curve_questions} --folder {arguments.folder}"
    )
    result["conditions"] = (
        "Test split (seed 0) of `eval.tasks.scenes` and `eval.tasks.clips`; greedy `generate`, exact match, batch 18, "
        f"bfloat16 autocast; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()} CPU with {os.cpu_count()} cores. Command: `{command}`."
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.folder / f"{NAME}.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
