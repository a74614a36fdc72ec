"""Peak memory against the length of a video, streamed in windows and all at once.

    python -m tests.video.measure_memory [--seconds 60 300 900 3600] [--whole 60 300]

Each row is a process of its own, so that its peak (the highest resident set that the kernel saw) is its own too. The
second figure is with glibc's allocator set to return large blocks (`FIXED`): by itself it raises the size above
which it does so as blocks are freed, and keeps what was freed for later. The model is a LLaVA-OneVision with random
weights and 196 tokens per frame: memory is what is measured, and only how it grows says something about real models. A
file of one frame per second is written for every length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDE, PATCH = 112, 4
KEEP, WINDOW = 2048, 32
FIXED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def model_and_processor() -> tuple[Any, Any]:
    import torch
    import transformers

    from tests import tiny, tiny_processors

    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**tiny._tower(vision_use_head=False, image_size=SIDE, patch_size=PATCH))
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**tiny._text(max_position_embeddings=2**20)),
        image_grid_pinpoints=[[SIDE, SIDE]],
        **tiny._BOTH_PLACEHOLDERS,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tiny.PAD
    square = {"height": SIDE, "width": SIDE}
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[SIDE, SIDE]]),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=square),
        tokenizer=tiny_processors.tokenizer(),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tiny_processors.template("<image>", "<video>"),
    )
    return model, processor


def write(path: Path, seconds: int) -> None:
    """A square that wanders over noise, one frame per second; frames are made one by one."""
    import av
    import numpy as np

    noise = np.random.default_rng(0).integers(90, 150, (SIDE, SIDE, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.gop_size = "yuv420p", 12
        for second in range(seconds):
            frame = noise.copy()
            x, y = 5 * second % (SIDE - 20), 3 * second % (SIDE - 20)
            frame[y : y + 20, x : x + 20] = (220, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def measure(path: Path, window: int, method: str) -> dict[str, Any]:
    """In this process."""
    import vtc

    model, processor = model_and_processor()
    pipe = vtc.VideoQAPipeline(
        model, processor, method, keep_tokens=KEEP, fps=1.0, window=window, max_new_tokens=4, decoder="av"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    answer = pipe(path, "what happens in the clip ?")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "frames": len(answer.times),
        "raw_tokens": sum(raw for _, raw, _ in answer.windows),
        "kept": sum(kept for _, _, kept in answer.windows),
        "windows": len(answer.windows),
        "before_mib": before / 1024,
        "peak_mib": peak / 1024,
        "grown_mib": (peak - before) / 1024,
        "seconds": time.perf_counter() - began,
        **{name: round(value, 2) for name, value in answer.timings.items()},
    }


def _row(command: list[str], extra: dict[str, str]) -> dict[str, Any]:
    made = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **extra})
    row: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 300, 900, 3600])
    parser.add_argument("--whole", type=int, nargs="*", default=[60, 300], help="lengths read in one window as well")
    parser.add_argument("--method", default="evs")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), int(args.one[1]), args.method)))
        return
    import torch
    import transformers

    print(
        f"{args.method}, keep_tokens={KEEP}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} thread(s)"
    )
    print("| length | window | raw tokens | kept | peak above the loaded model, MiB | thresholds fixed | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for seconds in args.seconds:
            path = Path(folder) / f"{seconds}.mp4"
            write(path, seconds)
            for window in [WINDOW, *([seconds] if seconds in args.whole else [])]:
                command = [
                    sys.executable,
                    "-m",
                    __spec__.name,
                    "--method",
                    args.method,
                    "--one",
                    str(path),
                    str(window),
                ]
                plain, row = (_row(command, extra) for extra in ({}, FIXED))
                print(
                    f"| {seconds} s | {window} | {row['raw_tokens']:,} | {row['kept']:,} | {plain['grown_mib']:.0f} | "
                    f"{row['grown_mib']:.0f} | {plain['seconds']:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
