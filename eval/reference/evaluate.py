"""Measure a reference model on held-out scenes: accuracy by kind, and accuracy against kept tokens.

    python -m eval.reference.evaluate llava --scenes 60
    python -m eval.reference.evaluate llava --scenes 60 --curves

The first asks every question through ``generate`` and by scoring all possible answers, in float32 and bfloat16, one
question at a time and in batches. The second compresses the model by the public ``vtc.compress`` at several ratios.
Both write JSON and a Markdown table to ``eval/reference/results/``, with everything needed to repeat them.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.cache_utils import Cache

import vtc
from eval.tasks.scenes.questions import Question, ask
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.vocabulary import KINDS

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.5, 0.25, 0.11, 0.056)
METHODS = ("random", "uniform", "vtc-cls", "divprune", "fastv")


@dataclass(frozen=True)
class Item:
    """One question with its picture."""

    image: Image.Image
    question: Question


def items(scenes: int, per_scene: int, seed: int = 0) -> list[Item]:
    """Questions about the first ``scenes`` scenes of the held-out split."""
    found = []
    for index in range(scenes):
        scene = make_scene("test", seed, index)
        picture = Image.fromarray(scene.image)
        found += [Item(picture, question) for question in ask(scene, per_scene)]
    return found


def inputs(model: Any, processor: Any, batch: Sequence[Item]) -> Any:
    """What a user of the model would write: chat template, processor, one picture per row."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question.text}]}],
            add_generation_prompt=True,
        )
        for item in batch
    ]
    images = [[item.image] for item in batch]
    encoded = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return encoded.to(model.device, dtype=model.dtype)


