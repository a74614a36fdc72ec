"""A page to try compression on: one question, all tokens and a part of them side by side.

    pip install -e ".[demo,vision,video]" ./eval/reference
    python demos/app.py                                              # http://127.0.0.1:7860, nothing leaves the machine

Runs on the reference model, or on a checkpoint: `--model NAME=/path/to/checkpoint`, as often as you like.
"""

from __future__ import annotations

import argparse
import functools
import html
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

import vtc
import vtc.reference
from vtc.chat import image_inputs
from vtc.console import finish

EXAMPLES = (
    (6, "What is left of the cup?", "vtc", 0.25),
    (0, "What color is the leftmost thing?", "divprune", 0.1),
    (1, "What does the sign say?", "fastv", 0.25),
)
"""Sample image, question, method, keep ratio."""

LENGTH = 32
SHEET = 144
"""Frames of a video that are drawn; a sheet of more cannot be read on a page."""

WIDE = 640
"""Pixels across the page that a drawing has: one as wide is shown as it is, titles and all."""


@dataclass(frozen=True)
class Run:
    """One answer and what it took."""

    text: str
    first_token: float
    total: float


@dataclass(frozen=True)
class Comparison:
    """Both answers to one question, and the report of the compressed one."""

    full: Run
    compressed: Run
    report: vtc.Report
    overlay: Image.Image


class Models:
    """The models that the page offers, loaded when they are asked for."""

    def __init__(self, folders: Mapping[str, Path] | None = None) -> None:
        self.folders = dict(folders or {})
        self.names = [*vtc.reference.names(), *self.folders]

    @functools.cache  # noqa: B019 - one object, as long as the page
    def load(self, name: str) -> tuple[Any, Any]:
        if name not in self.folders:
            return vtc.reference.load(name)
        return vtc.load(self.folders[name])

    def for_videos(self) -> list[str]:
        """Names of the models that take videos. The small reference models are loaded to see, others are not."""
        processors = {
            name: self._processor(self.folders[name]) if name in self.folders else self.load(name)[1]
            for name in self.names
        }
        return [name for name, processor in processors.items() if _knows_videos(processor)]

    @staticmethod
    def _processor(folder: Path) -> Any:
        from transformers import AutoProcessor

        config = folder / "config.json"
        if config.is_file() and "mm_vision_tower" in config.read_text(encoding="utf-8"):
            return None  # an original LLaVA, which takes no videos and has no file of a processor
        return AutoProcessor.from_pretrained(folder, local_files_only=True)


def _knows_videos(processor: Any) -> bool:
    """Whether the chat template has a place for a video: some processors take one, but their model does not."""
    if not getattr(processor, "video_processor", None) or not getattr(processor, "chat_template", None):
        return False
    return processor.video_token in processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


