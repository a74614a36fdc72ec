"""The plug-in inside vLLM: its answers are those of the library in transformers.

Runs where vLLM is installed; `.ci/run` makes an environment for it. An engine is started once per family.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import gc
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtc
from tests.integrations import vllm_checkpoints
from vtc.integrations.vllm import choosing, tower
from vtc.integrations.vllm.settings import methods, planned

INSTALLED = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed (see docs/serving.md)")

# Read by vLLM when it is imported: one process, which tests can look into, and no more threads than there are cores.
if INSTALLED:
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
    {"vtc_keep_ratio": 0.5},  # merges, by [CLS] attention where there is one
    {"vtc_method": "random", "vtc_keep_tokens": 5, "vtc_seed": 3},
)


@dataclass
class Engine:
    """vLLM and transformers on one checkpoint."""

    family: str
    llm: Any
    model: Any
    processor: Any
    kept: list[list[int]] = field(default_factory=list)

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
            self.kept = [segment.kept.tolist() for segment in report.segments]
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
    # Prompts are read in pieces, most of which end inside a picture or a video.
    arguments = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 40, **arguments}
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        limit_mm_per_prompt=limits,
        seed=0,
        block_size=32,
        skip_mm_profiling=True,
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


def test_what_is_read_of_the_tower_is_what_the_library_reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method that reads layers of the tower keeps the same tokens, and the answers are the same."""
    kept: list[list[int]] = []

    def choose_rows(*args: Any) -> Any:
        found = choosing.choose_rows(*args)
        kept.append(found[0].tolist())
        return found

    monkeypatch.setattr("vtc.integrations.vllm.models.choose_rows", choose_rows)
    adapter = tower.adapter_of(vllm_checkpoints.config_of(engine.family))
    cls = adapter.prefix_tokens("image") > 0
    asked = [{"vtc_method": name} for name in methods(adapter) if reads_tower(name, adapter)]
    assert len(asked) >= (10 if cls else 4)
    asked += [{"vtc_method": name, "vtc_score_source": "received"} for name in ("visionzip", "vispruner")]
    asked += [{"vtc_method": "vtc-cls", "vtc_start_layer": -3, "vtc_score_source": "cls" if cls else "received"}]
    prompts = [
        prompt(engine.family, {**given, "vtc_keep_ratio": 0.4}, [picture(100 + number, 40, 24), picture(200 + number)])
        for number, given in enumerate(asked)
    ]
    answers, expected = engine.ask(prompts), []
    for one, given, answer in zip(prompts, asked, answers, strict=True):
        assert answer == engine.expected(one), given
        expected += engine.kept
    assert sorted(kept) == sorted(expected)


def reads_tower(name: str, adapter: Any) -> bool:
    return tower.reads_tower(planned(vtc.CompressionConfig(name, keep_ratio=0.4), adapter))


def test_videos_are_read_by_the_tower_too(engine: Engine) -> None:
    if engine.family in ("llava", "llava_next"):
        pytest.skip("takes no videos")
    given = {"vtc_method": "visionzip", "vtc_keep_ratio": 0.4, "vtc_score_source": "received"}
    prompts = [prompt(engine.family, given, video=clip(9)), prompt(engine.family, given, [picture(9)], clip(9))]
    assert engine.ask(prompts) == [engine.expected(each) for each in prompts]


def test_settings_that_read_the_tower_and_others_share_a_run(engine: Engine) -> None:
    """Pictures of several requests are encoded at once, each with what its own method reads."""
    given = [
        {"vtc_method": "visionzip", "vtc_keep_ratio": 0.4, "vtc_score_source": "received"},
        {},
        METHODS[0],
        {"vtc_method": "hiprune", "vtc_keep_ratio": 0.25},
    ]
    prompts = [prompt(engine.family, each, [picture(300 + number)]) for number, each in enumerate(given)]
    assert engine.ask(prompts) == [engine.expected(each) for each in prompts]


