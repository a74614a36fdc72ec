"""Several questions about one video, with what was kept of it as a moving picture.

    python demos/video_qa.py --model /path/to/checkpoint clip.mp4 "What happens?" "And after that?"
    python demos/video_qa.py --random-weights                        # shows the mechanism; the answers mean nothing

Without a file, a ball is drawn that rolls past a box.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import vtc
import vtc.reference
from vtc.console import finish
from vtc.files import check_writable
from vtc.report.visualize import animation, save_animation
from vtc.video import VideoFile

QUESTIONS = ("What happens in the clip?", "What is in the middle?")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, nargs="?")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint that takes videos")
    parser.add_argument("--random-weights", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--method", default="vtc")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("-o", "--output", type=Path, default=Path("kept.gif"))
    args = parser.parse_args(argv)

    check_writable(args.output)
    model, processor = load(args.model, args.random_weights)
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or rolling_ball(Path(folder) / "ball.mp4")
        pipe = vtc.VideoQAPipeline(model, processor, args.method, keep_ratio=args.keep_ratio, fps=args.fps)
        answers = pipe(video, list(args.questions))
        for answer in answers:
            print(f"{answer.question}\n{answer}\n")
        with VideoFile(video) as file:
            frames = file.pictures(answers[0].times, 320)
    if answers[0].report is not None:
        shown = animation(answers[0].report, frames, processor=processor)
        save_animation(shown, args.output, fps=min(max(args.fps, 0.5), 10.0))
        print(f"what was kept: {args.output}")


def load(folder: Path | None, random_weights: bool) -> tuple[Any, Any]:
    if random_weights:
        from tests import tiny, tiny_processors

        return tiny.build("qwen2_5_vl_video").model, tiny_processors.processor("qwen2_5_vl_video")
    if folder is None:
        known = [name for name in vtc.reference.names() if name.startswith("qwen")]
        if not known:
            raise SystemExit("There is no reference model for videos here: give --model, or --random-weights.")
        return vtc.reference.load(known[0])
    return vtc.load(folder)


def rolling_ball(path: Path, count: int = 24, width: int = 160, height: int = 96) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)  # which browsers play, too
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(count):
            image = Image.new("RGB", (width, height), (225, 225, 215))
            draw = ImageDraw.Draw(image)
            draw.rectangle((70, 40, 100, 80), fill=(60, 90, 160))
            x = 10 + index * (width - 20) // count
            draw.ellipse((x - 10, 60, x + 10, 80), fill=(200, 60, 50))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    sys.exit(finish("video_qa", main))
