"""Measure the accuracy of a reference model with all tokens, and whether precision, batch size and scoring change it.

    python -m eval.reference.evaluate llava --sources 60
    python -m eval.reference.evaluate qwen2_5_vl --task clips --sources 60

Every question is answered by ``generate`` in float32 and bfloat16, one at a time and in batches, and once by scoring
all its possible answers. Writes JSON and a Markdown table to ``eval/reference/results/``, with the conditions to repeat
them. Accuracy against kept tokens comes from ``python -m eval sweep --model reference:NAME``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

import vtc
from eval import models
from eval.models import Loaded
from eval.tasks.base import Sample
from eval.tasks.clips.questions import KINDS as CLIP_KINDS
from eval.tasks.generated import ClipsTask, ScenesTask
from eval.tasks.scenes.vocabulary import KINDS as SCENE_KINDS
from vtc.files import write_text

RESULTS = Path(__file__).parent / "results"
KINDS = tuple(dict.fromkeys([*SCENE_KINDS, *CLIP_KINDS]))
LONGEST_ANSWER = 6  # tokens


def questions(task: str, sources: int) -> list[Sample]:
    """Return all questions about the first scenes or clips of the held-out split."""
    made = ScenesTask(pictures=sources) if task == "scenes" else ClipsTask(pictures=sources)
    return list(made.samples(None))


def generated(loaded: Loaded, samples: Sequence[Sample], batch: int) -> list[str]:
    """Answer greedily, in the order of the samples; videos of one batch have equally many frames."""
    answers: dict[str, str] = {}
    opened = [(sample, sample.open()) for sample in samples]
    frames = [0 if media.video is None else len(media.video.frames) for _, media in opened]
    order = sorted(range(len(opened)), key=lambda i: frames[i])
    for _, alike in groupby(order, key=lambda i: frames[i]):
        group = [opened[i] for i in alike]
        for first in range(0, len(group), batch):
            part = group[first : first + batch]
            encoded = models.inputs(loaded, [sample for sample, _ in part], [media for _, media in part])
            texts, _ = models.answer(loaded, encoded, LONGEST_ANSWER)
            answers.update(zip([sample.id for sample, _ in part], texts, strict=True))
    return [answers[sample.id] for sample in samples]


@torch.no_grad()
def chosen(loaded: Loaded, sample: Sample) -> str:
    """Return the most likely of the options, by the sum of the log-probabilities of its tokens and the end token."""
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    encoded = models.inputs(loaded, [sample], [sample.open()])
    prefill = model(**encoded, use_cache=True, logits_to_keep=1)
    options = [
        [*tokenizer(option, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for option in sample.options
    ]
    longest = max(len(option) for option in options)
    ids = torch.tensor([option + [tokenizer.pad_token_id] * (longest - len(option)) for option in options])
    # Releases of transformers differ in how they call it.
    name, cache = next((name, value) for name, value in prefill.items() if isinstance(value, transformers.Cache))
    cache.batch_repeat_interleave(len(options))
    # No mask: the prompt has no padding, and what pads the shorter options comes after everything that counts.
    rest = model(input_ids=ids[:, :-1], use_cache=True, **{name: cache}).logits
    logits = torch.cat([prefill.logits.expand(len(options), -1, -1), rest], 1).float().log_softmax(-1)
    scores = logits.gather(2, ids[..., None]).squeeze(-1)
    real = torch.tensor([[1.0] * len(option) + [0.0] * (longest - len(option)) for option in options])
    return sample.options[int((scores * real).sum(1).argmax())]


def table(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, float]:
    """Return the share of exact answers by kind and overall."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for sample, answer in zip(samples, answers, strict=True):
        hits[sample.meta["kind"]].append(answer == sample.target)
    result = {kind: sum(hits[kind]) / len(hits[kind]) for kind in KINDS if hits[kind]}
    result["all"] = sum(map(sum, hits.values())) / len(samples)
    return {name: round(value, 4) for name, value in result.items()}


def majority(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the accuracy of the most frequent answer of each kind."""
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        tally[sample.meta["kind"]][sample.target] += 1
    return table(samples, [tally[sample.meta["kind"]].most_common(1)[0][0] for sample in samples])


def conditions(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return everything that is needed to repeat the numbers."""
    return {
        "model": name,
        "command": " ".join(["python -m eval.reference.evaluate", *sys.argv[1:]]),
        "questions": len(samples),
        "split": "test, seed 0",
        "standard_error_at_0.9": round(math.sqrt(0.09 / len(samples)), 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtc": vtc.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, shared with other work",
    }


def accuracy(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Measure the accuracy with all tokens, by precision, batch size and way of answering."""
    rows: dict[str, Any] = {"majority answer": majority(samples)}
    seconds = {}

    def record(row: str, answers: Sequence[str], start: float) -> None:
        rows[row], seconds[row] = table(samples, answers), time.perf_counter() - start
        print(row, rows[row]["all"], f"{seconds[row]:.0f} s", flush=True)

    for dtype in ("float32", "bfloat16"):
        loaded = models.load(f"reference:{name}", dtype=dtype)
        for batch in (1, 16):
            start = time.perf_counter()
            record(f"generate, {dtype}, batch {batch}", generated(loaded, samples, batch), start)
        if dtype == "float32":
            start = time.perf_counter()
            record(f"options, {dtype}, batch 1", [chosen(loaded, sample) for sample in samples], start)
    return {"conditions": conditions(name, samples), "seconds": seconds, "accuracy": rows}


def markdown(result: dict[str, Any]) -> str:
    """Format the result as a small table."""
    columns = list(result["accuracy"]["majority answer"])
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, values in result["accuracy"].items():
        lines.append(f"| {row} | {' | '.join(f'{values[column]:.3f}' for column in columns)} |")
    notes = [f"- {key}: {value}" for key, value in result["conditions"].items()]
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", choices=("scenes", "clips"), default="scenes")
    parser.add_argument("--sources", "--scenes", type=int, default=60, help="scenes or clips")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = accuracy(arguments.model, questions(arguments.task, arguments.sources))
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"{arguments.model}-{arguments.task}"
    write_text(stem.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    text = f"# {arguments.model}: accuracy on {arguments.task}\n\n{markdown(result)}"
    write_text(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
