"""A video that was read, and answers about it: from a compressed cache, from all frames at once, or from captions."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from vtc.chat import chat, processing
from vtc.engine.cache import CACHE, record_of
from vtc.engine.engine import Engine
from vtc.engine.memory import EncoderMemory
from vtc.errors import InputError, UnsupportedMethodError
from vtc.report.report import Report
from vtc.video.files import VideoInfo
from vtc.video.prompt import VideoPrompt, described
from vtc.video.windows import ReadVideo, read_video

if TYPE_CHECKING:
    from vtc.video.pipeline import VideoQAPipeline

__all__ = ["SESSIONS", "VideoAnswer", "VideoSession"]

_CAPTION = "Describe what happens in this clip in one sentence."


@dataclass(frozen=True, eq=False)
class VideoAnswer:
    """One answer, and what it cost.

    Attributes
    ----------
    question, text : str
    report : Report or None
        What was kept of the video, as from `vtc.report`; None for captions, of which there are several.
    timings : dict of str to float
        Seconds: "decode", "process" (pixels to tensors), "encode" (vision tower), "select", "prefill" (the video and
        the text before it), "first_token" (question to first token) and "generate" (first to last token). What was
        re-used from an earlier question is 0. A method that works inside the decoder, or looks at the question, has its
        tower, selection and prefill in "first_token".
    tokens : int
        Length of the answer.
    reused : tuple of str
        What an earlier question on the same video had already made.
    windows : tuple of (int, int, int)
        Frames, tokens before and tokens after of every window.
    times : tuple of float
        Seconds into the video of every sampled frame.
    captions : tuple of str
        What was said about each clip, for that strategy.
    """

    question: str
    text: str
    report: Report | None
    timings: dict[str, float]
    tokens: int
    reused: tuple[str, ...]
    windows: tuple[tuple[int, int, int], ...]
    times: tuple[float, ...]
    captions: tuple[str, ...] = ()

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the file to the first token, without what was re-used."""
        return sum(value for name, value in self.timings.items() if name != "generate")

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON types."""
        return {
            "question": self.question,
            "text": self.text,
            "report": None if self.report is None else self.report.to_dict(),
            "timings": dict(self.timings),
            "time_to_first_token": self.time_to_first_token,
            "tokens": self.tokens,
            "reused": list(self.reused),
            "windows": [list(window) for window in self.windows],
            "times": list(self.times),
            "captions": list(self.captions),
        }

    def __str__(self) -> str:
        lines = [self.text]
        before, after = (sum(window[at] for window in self.windows) for at in (1, 2))
        mean = after if self.report is None else self.report.average_visual_tokens
        if before:
            lines.append(
                f"{_count(len(self.times), 'frame')}, {mean:.0f} of {before} visual tokens "
                f"({100 * mean / before:.1f} %{'' if mean == after else ', mean over layers'}) "
                f"in {_count(len(self.windows), 'window')}"
            )
        if self.captions:
            lines.append(f"from {_count(len(self.captions), 'caption')}")
        spent = ", ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in self.timings.items() if value)
        lines.append(f"{spent}; {_count(self.tokens, 'token')}")
        if self.reused:
            lines.append(f"re-used: {', '.join(self.reused)}")
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


class VideoSession(ABC):
    """A video that was read and can be asked about; made by `VideoQAPipeline.watch`.

    Attributes
    ----------
    info : VideoInfo
    times : array of float
        Seconds of the sampled frames.
    seconds : dict
        What reading took.
    """

    def __init__(
        self,
        pipeline: VideoQAPipeline,
        info: VideoInfo,
        times: np.ndarray[Any, Any],
        windows: Iterator[np.ndarray[Any, Any]],
        bar: Any,
    ) -> None:
        self.pipeline, self.info, self.times = pipeline, info, times
        self.seconds: dict[str, float] = {}
        self.asked = 0
        self._read(windows, bar)

    @abstractmethod
    def _read(self, windows: Iterator[np.ndarray[Any, Any]], bar: Any) -> None:
        """Take in the frames, and tell the progress `bar` (or None) how many."""

    def ask(self, question: str) -> VideoAnswer:
        """Answer one question.

        Raises
        ------
        InputError
            The question cannot be put to the model.
        """
        if not question.strip():
            raise InputError("There is no question, or an empty one.")
        answer = self._ask(question)
        self.asked += 1
        return answer

    @abstractmethod
    def _ask(self, question: str) -> VideoAnswer:
        """Answer a question that says something."""

    def _prompt(self, engine: Engine, numbers: Sequence[int] | None = None) -> VideoPrompt:
        """Return the prompt for some of the sampled frames, by default all."""
        times = self.times if numbers is None else self.times[list(numbers)]
        fps = self.info.fps or 1.0
        # Where the rate varies, the numbers that the frames would have at the mean rate: processors divide by it.
        frames = [int(number) for number in np.round(times * fps)]
        return VideoPrompt(self.pipeline.processor, engine, frames, fps, max(self.info.frames, frames[-1] + 1))

    def _answer(
        self,
        question: str,
        generated: torch.Tensor,
        prompt_length: int,
        stopwatch: _Stopwatch,
        *,
        report: Report | None,
        reusable: tuple[str, ...],
        windows: Sequence[tuple[int, int, int]],
        captions: Sequence[str] = (),
    ) -> VideoAnswer:
        """Make the answer; the first one includes the time of reading, later ones re-use what is `reusable`."""
        new = generated[:, prompt_length:]
        text: str = self.pipeline.processor.batch_decode(new, skip_special_tokens=True)[0]
        reading = self.seconds if not self.asked else dict.fromkeys(self.seconds, 0.0)
        reused = reusable if self.asked else ()
        return VideoAnswer(
            question=question,
            text=text.strip(),
            report=None if report is None else replace(report, reused=reused),
            timings={**reading, **stopwatch.seconds()},
            tokens=new.shape[1],
            reused=reused,
            windows=tuple(windows),
            times=tuple(self.times.tolist()),
            captions=tuple(captions),
        )


class _Streamed(VideoSession):
    """A compressed video in a cache that every question continues."""

    def _read(self, windows: Iterator[np.ndarray[Any, Any]], bar: Any) -> None:
        pipeline = self.pipeline
        with pipeline.compressing() as engine:
            self.video: ReadVideo = read_video(
                engine,
                self._prompt(engine),
                windows,
                pipeline.window,
                pipeline.budget,
                None if bar is None else bar.update,
            )
        self.seconds = self.video.seconds

    def _ask(self, question: str) -> VideoAnswer:
        pipeline, video = self.pipeline, self.video
        ids = video.prompt.ids(question)
        if not torch.equal(ids[:, : video.prefix.shape[1]], video.prefix):
            raise InputError("The chat template writes the question before the video, so nothing could be read ahead.")
        with pipeline.compressing() as engine, torch.no_grad():
            cache = deepcopy(video.cache)
            record = record_of(cache)
            if record is not None:
                record.owner = engine.owner  # the cache outlives the engine that filled it, and this one equals that
            stopwatch = _Stopwatch(engine.model.device)
            output = engine.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                # Where the question stands depends on the video, which Qwen's models cannot see any more.
                position_ids=video.prompt.positions(ids),
                **{CACHE: cache},
                max_new_tokens=pipeline.max_new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([stopwatch]),
            )
            report = video.report(engine, ids)
        reusable = ("features", "compressed KV prefix")
        return self._answer(
            question, output, ids.shape[1], stopwatch, report=report, reusable=reusable, windows=video.windows
        )


class _Whole(VideoSession):
    """All frames at once through the model's own processor, for methods that need the question or the decoder."""

    def _read(self, windows: Iterator[np.ndarray[Any, Any]], bar: Any) -> None:
        pipeline = self.pipeline
        if len(self.times) > pipeline.window:
            raise UnsupportedMethodError(
                f"{pipeline.config.method} must see the whole video and the question at once, but "
                f"{len(self.times)} frames were sampled and a window holds {pipeline.window}: raise window=, sample "
                "fewer frames, or choose a method that works before the decoder and without the text"
            )
        began = time.perf_counter()
        (self.frames,) = windows
        self.seconds = {"decode": time.perf_counter() - began, "process": 0.0}
        self._memory = EncoderMemory()
        self._pixels: dict[str, Any] | None = None  # what the processor made of the frames, if it need not run again
        self._text: list[str] = []  # what it makes beside that
        if bar is not None:
            bar.update(len(self.frames))

    def _ask(self, question: str) -> VideoAnswer:
        pipeline = self.pipeline
        with pipeline.compressing() as engine, torch.no_grad():
            began = time.perf_counter()
            inputs = self._inputs(engine, question)
            process = time.perf_counter() - began
            stopwatch = _Stopwatch(engine.model.device)
            with engine.remember(self._memory):
                output = engine.model.generate(
                    **inputs,
                    max_new_tokens=pipeline.max_new_tokens,
                    do_sample=False,
                    stopping_criteria=StoppingCriteriaList([stopwatch]),
                )
            report = engine.report()
        window = (len(self.frames), report.visual_tokens_before, report.visual_tokens_after)
        length = inputs["input_ids"].shape[1]
        answer = self._answer(
            question, output, length, stopwatch, report=report, reusable=("features",), windows=(window,)
        )
        return replace(answer, timings={**answer.timings, "process": process})

    def _inputs(self, engine: Engine, question: str) -> dict[str, Any]:
        """Return what the processor makes of the frames and a question; what it makes of the frames, once."""
        processor, prompt = self.pipeline.processor, self._prompt(engine)
        if self._pixels is not None:
            prompt.see(self._pixels)
            return {**self._pixels, **prompt.text_inputs(question, self._text)}
        frames, numbers = prompt.whole_steps(self.frames, prompt.frames)
        with processing(processor, described(frames)):
            made = processor(
                text=[prompt.text(question)],
                videos=[frames],
                do_sample_frames=False,
                video_metadata=[prompt.metadata(numbers)],
                return_tensors="pt",
            )
        made.pop("video_metadata", None)
        inputs = dict(made.to(engine.model.device, engine.model.dtype))
        if prompt.see(inputs):  # and the ids of another question can be made without it
            own = prompt.text_inputs(question, inputs)
            if all(torch.equal(value, inputs[name]) for name, value in own.items()):
                self._text = list(own)
                self._pixels = {name: value for name, value in inputs.items() if name not in own}
        return inputs


