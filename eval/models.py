"""Models by name, and what a user of one would write to ask it something."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtc
import vtc.reference
from eval.tasks.base import Sample


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in evaluation mode, its processor, and which weights these are."""

    model: Any
    processor: Any
    name: str
    weights: str


def load(name: str, *, dtype: str = "float32", device: str = "cpu", attention: str | None = None) -> Loaded:
    """`reference`, `reference:NAME`, or the folder of a checkpoint; nothing is downloaded.

    Raises
    ------
    InputError
        There is no such folder, or nothing in it that can be loaded.
    """
    source, _, which = name.partition(":")
    precision = getattr(torch, dtype)
    if source == "reference":
        model, processor = vtc.reference.load(which or "llava", precision)
    elif not Path(name).is_dir():
        raise vtc.InputError(f"{name}: no such folder; --model takes a checkpoint's folder, or reference[:NAME]")
    else:
        try:
            model = AutoModelForImageTextToText.from_pretrained(name, local_files_only=True, dtype=precision)
            processor = AutoProcessor.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise vtc.InputError(f"{name}: cannot be loaded as an image-text-to-text model: {error}") from error
    if attention is not None:
        model.set_attn_implementation(attention)
    processor.tokenizer.padding_side = "left"
    return Loaded(model.to(device).eval(), processor, name, fingerprint(model))


def fingerprint(model: Any) -> str:
    """Twelve digits that tell one set of weights from another: a hash over sums of every parameter."""
    digest = hashlib.sha256()
    for key, weight in model.state_dict().items():
        digest.update(f"{key} {tuple(weight.shape)} {weight.double().sum().item():.9e}".encode())
    return digest.hexdigest()[:12]


def inputs(loaded: Loaded, batch: Sequence[Sample], images: Sequence[Sequence[Any]]) -> Any:
    """Chat template and processor over a batch: the images of each sample before its question."""
    texts = [
        loaded.processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": sample.question}],
                }
            ],
            add_generation_prompt=True,
        )
        for sample, pictures in zip(batch, images, strict=True)
    ]
    pictures = [list(each) for each in images] if any(images) else None
    encoded = loaded.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    return encoded.to(loaded.model.device, dtype=loaded.model.dtype)


@torch.inference_mode()
def answer(loaded: Loaded, encoded: Any, max_new_tokens: int) -> tuple[list[str], torch.Tensor]:
    """Greedy answers, and the log-probabilities (B, V) of their first token."""
    out = loaded.model.generate(
        **encoded,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, encoded["input_ids"].shape[1] :]
    texts = loaded.processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts], out.logits[0].float().log_softmax(dim=-1)