@torch.no_grad()
def generated(model: Any, processor: Any, batch: Sequence[Item]) -> list[str]:
    """Greedy answers."""
    encoded = inputs(model, processor, batch)
    out = model.generate(**encoded, do_sample=False, max_new_tokens=6)
    new = out[:, encoded.input_ids.shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


@torch.no_grad()
def chosen(model: Any, processor: Any, item: Item) -> str:
    """The most likely of the question's options: sum of the log-probabilities of its tokens and of the end."""
    tokenizer = processor.tokenizer
    encoded = inputs(model, processor, [item])
    prefill = model(**encoded, use_cache=True, logits_to_keep=1)
    options = [
        [*tokenizer(option, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for option in item.question.options
    ]
    longest = max(len(option) for option in options)
    ids = torch.tensor([option + [tokenizer.pad_token_id] * (longest - len(option)) for option in options])
    name, cache = next((name, value) for name, value in prefill.items() if isinstance(value, Cache))
    cache.batch_repeat_interleave(len(options))
    mask = torch.cat([encoded.attention_mask.expand(len(options), -1), torch.ones_like(ids)], 1)
    rest = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, **{name: cache}).logits
    logits = torch.cat([prefill.logits.expand(len(options), -1, -1), rest], 1).float().log_softmax(-1)
    scores = logits.gather(2, ids[..., None]).squeeze(-1)
    real = torch.tensor([[1.0] * len(option) + [0.0] * (longest - len(option)) for option in options])
    return item.question.options[int((scores * real).sum(1).argmax())]


def table(questions: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """Share of exact answers by kind and overall."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(questions, answers, strict=True):
        hits[item.question.kind].append(answer == item.question.answer)
    result = {kind: sum(hits[kind]) / len(hits[kind]) for kind in KINDS if hits[kind]}
    result["all"] = sum(map(sum, hits.values())) / len(questions)
    return {name: round(value, 4) for name, value in result.items()}


def majority(questions: Sequence[Item]) -> dict[str, float]:
    """What the most frequent answer of each kind would score (told the kind, seeing nothing)."""
    common = {}
    for kind in KINDS:
        tally = Counter(item.question.answer for item in questions if item.question.kind == kind)
        common[kind] = tally.most_common(1)[0][0] if tally else ""
    return table(questions, [common[item.question.kind] for item in questions])


def ask_all(model: Any, processor: Any, questions: Sequence[Item], batch: int) -> tuple[dict[str, float], float]:
    """Accuracy through ``generate`` in batches, and the seconds it took."""
    start = time.perf_counter()
    answers: list[str] = []
    for first in range(0, len(questions), batch):
        answers += generated(model, processor, questions[first : first + batch])
    return table(questions, answers), time.perf_counter() - start


def conditions(name: str, questions: Sequence[Item]) -> dict[str, Any]:
    """Everything that a reader needs to repeat the numbers."""
    return {
        "model": name,
        "command": " ".join(["python -m eval.reference.evaluate", *sys.argv[1:]]),
        "questions": len(questions),
        "split": "test, seed 0",
        "standard_error_at_0.9": round(math.sqrt(0.09 / len(questions)), 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vtc": vtc.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, shared with other work",
    }


def full_accuracy(name: str, questions: Sequence[Item]) -> dict[str, Any]:
    """Accuracy with all tokens, by precision, batch size and way of answering."""
    import vtc_reference

    rows: dict[str, Any] = {"majority answer": majority(questions)}
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, processor = vtc_reference.load(name, dtype=dtype)
        label = str(dtype).removeprefix("torch.")
        for batch in (1, 16):
            row = f"generate, {label}, batch {batch}"
            rows[row], seconds[row] = ask_all(model, processor, questions, batch)
            print(row, rows[row]["all"], f"{seconds[row]:.0f} s", flush=True)
        if dtype is torch.float32:
            start = time.perf_counter()
            row = f"options, {label}, batch 1"
            rows[row] = table(questions, [chosen(model, processor, item) for item in questions])
            seconds[row] = time.perf_counter() - start
            print(row, rows[row]["all"], flush=True)
    return {"conditions": conditions(name, questions), "seconds": seconds, "accuracy": rows}


def curves(name: str, questions: Sequence[Item], batch: int = 10) -> dict[str, Any]:
    """Accuracy against kept tokens for every method and ratio, through ``vtc.compress``."""
    import vtc_reference

    model, processor = vtc_reference.load(name, dtype=torch.bfloat16)
    full, _ = ask_all(model, processor, questions, batch)
    rows: dict[str, dict[str, Any]] = {"all tokens": {"1.0": full}}
    for method in METHODS:
        for ratio in RATIOS:
            vtc.compress(model, method, keep_ratio=ratio)
            rows.setdefault(method, {})[str(ratio)], seconds = ask_all(model, processor, questions, batch)
            vtc.restore(model)
            print(method, ratio, rows[method][str(ratio)]["all"], f"{seconds:.0f} s", flush=True)
    return {"conditions": conditions(name, questions) | {"dtype": "bfloat16", "batch": batch}, "curves": rows}


def markdown(result: dict[str, Any]) -> str:
    """The result as a small table."""
    if "accuracy" in result:
        columns = [*KINDS, "all"]
        lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row, values in result["accuracy"].items():
            cells = " | ".join(f"{values[c]:.3f}" if c in values else "" for c in columns)
            lines.append(f"| {row} | {cells} |")
    else:
        rows = result["curves"]
        lines = [f"| method | {' | '.join(f'{100 * r:g} %' for r in RATIOS)} |", "|---" * (len(RATIOS) + 1) + "|"]
        lines += [
            f"| {method} | {' | '.join(format(values[str(r)]['all'], '.3f') for r in RATIOS)} |"
            for method, values in rows.items()
            if method != "all tokens"
        ]
        lines.append(f"\nAll tokens: {rows['all tokens']['1.0']['all']:.3f}.")
    notes = [f"- {key}: {value}" for key, value in result["conditions"].items()]
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--questions", type=int, default=10, help="per scene, at most")
    parser.add_argument("--curves", action="store_true", help="accuracy against kept tokens instead of full accuracy")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    questions = items(arguments.scenes, arguments.questions)
    what = "curves" if arguments.curves else "accuracy"
    result = (curves if arguments.curves else full_accuracy)(arguments.model, questions)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"{arguments.model}-{what}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"# {arguments.model}: {what}\n\n{markdown(result)}"
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