def test_settings_in_turn_do_not_mix(engine: Engine) -> None:
    """Prefixes and encoded pictures are cached per setting; requests with different settings run side by side."""
    settings = [*METHODS, {}, {"vtc_method": "divprune", "vtc_keep_ratio": 0.5}, {"vtc_keep_ratio": 1.0, "vtc_seed": 2}]
    shown = [picture(7)]
    expected = [engine.expected(prompt(engine.family, each, shown)) for each in settings]
    assert len({length for length, _ in expected}) >= 4
    for order in (range(len(settings)), reversed(range(len(settings)))):  # the second time everything is cached
        numbers = list(order)
        asked = [prompt(engine.family, settings[number], shown) for number in numbers]
        assert engine.ask(asked) == [expected[number] for number in numbers]
        assert [engine.ask([each])[0] for each in asked] == [expected[number] for number in numbers]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vtc_method": "fastv", "vtc_keep_ratio": 0.5}, "fastv cannot run inside vLLM: it works at 'decoder:2'"),
        ({"vtc_method": "divprun", "vtc_keep_ratio": 0.5}, "Did you mean 'divprune'"),
        ({"vtc_keep_ratio": 0}, r"must lie in \(0, 1\]"),
        ({"vtc_method": "divprune"}, "exactly one of keep_ratio and keep_tokens"),
        ({"vtc_keep_ratio": 0.5, "vtc_positions": "compact"}, "vtc_positions cannot be chosen"),
        ({"vtc_keep_ratio": 0.5, "vtc_resolved": "null"}, "no option 'resolved'"),
    ],
)
def test_wrong_settings_of_a_request_are_errors_of_the_client(
    engine: Engine, settings: dict[str, Any], message: str
) -> None:
    if engine.family != "llava":
        pytest.skip("the same for every family")
    from vllm.exceptions import VLLMClientError

    with pytest.raises(vtc.errors.VtcError, match=message) as caught:
        engine.ask([prompt(engine.family, settings, [picture(0)])])
    assert isinstance(caught.value, VLLMClientError)
    good = prompt(engine.family, METHODS[0], [picture(0)])
    assert engine.ask([good]) == [engine.expected(good)]


def test_the_pruning_of_vllm_itself_works_on_cpus(tmp_path: Path) -> None:
    """vLLM's runner on CPUs fails on it without the plug-in; settings of vtc are then refused."""
    mine = start("qwen2_5_vl", tmp_path, video_pruning_rate=0.5)
    try:
        video, image = prompt("qwen2_5_vl", {}, video=clip(4)), prompt("qwen2_5_vl", {}, [picture(0)])
        (length, answer), shown = mine.ask([video, image])
        assert (length, len(answer)) == (mine.expected(video)[0] - 32, NEW)
        assert shown == mine.expected(image)
        with pytest.raises(vtc.errors.VtcError, match="--video-pruning-rate"):
            mine.ask([prompt("qwen2_5_vl", METHODS[0], [picture(0)])])
    finally:
        stop(mine)


def test_an_older_vllm_is_refused_where_there_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.multimodal.processing import BaseMultiModalProcessor

    from vtc.integrations.vllm.plugin import register

    register()
    monkeypatch.delattr(BaseMultiModalProcessor, "get_dummy_inputs")
    register()
    monkeypatch.setenv("VTC_KEEP_RATIO", "0.5")
    with pytest.raises(vtc.errors.StateError, match=r"0\.32 and newer; this is"):
        register()


def test_a_cls_token_among_the_patches_is_counted_on_both_sides() -> None:
    from vtc.integrations.vllm import models

    for rows, prefix in ((16, 0), (17, 1), (15, 0), (576, 0), (577, 1)):
        (visual,) = models.VtcLlava.vtc_visuals(None, "image", torch.zeros(rows, 4), 0, {})
        assert visual.structural is not None
        assert int(visual.structural.sum()) == prefix
        assert models.LlavaProcessor.vtc_structural(None, rows, "image", None, 0) == prefix
        assert sum(t * h * w for t, h, w in visual.grids) == rows - prefix


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_checkpoints.write("llava", tmp_path_factory.mktemp("refused"))


