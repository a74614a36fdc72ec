"""The parts of `eval.serving` that need no vLLM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from eval import serving
from eval.tasks.base import Sample
from eval.tasks.generated import ClipsTask


@dataclass(frozen=True)
class Processor:
    chat_template: str = "there is one"

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        (turn,) = messages
        return " ".join(part.get("text", f"<{part['type']}>") for part in turn["content"])


def test_clips_are_asked_about_as_vllm_takes_them() -> None:
    clip = serving.noise(3)
    made = serving.clip_prompt(Processor(), Sample("a", "Which moves?"), clip, {"method": "evs", "keep_ratio": 0.5})
    assert made["prompt"] == "<video> Which moves?"
    assert made["mm_processor_kwargs"] == {"vtc_method": "evs", "vtc_keep_ratio": 0.5}
    frames, metadata = made["multi_modal_data"]["video"]
    assert frames.shape == (serving.FRAMES, serving.SIDE, serving.SIDE, 3)
    assert metadata["total_num_frames"] == len(metadata["frames_indices"]) == serving.FRAMES
    assert metadata["duration"] * metadata["fps"] == serving.FRAMES
    assert not metadata["do_sample_frames"]
    made = serving.picture_prompt(Processor(), Sample("a", "What?"), "a picture", {})
    assert (made["prompt"], made["multi_modal_data"]) == ("<image> What?", {"image": "a picture"})
    assert made["mm_processor_kwargs"] == {}


def test_noise_is_drawn_by_its_seed_and_half_of_it_moves() -> None:
    one, again, other = (serving.noise(seed).frames for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    half = serving.SIDE // 2
    assert (one[1:, half:] == one[:-1, half:]).all()
    assert (one[1:, :half] != one[:-1, :half]).any(axis=(1, 2, 3)).all()


def test_answers_are_scored_and_compared_by_clip() -> None:
    task = ClipsTask(pictures=3, per_picture=2)
    samples = list(task.samples(None))
    right = [str(sample.target) for sample in samples]
    wrong = ["nothing", *right[1:]]
    assert serving.scores(task, samples, right) == [1.0] * len(samples)
    assert serving.scores(task, samples, wrong) == [0.0] + [1.0] * (len(samples) - 1)
    same = serving.compared(task, samples, right, right)
    assert (same["vllm"], same["transformers"], same["agreement"], same["difference"]) == (1.0, 1.0, 1.0, 0.0)
    worse = serving.compared(task, samples, wrong, right)
    assert worse["vllm"] == worse["agreement"] == pytest.approx(1 - 1 / len(samples))
    assert worse["difference"] == pytest.approx(-1 / len(samples))
    low, high = worse["interval"]
    assert low <= worse["vllm"] <= high
    with pytest.raises(ValueError, match="shorter"):
        serving.scores(task, samples, right[1:])


def test_load_times_first_tokens_one_by_one_and_the_rest_at_once() -> None:
    """Against a clock that a request of `new` tokens moves by 0.5 s and 0.1 s per token."""
    now, asked = [0.0], []
    numbers = itertools.count()

    def ask(prompts: list[dict[str, Any]], new: int) -> tuple[list[str], list[int]]:
        asked.append(([prompt["number"] for prompt in prompts], new))
        now[0] += 0.5 + 0.1 * new
        return ["yes"] * len(prompts), [100] * len(prompts)

    made = serving.load(ask, lambda: [{"number": next(numbers)} for _ in range(4)], 2, lambda: now[0])
    assert made["prompt_tokens"] == 100
    assert made["first_token"] == pytest.approx([0.6] * 3)
    assert made["requests_per_second"] == pytest.approx([4 / 2.1] * 3)
    assert [new for _, new in asked] == [1, 1, 1, 1, 16] * 2
    shown = [number for numbers, _ in asked for number in numbers]
    assert len(set(shown)) == len(shown) == 16  # nothing is found in a cache


def test_what_vllm_drops_itself_is_what_the_settings_drop() -> None:
    assert {setting.get("keep_ratio", 0.25) for setting in serving.CLIP_SETTINGS} == {
        1 - serving.OWN["video_pruning_rate"]
    }
