"""vLLM with the plug-in: answers of reference models beside those of transformers, and beside vLLM's own EVS.

    python -m eval.serving [--model internvl] --pictures 20 --json FILE
    python -m eval.serving --clips 32 --json FILE
    python -m eval.serving --write-larger FOLDER
    python -m eval.serving --clip-speed FOLDER --json FILE

run in an environment with vLLM (docs/serving.md). The first compares answers about pictures with transformers. The
second asks about clips, compressed by methods of this library and by vLLM itself (``--video-pruning-rate``); the last
measures the same on clips of noise, with the model that the third has written.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import vtc
from eval.statistics import interval, paired
from eval.tasks.base import Sample, Task
from eval.tasks.generated import ClipsTask, ScenesTask
from eval.tasks.video import Frames
from vtc.chat import chat, image_inputs
from vtc.files import write_text

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"method": "divprune", "keep_ratio": 0.25},
    {"method": "vtc", "keep_ratio": 0.25},
)
ASKED = {
    "qwen2_5_vl": (SETTINGS, "original"),
    "internvl": ((*SETTINGS, *({"method": each, "keep_ratio": 0.25} for each in ("vtc-cls", "visionzip"))), "compact"),
}
"""Reference models with what is asked of each, and the positions of kept tokens: InternVL has a [CLS] token."""
CLIP_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    *({"method": method, "keep_ratio": 0.25} for method in ("evs", "vidcom2", "divprune", "vtc")),
)
OWN = {"video_pruning_rate": 0.75}
"""Arguments of vLLM that drop what the settings above drop."""

NEW = 6
FRAMES, SIDE = 32, 112
"""Of the clips of noise that speed is measured with: 1,024 tokens."""


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=("qwen2_5_vl", "internvl"), default="qwen2_5_vl", help="asked about pictures"
    )
    parser.add_argument("--pictures", type=int, default=20, help="pictures, with up to ten questions each (20)")
    parser.add_argument("--clips", type=int, help="ask about so many clips, up to seven questions each, instead")
    parser.add_argument(
        "--clip-speed", type=Path, metavar="FOLDER", help="measure this model on clips of noise instead"
    )
    parser.add_argument("--requests", type=int, default=8, help="of the latter, per setting and repetition (8)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count its seconds of CPU time, on a machine that is busy"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--write-larger", type=Path, metavar="FOLDER", help="only write a model to measure")
    args = parser.parse_args()
    if args.write_larger is not None:
        return write_larger(args.write_larger)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if args.clip_speed is not None:
        clock = time.process_time if args.cpu_time else time.perf_counter
        result = clip_speed(args.clip_speed, args.requests, clock) | {"clock": clock.__name__}
    elif args.clips is not None:
        result = clip_answers(args.clips)
    else:
        result = picture_answers(args.model, args.pictures)
    result |= {"versions": _versions(), "machine": platform.machine()}
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    return None


# ------------------------------------------------------------------------------------------------------------- answers


def picture_answers(name: str, pictures: int) -> dict[str, Any]:
    """Compare answers of a reference model about pictures with those of transformers."""
    settings, positions = ASKED[name]
    task = ScenesTask(pictures=pictures)
    samples = list(task.samples(None))
    shown = [sample.images[0]() for sample in samples]
    pairs = list(zip(samples, shown, strict=True))
    with _reference(name) as (folder, model, processor), _engine(folder, {"image": 1, "video": 0}) as llm:
        began = time.perf_counter()
        inside = [
            _answers(llm, [picture_prompt(processor, *pair, setting) for pair in pairs])[0] for setting in settings
        ]
        seconds = time.perf_counter() - began
        result: dict[str, Any] = {"model": name, "questions": len(samples), "seconds": seconds, "settings": []}
        for setting, found in zip(settings, inside, strict=True):
            expected = _in_transformers(
                model, processor, setting and {**setting, "positions": positions}, samples, shown
            )
            entry = {"setting": setting, **compared(task, samples, found, expected)}
            print(entry)
            result["settings"].append(entry)
    return result


def clip_answers(clips: int) -> dict[str, Any]:
    """Score answers about clips, with every setting and with vLLM's own pruning."""
    task = ClipsTask(pictures=clips)
    samples = list(task.samples(None))
    shown = [sample.video() for sample in samples if sample.video is not None]
    groups = [sample.group for sample in samples]
    result: dict[str, Any] = {"questions": len(samples), "settings": []}
    whole: list[float] | None = None
    with _reference() as (folder, _, processor):
        for arguments, settings in (({}, CLIP_SETTINGS), (OWN, ({},))):
            with _engine(folder, {"image": 0, "video": 1}, **arguments) as llm:
                for setting in settings:
                    pairs = zip(samples, shown, strict=True)
                    answers, lengths = _answers(llm, [clip_prompt(processor, *pair, setting) for pair in pairs])
                    right = scores(task, samples, answers)
                    entry = {
                        "setting": setting or arguments,
                        "accuracy": statistics.fmean(right),
                        "interval": interval(right, groups),
                        "prompt_tokens": statistics.fmean(lengths),
                    }
                    if whole is None:
                        whole = right
                    else:
                        entry["difference"], entry["difference_interval"], _ = paired(whole, right, groups)
                    print(entry)
                    result["settings"].append(entry)
    return result