def create_processor(folder: Path, **arguments: Any) -> Any:
    """Make what vLLM makes first when it starts."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    given = {"model": str(folder), "dtype": "float32", "max_model_len": 256, **arguments}
    return MULTIMODAL_REGISTRY.create_processor(EngineArgs(**given).create_model_config())


@pytest.mark.parametrize(
    ("environ", "arguments", "message"),
    [
        ({"VTC_METHOD": "prumerge", "VTC_KEEP_RATIO": "0.5"}, {}, "prumerge cannot run inside vLLM: it decides itself"),
        ({"VTC_METHOD": "vscan", "VTC_KEEP_RATIO": "0.5"}, {}, "vscan cannot run inside vLLM: it works at 'decoder:"),
        ({"VTC_KEEP_RATIO": "a half"}, {}, "VTC_KEEP_RATIO must be a number"),
        ({}, {"mm_processor_kwargs": {"vtc_keep_ratio": 2}}, r"must lie in \(0, 1\], got 2"),
        ({"VTC_KEEP_RATIO": "0.5"}, {"video_pruning_rate": 0.5}, "--video-pruning-rate is vLLM's own pruning"),
        # Another class for the same architecture.
        ({"VTC_KEEP_RATIO": "0.5"}, {"model_impl": "transformers"}, "vtc does not compress TransformersMultiModal"),
        ({}, {"mm_processor_kwargs": {"vtc_keep_ratio": 0.5}, "model_impl": "transformers"}, "vtc does not compress"),
    ],
)
def test_what_cannot_be_done_does_not_start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    arguments: dict[str, Any],
    message: str,
) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert "vtc_server" in vars(create_processor(folder))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(vtc.errors.VtcError, match=message):
        create_processor(folder, **arguments)


def test_a_process_that_sees_a_part_of_the_pictures_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM itself ignores the mode for LLaVA."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    folder = vllm_checkpoints.write("qwen2_5_vl", tmp_path)
    monkeypatch.setenv("VTC_METHOD", "hiprune")
    monkeypatch.setenv("VTC_KEEP_RATIO", "0.5")
    create_processor(folder)
    with pytest.raises(vtc.errors.VtcError, match=r"hiprune reads the layers .* --mm-encoder-tp-mode data hides"):
        create_processor(folder, mm_encoder_tp_mode="data")


@pytest.mark.parametrize(
    ("environ", "server", "request_", "kept"),
    [
        ({}, {}, {}, 16),
        ({"VTC_KEEP_TOKENS": "9"}, {}, {}, 9),
        ({"VTC_KEEP_TOKENS": "9"}, {"vtc_keep_ratio": 0.25}, {}, 4),
        ({"VTC_METHOD": "divprune"}, {"vtc_keep_ratio": 0.25}, {"vtc_keep_tokens": 7}, 7),
        ({}, {"vtc_keep_ratio": 0.25}, {"vtc_keep_ratio": 1.0}, 16),
        ({}, {}, {"vtc_keep_ratio": 0.5}, 8),
    ],
)
def test_requests_go_before_the_server_and_the_server_before_the_environment(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    server: dict[str, Any],
    request_: dict[str, Any],
    kept: int,
) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    processor = create_processor(folder, mm_processor_kwargs=server)
    items = processor.info.parse_mm_data({"image": picture(0)})
    made = processor("<s> <image> what", items, hf_processor_mm_kwargs=request_)
    assert made["prompt_token_ids"].count(vllm_checkpoints.IMAGE_ID) == kept
    assert made["mm_placeholders"]["image"][0].length == kept
    again = processor("<s> <image> what", items, hf_processor_mm_kwargs={"vtc_keep_tokens": 3})
    assert made["mm_hashes"] != again["mm_hashes"]


# ---------------------------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vtc serve` on a free port of this machine; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    further = (
        f"--host 127.0.0.1 --port {port} --served-model-name m --dtype float32 --enforce-eager --max-model-len 256"
    )
    further += " --max-num-seqs 4 --max-num-batched-tokens 256 --skip-mm-profiling --trust-request-mm-kwargs"
    command = [sys.executable, "-m", "vtc.cli", "serve", str(folder), "--method", "divprune", "--keep-ratio", "0.25"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, f"--vllm={further}"], stdout=out, stderr=out, start_new_session=True, env=dict(os.environ)
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        assert "VTC_METHOD=divprune VTC_KEEP_RATIO=0.25" in log.read_text()
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def post(address: str, image: bytes, **fields: Any) -> tuple[int, dict[str, Any]]:
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(image).decode()}},
        {"type": "text", "text": "what happens in the clip ?"},
    ]
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        "temperature": 0,
    } | fields
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_server_compresses_and_survives_mistakes(server: str) -> None:
    status, answer = post(server, png())
    assert status == 200, answer
    quarter = answer["usage"]["prompt_tokens"]
    status, answer = post(server, png(), mm_processor_kwargs={"vtc_keep_ratio": 1.0})
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == quarter + 12
    for settings, words in (
        ({"vtc_method": "fastv"}, "fastv cannot run inside vLLM"),
        ({"vtc_keep_ratio": 7}, "must lie in (0, 1], got 7"),
        ({"vtc_method": "divprun"}, "Did you mean 'divprune'"),
    ):
        status, answer = post(server, png(), mm_processor_kwargs=settings)
        assert 400 <= status < 500, answer
        assert words in answer["error"]["message"]
    status, answer = post(server, png()[:80])
    assert 400 <= status < 500, answer
    settings = [{"vtc_keep_tokens": count} for count in (1, 2, 4, 8, 16)] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: post(server, png(1), mm_processor_kwargs=each), settings))
    counts = [answer["usage"]["prompt_tokens"] - quarter + 4 for _, answer in answers]
    assert counts == [each["vtc_keep_tokens"] for each in settings]
