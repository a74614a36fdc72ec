"""The prompt around one video: what the processor would make of all its frames, made of a window of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from vtc.chat import chat, processing
from vtc.core.grids import Grid
from vtc.engine.engine import Engine
from vtc.errors import InputError, UnsupportedModelError

__all__ = ["VideoPrompt", "described"]


def described(frames: np.ndarray[Any, Any]) -> str:
    """Say what frames (T, H, W, 3) are, for messages."""
    return f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} pixels"


@dataclass(eq=False)
class VideoPrompt:
    """The prompt around one video: text before and after it, and what of it the language model would see.

    Parameters
    ----------
    processor
    engine : Engine
    frames : list of int
        Numbers of the sampled frames in units of `1 / fps`.
    fps : float
        Of the file.
    total : int
        Frames of the file.
    """

    processor: Any
    engine: Engine
    frames: list[int]
    fps: float
    total: int
    grid: Grid | None = None  # (t, h, w) patches of the whole video, where towers are packed
    pixels: tuple[int, ...] = ()  # shape of one frame where they are not
    steps: int = 0

    def __post_init__(self) -> None:
        adapter = self.engine.adapter
        video_token, worker = (getattr(self.processor, name, None) for name in ("video_token", "video_processor"))
        self.as_images = "video" not in adapter.modalities
        known = not self.as_images or adapter.video_as_images
        if not known or worker is None or not video_token:
            raise UnsupportedModelError(
                f"{adapter.config.model_type} with {type(self.processor).__name__} takes no videos; see the column "
                "'inputs' of `vtc models`"
            )
        self.worker: Any = worker
        token_id = adapter.token_id("image" if self.as_images else "video")
        if token_id is None:
            raise UnsupportedModelError(f"{adapter.config.model_type} does not say which token stands for a video")
        self.token_id: int = token_id
        self.token: str = self.processor.tokenizer.convert_ids_to_tokens(token_id)
        self.join = int(getattr(worker, "temporal_patch_size", 1) or 1)

    def metadata(self, frames: Sequence[int]) -> VideoMetadata:
        """Describe frames of these numbers to the processor."""
        return VideoMetadata(
            total_num_frames=self.total, fps=self.fps, duration=self.total / self.fps, frames_indices=list(frames)
        )

    # -- text -----------------------------------------------------------------------------------------------------

    def text(self, question: str) -> str:
        """Return the chat with one placeholder for the video.

        Raises
        ------
        InputError
            The processor has no chat template, its template leaves the video out, or the question holds placeholders.
        """
        text = chat(self.processor, ["video"], question)
        token = self.processor.video_token
        if token not in text:
            raise InputError(
                f"The chat template of this {type(self.processor).__name__} leaves videos out: it makes no {token!r} "
                "of one, so the model takes pictures only."
            )
        return text

    def ids(self, question: str) -> torch.Tensor:
        """Return (1, P) ids of the full prompt, as the processor would make them of all frames at once."""
        if self.grid is None:
            shown = torch.zeros(()).expand(1, self.steps, *self.pixels)
            made: dict[str, Any] = {"pixel_values_videos": shown}
        else:
            made = {"video_grid_thw": torch.tensor([self.grid])}
        made["video_metadata"] = [self.metadata(self.frames)]
        body = self.processor.replace_video_token(made, 0)
        text = self.text(question).replace(self.processor.video_token, body)
        # Runs of placeholders go through the tokenizer as one: an hour of video is millions of characters.
        folded, lengths = _folded(text, self.token)
        short = torch.tensor(self.processor.tokenizer(folded)["input_ids"])
        repeats = torch.ones_like(short)
        repeats[short == self.token_id] = torch.tensor(lengths)
        return short.repeat_interleave(repeats)[None].to(self.engine.model.device)

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Return position ids (..., 1, P) of the full prompt; the model notes what it needs for later steps."""
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if self.grid is not None:
            arguments["video_grid_thw"] = torch.tensor([self.grid], device=ids.device)
            arguments["mm_token_type_ids"] = 2 * (ids == self.token_id).int()
            rate = self.metadata(self.frames).sampled_fps
            arguments["second_per_grid_ts"] = torch.tensor([self.join / rate])
        found: torch.Tensor = self.engine.model._prepare_position_ids_for_generation(ids, arguments)
        return found

    def text_inputs(self, question: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return those of the processor's outputs that depend on the question; of those called `names`."""
        ids = self.ids(question)
        kinds = (1 if self.as_images else 2) * (ids == self.token_id).int()
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        return {name: value for name, value in made.items() if name in names}

    # -- pixels ---------------------------------------------------------------------------------------------------

    def process(self, frames: np.ndarray[Any, Any], numbers: Sequence[int], seen: int) -> dict[str, torch.Tensor]:
        """Make tensors for the encoder from one window (T, H, W, 3); the first window fixes the shape of a frame."""
        made = self._process(frames, numbers)
        if "video_grid_thw" in made:
            t, h, w = made["video_grid_thw"][0].tolist()
            if self.grid is None:
                self.grid = (-(-len(self.frames) // self.join), h, w)
            elif (h, w) != self.grid[1:]:
                # Some processors give short videos larger frames. The last window is as the others, cut off.
                longer = np.concatenate([frames, np.repeat(frames[-1:], seen - len(frames), axis=0)])
                made = self._process(longer, [*numbers, *[numbers[-1]] * (seen - len(frames))])
                h, w = self.grid[1:]
                made["pixel_values_videos"] = made["pixel_values_videos"][: t * h * w]
                made["video_grid_thw"] = torch.tensor([[t, h, w]])
        else:
            self.pixels = tuple(made["pixel_values_videos"].shape[2:])
            self.steps = len(self.frames)
        model = self.engine.model
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in made.items()
        }

    def whole_steps(
        self, frames: np.ndarray[Any, Any], numbers: Sequence[int]
    ) -> tuple[np.ndarray[Any, Any], list[int]]:
        """Return frames and numbers, the last repeated to fill its step: some processors refuse a single frame."""
        lacking = -len(frames) % self.join
        return np.concatenate([frames, *[frames[-1:]] * lacking]), [*numbers, *[numbers[-1]] * lacking]

    def see(self, made: Mapping[str, torch.Tensor]) -> bool:
        """Note the shape of the video that a processor made of all frames; False if it cannot be told."""
        if "video_grid_thw" in made:
            t, h, w = made["video_grid_thw"][0].tolist()
            self.grid = (t, h, w)
        elif self.as_images:
            self.pixels, self.steps = tuple(made["pixel_values"].shape[1:]), len(self.frames)
        elif "pixel_values_videos" in made:
            self.pixels, self.steps = tuple(made["pixel_values_videos"].shape[2:]), len(self.frames)
        return self.grid is not None or self.steps > 0

    def _process(self, frames: np.ndarray[Any, Any], numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        frames, numbers = self.whole_steps(frames, numbers)
        with processing(self.worker, described(frames)):
            made = self.worker(
                [frames],
                do_sample_frames=False,
                video_metadata=[self.metadata(numbers)],
                return_tensors="pt",
                input_data_format="channels_last",
            )
        return {name: made[name] for name in ("pixel_values_videos", "video_grid_thw") if name in made}

    def encode(self, made: dict[str, torch.Tensor]) -> Any:
        """Return the encoder's output for one window."""
        base = self.engine.adapter.base
        if self.as_images:
            return base.get_image_features(made["pixel_values_videos"].flatten(0, 1), return_dict=True)
        extra = {name: made[name] for name in ("video_grid_thw",) if name in made}
        return base.get_video_features(made["pixel_values_videos"], **extra, return_dict=True)


def _folded(text: str, token: str) -> tuple[str, list[int]]:
    """Return the text with one `token` for every run of them, and the lengths of the runs.

    By splitting: a regular expression notes where it was at every repetition, which takes nine times the text.
    """
    parts = iter(text.split(token))
    kept, lengths, run = [next(parts)], [], 0
    for part in parts:
        run += 1
        if part:
            kept.append(part)
            lengths.append(run)
            run = 0
    if run:
        kept.append("")
        lengths.append(run)
    return token.join(kept), lengths
