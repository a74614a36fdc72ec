"""Loads models by name, encodes samples for them and generates answers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

import vtc
from eval.tasks.base import Media, Sample
from eval.tasks.video import Frames


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in evaluation mode, its processor, its name and a fingerprint of its weights."""

    model: Any
    processor: Any
    name: str
    weights: str


def load(name: str, *, dtype: str = "float32", device: str = "cpu", attention: str | None = None) -> Loaded:
    """Load `reference`, `reference:NAME`, or the folder of a checkpoint; nothing is downloaded.

    Raises
    ------
    InputError
        There is no such folder, or it contains no model of this kind.
    ConfigError
        The device or the attention implementation is not available.
    """
    model, processor = vtc.load(name, dtype=dtype)
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise vtc.ConfigError(f"--attention {attention}: {error}") from error
    processor.tokenizer.padding_side = "left"
    if device.partition(":")[0] == "meta":
        raise vtc.ConfigError("--device meta: tensors there have no values, so nothing can be answered; use cpu")
    try:
        model = model.to(_local_device(device)).eval()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise vtc.ConfigError(f"--device {device}: {error}") from error
    return Loaded(model, processor, name, fingerprint(model))


def _local_device(device: str) -> str:
    """Return the GPU of this process where a launcher started several on one machine."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def fingerprint(model: Any) -> str:
    """Return twelve hexadecimal digits that identify the weights: a hash over the sum of every parameter."""
    digest = hashlib.sha256()
    for key, weight in model.state_dict().items():
        digest.update(f"{key} {tuple(weight.shape)} {weight.double().sum().item():.9e}".encode())
    return digest.hexdigest()[:12]


def tower_layers(loaded: Loaded) -> int | None:
    """Return the number of layers of the vision tower, where the configuration says it."""
    vision = getattr(loaded.model.config, "vision_config", None)
    found = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None)
    return None if found is None else int(found)


def check_modality(loaded: Loaded, modality: str) -> None:
    """Check that the model takes an "image" or a "video".

    Raises
    ------
    UnsupportedModelError
        The modality is "video" and the processor takes no videos.
    """
    takes = all(getattr(loaded.processor, name, None) for name in ("video_processor", "video_token"))
    if modality == "video" and not takes:
        raise vtc.UnsupportedModelError(
            f"{loaded.name}: {type(loaded.processor).__name__} takes no videos; see the column 'inputs' of `vtc models`"
        )


def inputs(loaded: Loaded, batch: Sequence[Sample], media: Sequence[Media]) -> Any:
    """Apply chat template and processor to a batch: images and video of each sample, then its question.

    Videos of one batch must have equally many frames, because several families stack them.
    """
    processor = loaded.processor
    texts = []
    for sample, shown in zip(batch, media, strict=True):
        content = [{"type": "image"} for _ in shown.images]
        content += [{"type": "video"}] if shown.video is not None else []
        chat = conversation(content, [*sample.earlier, (sample.question, "")])
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    pictures = [shown.images for shown in media]
    videos = [_padded_step(shown.video, processor) for shown in media if shown.video is not None]
    given: dict[str, Any] = {"images": pictures} if any(pictures) else {}
    if videos:
        given["videos"] = [video.frames for video in videos]
        given["do_sample_frames"] = False
        given["video_metadata"] = [
            VideoMetadata(
                total_num_frames=video.total,
                fps=video.fps,
                duration=video.total / video.fps,
                frames_indices=list(video.indices),
            )
            for video in videos
        ]
    encoded = processor(text=texts, padding=True, return_tensors="pt", **given)
    encoded.pop("video_metadata", None)
    return encoded.to(loaded.model.device, dtype=loaded.model.dtype)


def conversation(media: list[dict[str, str]], turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the messages of a conversation about some media, up to its last question."""
    chat: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        shown = media if number == 0 else []
        chat.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat[:-1]


def _padded_step(video: Frames, processor: Any) -> Frames:
    """Repeat the last frame of a video shorter than one temporal patch, which some processors refuse."""
    patch = int(getattr(processor.video_processor, "temporal_patch_size", 1) or 1)
    lacking = max(0, patch - len(video.frames))
    frames = np.concatenate([video.frames, *[video.frames[-1:]] * lacking])
    return replace(video, frames=frames, indices=(*video.indices, *video.indices[-1:] * lacking))


def visual_tokens(loaded: Loaded, encoded: Any) -> int:
    """Count the placeholders of images and videos in the prompts."""
    config = loaded.model.config
    ids = {getattr(config, f"{modality}_token_id", None) for modality in ("image", "video")} - {None}
    return int(torch.isin(encoded["input_ids"], torch.tensor(sorted(ids), device=loaded.model.device)).sum())


def blinded(encoded: Any) -> Any:
    """Return the inputs with all pixels set to 0, the mean after normalisation: a uniform grey.

    Raises
    ------
    UnsupportedModelError
        The inputs contain no pixels under a known name.
    """
    names = [name for name in ("pixel_values", "pixel_values_videos") if name in encoded]
    if not names:
        raise vtc.UnsupportedModelError(f"no pixels among {', '.join(encoded)}, so the model cannot be blinded")
    return {**encoded, **{name: torch.zeros_like(encoded[name]) for name in names}}


@torch.inference_mode()
def answer(loaded: Loaded, encoded: Any, max_new_tokens: int) -> tuple[list[str], torch.Tensor]:
    """Generate greedily; return the B answers and the log-probabilities (B, V) of their first token."""
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
