"""Answers of the reference Qwen2.5-VL inside vLLM beside those of transformers, on the same questions.

    python -m eval.serving --pictures 20 --json FILE

runs in an environment with vLLM (docs/serving.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import vtc
from eval.statistics import interval, paired
from eval.tasks.generated import ScenesTask
from vtc.chat import chat, image_inputs
from vtc.files import write_text

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"method": "divprune", "keep_ratio": 0.25},
    {"method": "vtc", "keep_ratio": 0.25},
)
NEW = 6


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20, help="pictures, with up to ten questions each (20)")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--write-larger", type=Path, metavar="FOLDER", help="only write a model for vtc bench serve")
    args = parser.parse_args()
    if args.write_larger is not None:
        return write_larger(args.write_larger)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    task = ScenesTask(pictures=args.pictures)
    samples = list(task.samples(None))
    shown = [sample.images[0]() for sample in samples]
    result: dict[str, Any] = {"questions": len(samples), "settings": []}
    with tempfile.TemporaryDirectory() as folder:
        import vtc_reference

        vtc_reference.export("qwen2_5_vl", folder)
        model, processor = vtc.reference.load("qwen2_5_vl")
        inside, seconds, versions = _inside_vllm(folder, processor, samples, shown)
    for setting, found in zip(SETTINGS, inside, strict=True):
        expected = _in_transformers(model, processor, setting, samples, shown)
        right = [
            [task.score(sample, answer)["exact"] for sample, answer in zip(samples, answers, strict=True)]
            for answers in (found, expected)
        ]
        groups = [sample.group for sample in samples]
        difference, between, _ = paired(right[1], right[0], groups)
        entry = {
            "setting": setting,
            "vllm": sum(right[0]) / len(samples),
            "transformers": sum(right[1]) / len(samples),
            "interval": interval(right[0], groups),
            "difference": difference,
            "difference_interval": between,
            "agreement": sum(a == b for a, b in zip(found, expected, strict=True)) / len(samples),
        }
        print(entry)
        result["settings"].append(entry)
    result |= {"versions": versions, "machine": platform.machine(), "seconds": seconds}
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    return None


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


def _inside_vllm(
    folder: str, processor: Any, samples: list[Any], shown: list[Any]
) -> tuple[list[list[str]], float, dict[str, str]]:
    import torch
    import transformers
    import vllm

    llm = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1, "video": 0},
        skip_mm_profiling=True,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW)
    began, answers = time.perf_counter(), []
    for setting in SETTINGS:
        prompts = [
            {
                "prompt": chat(processor, ["image"], sample.question),
                "multi_modal_data": {"image": image},
                "mm_processor_kwargs": {f"vtc_{name}": value for name, value in setting.items()},
            }
            for sample, image in zip(samples, shown, strict=True)
        ]
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        answers.append([output.outputs[0].text.strip() for output in outputs])
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return answers, time.perf_counter() - began, versions


def _in_transformers(
    model: Any, processor: Any, setting: dict[str, Any], samples: list[Any], shown: list[Any]
) -> list[str]:
    import torch

    found = []
    with vtc.compressed(model, **(setting or {"method": "uniform", "keep_ratio": 1.0})), torch.inference_mode():
        for sample, image in zip(samples, shown, strict=True):
            inputs = image_inputs(processor, [image], sample.question)
            output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
            found.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


if __name__ == "__main__":
    main()