def scores(task: Task, samples: Sequence[Sample], answers: Sequence[str]) -> list[float]:
    """Return 1 for every right answer and 0 for every other."""
    return [task.score(sample, answer)["exact"] for sample, answer in zip(samples, answers, strict=True)]


def compared(task: Task, samples: Sequence[Sample], inside: Sequence[str], expected: Sequence[str]) -> dict[str, Any]:
    """Compare answers of vLLM with those of transformers: accuracies, their difference, and how many are the same."""
    groups = [sample.group for sample in samples]
    right = [scores(task, samples, answers) for answers in (inside, expected)]
    difference, between, _ = paired(right[1], right[0], groups)
    return {
        "vllm": statistics.fmean(right[0]),
        "transformers": statistics.fmean(right[1]),
        "interval": interval(right[0], groups),
        "difference": difference,
        "difference_interval": between,
        "agreement": statistics.fmean(a == b for a, b in zip(inside, expected, strict=True)),
    }


# --------------------------------------------------------------------------------------------------------------- speed


def clip_speed(folder: Path, requests: int, clock: Callable[[], float], repetitions: int = 3) -> dict[str, Any]:
    """Measure the first token of single requests, and many requests at once, on clips of noise, each shown once."""
    import transformers

    processor = transformers.AutoProcessor.from_pretrained(folder)
    result: dict[str, Any] = {"requests": requests, "repetitions": repetitions, "settings": []}
    seeds = itertools.count()

    def prompts(setting: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        sample = Sample("noise", "What happens in the clip?")
        return [clip_prompt(processor, sample, noise(next(seeds)), setting) for _ in range(count)]

    for arguments, settings in (({}, CLIP_SETTINGS), (OWN, ({},))):
        given = {"dtype": "bfloat16", "max_model_len": 2048, "enable_prefix_caching": False, **arguments}
        with _engine(str(folder), {"image": 0, "video": 1}, **given) as llm:
            for setting in settings:
                _answers(llm, prompts(setting, 1))  # the first request fills what is filled once
            for setting in settings:
                ask, make = functools.partial(_answers, llm), functools.partial(prompts, setting, requests)
                entry = {"setting": setting or arguments, **load(ask, make, repetitions, clock)}
                print(entry)
                result["settings"].append(entry)
    return result


def load(
    ask: Callable[[list[dict[str, Any]], int], tuple[list[str], list[int]]],
    prompts: Callable[[], list[dict[str, Any]]],
    repetitions: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Time requests one by one up to their first token, and then as many at once.

    Parameters
    ----------
    ask
        Given prompts and a number of new tokens, returns answers and lengths of prompts.
    prompts
        Makes new ones.
    repetitions
        Of both.
    clock
        In seconds.

    Returns
    -------
    dict
        Tokens of a prompt; medians with least and most of the seconds to the first token, and of requests per second.
    """
    first, rates, lengths = [], [], []
    for _ in range(repetitions):
        seconds = []
        for prompt in prompts():
            began = clock()
            lengths += ask([prompt], 1)[1]
            seconds.append(clock() - began)
        first.append(statistics.median(seconds))
        asked = prompts()
        began = clock()
        ask(asked, 16)
        rates.append(len(asked) / (clock() - began))
    return {
        "prompt_tokens": statistics.fmean(lengths),
        "first_token": [statistics.median(first), min(first), max(first)],
        "requests_per_second": [statistics.median(rates), min(rates), max(rates)],
    }


def noise(seed: int) -> Frames:
    """Draw a clip of coarse noise in which a part of the picture moves."""
    rng = np.random.default_rng(seed)
    coarse = np.repeat(rng.integers(0, 255, (1, 8, 8, 3), dtype=np.uint8), FRAMES, axis=0)
    coarse[:, :4] = rng.integers(0, 255, (FRAMES, 4, 8, 3), dtype=np.uint8)
    frames = coarse.repeat(SIDE // 8, axis=1).repeat(SIDE // 8, axis=2)
    return Frames(frames, tuple(range(FRAMES)), 2.0, FRAMES)


# ------------------------------------------------------------------------------------------------------- what is asked


def picture_prompt(processor: Any, sample: Sample, image: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return a question about a picture as vLLM takes it."""
    return _prompt(processor, "image", sample, image, setting)


def clip_prompt(processor: Any, sample: Sample, clip: Frames, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Return a question about a clip, of which all frames are shown, as vLLM takes it."""
    metadata = {
        "fps": clip.fps,
        "total_num_frames": clip.total,
        "duration": clip.total / clip.fps,
        "frames_indices": list(clip.indices),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return _prompt(processor, "video", sample, (clip.frames, metadata), setting)


def _prompt(processor: Any, kind: str, sample: Sample, shown: Any, setting: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": chat(processor, [kind], sample.question),
        "multi_modal_data": {kind: shown},
        "mm_processor_kwargs": {f"vtc_{name}": value for name, value in setting.items()},
    }


def write_larger(folder: Path) -> None:
    """Write a checkpoint of random weights with a decoder that costs something: 12 layers, 768 wide."""
    import torch
    import transformers

    model, processor = vtc.reference.load("qwen2_5_vl")
    config = model.config
    config.vision_config.out_hidden_size = 768
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    for name, value in (sizes | {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 12}).items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


@contextmanager
def _reference(name: str = "qwen2_5_vl") -> Iterator[tuple[str, Any, Any]]:
    """Write a reference model to a folder, and load it in transformers as well."""
    model, processor = vtc.reference.load(name)
    if name == "internvl":
        _without_last_layer(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        yield folder, model, processor


def _without_last_layer(model: Any) -> None:
    """Leave out the layer of InternVL's tower whose output is not used, which vLLM (0.32) would use.

    The model computes what it did: its features are those of the last layer but one, without the norm behind the last.
    """
    import torch

    tower = model.model.vision_tower
    del tower.encoder.layer[-1]
    tower.layernorm = torch.nn.Identity()
    model.config.vision_feature_layer = -1
    model.config.vision_config.num_hidden_layers -= 1
    model.config.vision_config.use_mean_pooling = True


@contextmanager
def _engine(folder: str, limits: Mapping[str, int], **arguments: Any) -> Iterator[Any]:
    """Start vLLM; several engines follow each other in one process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "skip_mm_profiling": True, **arguments}
    llm = LLM(folder, enforce_eager=True, limit_mm_per_prompt=dict(limits), **given)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _answers(llm: Any, prompts: list[dict[str, Any]], new: int = NEW) -> tuple[list[str], list[int]]:
    """Ask for all answers at once; return them, and the lengths of the prompts."""
    from vllm import SamplingParams

    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new), use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs], [len(output.prompt_token_ids) for output in outputs]


def _versions() -> dict[str, str]:
    import torch
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _in_transformers(
    model: Any, processor: Any, setting: dict[str, Any], samples: list[Any], shown: list[Any]
) -> list[str]:
    import torch

    found = []
    with vtc.compressed(model, **({"method": "uniform", "keep_ratio": 1.0} | setting)), torch.inference_mode():
        for sample, image in zip(samples, shown, strict=True):
            inputs = image_inputs(processor, [image], sample.question)
            output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            found.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


if __name__ == "__main__":
    main()