class _Captioned(VideoSession):
    """One sentence per window; questions are asked about the sentences.

    References
    ----------
    "A Simple LLM Framework for Long-Range Video Question-Answering" (LLoVi), arXiv 2312.17235.
    """

    def _read(self, windows: Iterator[np.ndarray[Any, Any]], bar: Any) -> None:
        pipeline = self.pipeline
        self.captions: list[str] = []
        self.windows: list[tuple[int, int, int]] = []
        first = 0
        for frames in windows:
            clip_times = self.times[first : first + len(frames)]
            kind = "streamed" if pipeline.streams else "whole"
            clip = SESSIONS[kind](pipeline, self.info, clip_times, iter([frames]), bar)
            answer = clip.ask(_CAPTION)
            span = f"{clip_times[0]:.1f} to {clip_times[-1]:.1f} s"
            self.captions.append(f"[{span}] {answer.text}")
            self.windows += answer.windows
            for name, value in answer.timings.items():
                self.seconds[f"captions_{name}"] = self.seconds.get(f"captions_{name}", 0.0) + value
            first += len(frames)

    def _ask(self, question: str) -> VideoAnswer:
        pipeline = self.pipeline
        lines = "\n".join(self.captions)
        text = f"These sentences describe consecutive clips of a video.\n{lines}\n{question}"
        prompt = chat(pipeline.processor, [], text)
        with pipeline.compressing() as engine, torch.no_grad():
            inputs = pipeline.processor(text=[prompt], return_tensors="pt").to(engine.model.device)
            stopwatch = _Stopwatch(engine.model.device)
            output = engine.model.generate(
                **inputs,
                max_new_tokens=pipeline.max_new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([stopwatch]),
            )
        return self._answer(
            question,
            output,
            inputs["input_ids"].shape[1],
            stopwatch,
            report=None,
            reusable=("captions",),
            windows=self.windows,
            captions=self.captions,
        )


SESSIONS: Mapping[str, Callable[..., VideoSession]] = {
    "streamed": _Streamed,
    "whole": _Whole,
    "captions": _Captioned,
}


class _Stopwatch(StoppingCriteria):
    """Note when the first and the last token came; never stop generation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = time.perf_counter()
        self.marks: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> dict[str, float]:
        return {"first_token": self.marks[0] - self.began, "generate": self.marks[-1] - self.marks[0]}