class _FirstToken(StoppingCriteria):
    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def compare(
    models: Models, name: str, image: str | Image.Image | None, question: str, method: str, keep_ratio: float
) -> Comparison:
    """Ask about a picture, a file or an opened one, twice.

    Raises
    ------
    vtc.VtcError
        There is no picture or no question, or the model cannot run the method.
    """
    if not image or not (question or "").strip():
        raise vtc.InputError("Give a picture and a question.")
    image = vtc.open_image(image)
    model, processor = models.load(name)
    inputs = image_inputs(processor, [image], question).to(model.device, model.dtype)
    _run(model, processor, inputs, 1)  # what is slow the first time only
    full = _run(model, processor, inputs)
    with vtc.compressed(model, method, keep_ratio=keep_ratio):
        _run(model, processor, inputs, 1)
        compressed = _run(model, processor, inputs)
        report = vtc.report(model)
    overlay = vtc.visualize(report, image, processor=processor, size=384)
    if overlay.width > WIDE:  # panels side by side
        overlay = vtc.visualize(report, image, processor=processor, size=384 * WIDE // overlay.width)
    return Comparison(full, compressed, report, overlay)


def compare_video(
    models: Models,
    name: str,
    video: str | None,
    question: str,
    method: str,
    keep_ratio: float,
    fps: float,
    progress: bool = False,
) -> tuple[vtc.VideoAnswer, vtc.VideoAnswer, Image.Image | None]:
    """As `compare`, for a video file: the full answer, the compressed one, and a sheet unless frames are too many."""
    from vtc.video import VideoFile

    if not video or not (question or "").strip():
        raise vtc.InputError("Give a video and a question.")
    model, processor = models.load(name)
    answers = []
    for chosen, ratio in (("uniform", 1.0), (method, keep_ratio)):
        ask = functools.partial(vtc.VideoQAPipeline, model, processor, chosen, keep_ratio=ratio)
        ask(frames=2, max_new_tokens=1)(video, question)  # what is slow the first time only
        answers.append(ask(fps=fps, max_new_tokens=LENGTH, progress=progress)(video, question))
    full, answer = answers
    drawn, count = None, len(answer.times)
    if answer.report is not None and count <= SHEET:
        columns = min(count, 4 if count <= 8 else 6 if count <= 36 else 9 if count <= 81 else 12)
        size = min(320, WIDE // columns - 6)
        with VideoFile(video) as file:
            frames = file.pictures(answer.times, size)
        drawn = vtc.visualize(answer.report, frames, processor=processor, size=size, columns=columns, titles=size >= 96)
    return full, answer, drawn


def _run(model: Any, processor: Any, inputs: Any, length: int = LENGTH) -> Run:
    began, first = time.perf_counter(), _FirstToken()
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=length, do_sample=False, stopping_criteria=StoppingCriteriaList([first])
        )
    ended = time.perf_counter()
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return Run(text.strip(), (first.at or ended) - began, ended - began)


# --------------------------------------------------------------------------------------------------------------- bars


def bars(rows: Sequence[tuple[str, float | None, float | None, str]]) -> str:
    """Pairs of bars (what, full, compressed, unit) as HTML; a pair is scaled to its larger one."""
    out = []
    for what, full, part, unit in rows:
        if full is None or part is None:
            continue
        widest = max(full, part) or 1.0
        out.append(f"<div style='margin:{6 if out else 0}px 0 2px'><b>{html.escape(what)}</b></div>")
        for label, value, colour in (("all tokens", full, "#8a94a6"), ("compressed", part, "#2f7d5b")):
            out.append(
                "<div style='display:flex;align-items:center;gap:8px;font-size:13px'>"
                f"<span style='width:86px'>{label}</span><span style='flex:1'>"
                f"<span style='display:block;height:12px;border-radius:3px;background:{colour};"
                f"width:{100 * value / widest:.1f}%'></span></span>"
                "<span class='figure' style='width:104px;text-align:right;white-space:nowrap'>"
                f"{value:,.4g} {unit}</span></div>"
            )
    return "\n".join(out)


def summary(report: vtc.Report, full_seconds: float, seconds: float) -> str:
    kv = report.total_kv_bytes_before, report.total_kv_bytes_after
    flops = report.prefill_flops_before, report.prefill_flops_after
    return bars(
        [
            ("visual tokens, mean over layers", report.visual_tokens_before, report.average_visual_tokens, ""),
            ("time to first token, one run", 1e3 * full_seconds, 1e3 * seconds, "ms"),
            ("KV cache after the prompt, computed", *(None if n is None else n / 2**20 for n in kv), "MiB"),
            ("prefill arithmetic, computed", *(None if n is None else n / 1e9 for n in flops), "GFLOP"),
        ]
    )


def layers(report: vtc.Report) -> str:
    """Visual tokens in every decoder layer as HTML."""
    before = report.visual_tokens_before or 1
    out = ["<div><b>visual tokens in each decoder layer</b></div>"]
    for layer, count in enumerate(report.visual_tokens_per_layer):
        out.append(
            "<div style='display:flex;align-items:center;gap:8px;font-size:12px'>"
            f"<span style='width:58px'>layer {layer}</span><span style='flex:1;background:#e3e6eb;border-radius:3px'>"
            "<span style='display:block;height:9px;border-radius:3px;background:#2f7d5b;"
            f"width:{100 * count / before:.1f}%'></span></span>"
            f"<span style='width:48px;text-align:right'>{count}</span></div>"
        )
    return "\n".join(out)


# --------------------------------------------------------------------------------------------------------------- page


Shown = tuple[str, str, str, str, str, Image.Image | None]
"""What was asked or why not, both answers, bars, layers, drawing."""


def asked_for(name: str, method: str, keep_ratio: float, question: str) -> str:
    """What the answers below are to, as HTML: settings may have been changed since."""
    return f"<b>{html.escape(name)}, {method}, keep ratio {keep_ratio:g}:</b> {html.escape(question)}"


MISTAKES = (vtc.VtcError, OSError, MemoryError, torch.OutOfMemoryError)
"""What the page tells of a picture, a question or a machine; anything else is a fault of the program."""


def refused(error: BaseException, folder: Path | None = None) -> Shown:
    """The reason in place of answers, which would be those of an earlier question; without the upload's `folder`."""
    reason = str(error).replace(f"{folder}{os.sep}", "") if folder else str(error)
    box = "border:1px solid #b91c1c;border-radius:4px;padding:8px;color:#b91c1c"
    return f"<div style='{box}'>{html.escape(reason)}</div>", "", "", "", "", None


def build(models: Models) -> Any:
    """The page, not yet served."""
    import gradio as gr

    def about_image(name: str, method: str, keep_ratio: float, image: str | None, question: str) -> Shown:
        try:
            made = compare(models, name, image, question, method, keep_ratio)
        except MISTAKES as error:
            return refused(error, Path(image).parent if image else None)
        measured = summary(made.report, made.full.first_token, made.compressed.first_token)
        said = asked_for(name, method, keep_ratio, question)
        return said, made.full.text, made.compressed.text, measured, layers(made.report), made.overlay

    def about_video(
        name: str,
        method: str,
        keep_ratio: float,
        video: str | None,
        question: str,
        fps: float,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 - how gradio asks for it
    ) -> Shown:
        try:
            full, answer, drawn = compare_video(models, name, video, question, method, keep_ratio, fps, progress=True)
        except MISTAKES as error:
            return refused(error, Path(video).parent if video else None)
        said = asked_for(name, method, keep_ratio, question)
        if answer.report is None:  # only captions have none
            return said, full.text, answer.text, "", "", drawn
        if drawn is None:
            said += f"<br>{len(answer.times)} frames are too many to draw here; `vtc video -o kept.gif` draws them."
        measured = summary(answer.report, full.time_to_first_token, answer.time_to_first_token)
        return said, full.text, answer.text, measured, layers(answer.report), drawn

    def settings(names: Sequence[str], method: str) -> list[Any]:
        return [
            gr.Dropdown(list(names), value=names[0], label="model"),
            gr.Dropdown(list(vtc.list_methods()), value=method, label="method"),
            gr.Slider(0.02, 1.0, value=0.25, step=0.01, label="keep ratio"),
        ]

    samples, for_videos = [str(path) for path in vtc.reference.samples()], models.for_videos()
    with gr.Blocks(title="vtc", analytics_enabled=False) as page:
        gr.Markdown("## vtc: one question, all visual tokens and a part of them")
        with gr.Row():
            with gr.Column(scale=4):
                with gr.Tab("image"):
                    chosen = settings(models.names, "vtc")
                    # The file as it is: gradio's own conversion turns a picture of 16 bits white.
                    kept = {"type": "filepath", "image_mode": None}
                    image = gr.Image(label="image", sources=["upload", "clipboard"], height=300, **kept)
                    question = gr.Textbox(label="question", value=EXAMPLES[0][1])
                    ask = gr.Button("Ask", variant="primary", elem_id="ask-image")
                    gr.Examples(
                        [[samples[number], *rest] for number, *rest in EXAMPLES],
                        [image, question, *chosen[1:]],
                        cache_examples=False,
                    )
                with gr.Tab("video"):
                    if for_videos:
                        asked = settings(for_videos, "vtc")
                        video = gr.Video(label="video", sources=["upload"], height=300)
                        examples = video_examples()
                        _, usual, rate = examples[0] if examples else ("", "What happens in the clip?", 1.0)
                        video_question = gr.Textbox(label="question", value=usual)
                        fps = gr.Slider(0.25, 8.0, value=rate, step=0.25, label="frames per second")
                        ask_video = gr.Button("Ask", variant="primary", elem_id="ask-video")
                        if examples:
                            gr.Examples(examples, [video, video_question, fps], cache_examples=False)
                    else:
                        gr.Markdown(
                            "None of the models here takes videos. Start the page with "
                            "`--model NAME=/path/to/checkpoint` to offer one that does."
                        )
            with gr.Column(scale=5):
                said = gr.HTML("Choose an example, or a file and a question, and ask.", elem_id="said")
                with gr.Row():
                    full = gr.Textbox(label="answer with all tokens", elem_id="full")
                    part = gr.Textbox(label="answer with the kept tokens", elem_id="part")
                with gr.Row():
                    measured = gr.HTML(elem_id="bars")
                    per_layer = gr.HTML(elem_id="layers")
                gr.HTML("What was kept is bright; merged parts wear the colour that outlines the patch they are in.")
                # As high as the drawing; a label would lie over its titles.
                buttons = ["download", "fullscreen"]
                overlay = gr.Image(show_label=False, elem_id="overlay", buttons=buttons)
        outputs = [said, full, part, measured, per_layer, overlay]
        waiting = [full, part, overlay]
        ask.click(about_image, [*chosen, image, question], outputs, show_progress_on=waiting)
        if for_videos:
            inputs = [*asked, video, video_question, fps]
            ask_video.click(about_video, inputs, outputs, show_progress_on=waiting)
    return page


def video_examples() -> list[list[Any]]:
    """Sample clips with a question about each, and how many frames a second; none where none are installed."""
    clips = vtc.reference.clips() if vtc.reference.available() else []
    if not clips:
        return []
    asked: dict[str, str] = {}
    with open(clips[0].parent / "questions.jsonl", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            asked.setdefault(row["video"], row["question"])
    return [[str(clip), asked[clip.name], 4.0] for clip in clips if clip.name in asked]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="offer a checkpoint too")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    folders = {name: Path(folder) for name, _, folder in (model.partition("=") for model in args.model)}
    for name, folder in folders.items():
        if not name or folder == Path() or not folder.is_dir():
            raise vtc.ConfigError(f"--model takes NAME=FOLDER, the folder of a checkpoint, got {name}={folder}.")
    build(Models(folders)).launch(server_name=args.host, server_port=args.port, share=False, **_fonts())


def _fonts() -> dict[str, Any]:
    """System fonts: the default theme asks a font server for its own."""
    import gradio as gr

    font = ["system-ui", "sans-serif"]
    return {"theme": gr.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])}


if __name__ == "__main__":
    sys.exit(finish("app", main))
