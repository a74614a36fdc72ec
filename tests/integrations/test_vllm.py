"""The plug-in inside vLLM: its answers are those of the library in transformers.

Runs where vLLM is installed; `.ci/run` makes an environment for it. An engine is started once per family.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtc
from tests.integrations import vllm_checkpoints

INSTALLED = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed (see docs/serving.md)")

# Read by vLLM when it is imported: one process, which tests can look into, and no more threads than there are cores.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

NEW = 8
"""Tokens of an answer."""

IMAGE = {"llava": "<image>", "llava_next": "<image>", "llava_onevision": "<image>", "internvl": "<IMG_CONTEXT>"}
VISION = "<|vision_start|><|{}_pad|><|vision_end|>"
COMPACT = ("llava", "llava_next", "llava_onevision", "internvl")
"""Families with positions on a line, which vLLM counts over what is left."""

METHODS = (
    {"vtc_method": "divprune", "vtc_keep_ratio": 0.25},
    {"vtc_keep_ratio": 0.5, "vtc_quality": "none"},  # merges
    {"vtc_method": "random", "vtc_keep_tokens": 5, "vtc_seed": 3},
)


@dataclass
class Engine:
    """vLLM and transformers on one checkpoint."""

    family: str
    llm: Any
    model: Any
    processor: Any

    def ask(self, prompts: Sequence[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """Prompt tokens and answers of vLLM, asked for at once."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        outputs = self.llm.generate(list(prompts), greedy, use_tqdm=False)
        return [(len(each.prompt_token_ids), list(each.outputs[0].token_ids)) for each in outputs]

    def expected(self, prompt: dict[str, Any]) -> tuple[int, list[int]]:
        """The same of the library in transformers."""
        data = prompt["multi_modal_data"]
        images = data.get("image")
        videos = data.get("video")
        given: dict[str, Any] = {} if images is None else {"images": images}
        if videos is not None:
            frames, metadata = videos
            metadata = {name: value for name, value in metadata.items() if name != "do_sample_frames"}
            given |= {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
        inputs = self.processor(text=prompt["prompt"], return_tensors="pt", **given)
        options = {name.removeprefix("vtc_"): value for name, value in prompt["mm_processor_kwargs"].items()}
        if not options:
            return self._generate(inputs), self._answer
        options["positions"] = "compact" if self.family in COMPACT else "original"
        with vtc.compressed(self.model, options.pop("method", "vtc"), **options):
            self._generate(inputs)
            report = vtc.report(self.model)
            left = report.visual_tokens_before - round(report.average_visual_tokens)
            return inputs["input_ids"].shape[1] - left, self._answer

    def _generate(self, inputs: Any) -> int:
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        self._answer = output[0, length:].tolist()
        return length


def start(family: str, folder: Path, **arguments: Any) -> Engine:
    import transformers
    from vllm import LLM

    vllm_checkpoints.write(family, folder)
    limits = {"image": 2, "video": 0 if family in ("llava", "llava_next") else 1}
    arguments = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, **arguments}
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        limit_mm_per_prompt=limits,
        seed=0,
        block_size=32,
        **arguments,
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return Engine(family, llm, model, transformers.AutoProcessor.from_pretrained(folder))


def stop(engine: Engine) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm.llm_engine.engine_core.shutdown()
    del engine.llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=vllm_checkpoints.FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    started = start(request.param, tmp_path_factory.mktemp(request.param))
    yield started
    stop(started)


def picture(seed: int, width: int = 32, height: int = 32) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def clip(seed: int, frames: int = 8) -> tuple[np.ndarray, dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
    metadata = {
        "fps": 2.0,
        "total_num_frames": frames,
        "duration": frames / 2.0,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return pixels, metadata


def prompt(family: str, settings: dict[str, Any], images: Sequence[Any] = (), video: Any = None) -> dict[str, Any]:
    marks = [IMAGE.get(family, VISION.format("image"))] * len(images)
    data: dict[str, Any] = {"image": list(images)} if images else {}
    if video is not None:
        marks.append("<video>" if family in COMPACT else VISION.format("video"))
        data["video"] = video
    shown = " a ".join(marks)
    text = f"<s> describe {shown} what happens in the clip ?"
    return {"prompt": text, "multi_modal_data": data, "mm_processor_kwargs": settings}


@pytest.mark.parametrize("settings", METHODS, ids=lambda each: each.get("vtc_method", "vtc"))
def test_answers_are_those_of_the_library(engine: Engine, settings: dict[str, Any]) -> None:
    images = [picture(0), picture(1, 40, 24)]
    prompts = [prompt(engine.family, settings, images[:1]), prompt(engine.family, settings, images)]
    full = [prompt(engine.family, {}, images[:1]), prompt(engine.family, {}, images)]
    for asked in (prompts, full):
        assert engine.ask(asked) == [engine.expected(each) for each in asked]
    assert engine.ask(prompts[:1])[0][0] < engine.ask(full[:1])[0][0]


@pytest.mark.parametrize(
    "settings",
    [*METHODS, {"vtc_method": "evs", "vtc_keep_ratio": 0.5}, {"vtc_method": "vidcom2", "vtc_keep_ratio": 0.5}],
    ids=lambda each: each.get("vtc_method", "vtc"),
)
def test_answers_about_videos_are_those_of_the_library(engine: Engine, settings: dict[str, Any]) -> None:
    if engine.family in ("llava", "llava_next"):
        pytest.skip("takes no videos")
    prompts = [prompt(engine.family, settings, video=clip(4)), prompt(engine.family, settings, [picture(0)], clip(4))]
    full = [prompt(engine.family, {}, video=clip(4))]
    for asked in (prompts, full):
        assert engine.ask(asked) == [engine.expected(each) for each in asked]
