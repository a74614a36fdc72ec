"""Questions about video files: decode, sample, encode, compress, answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from vtc import api
from vtc.config import DEFAULT_METHOD
from vtc.core.sites import Site
from vtc.engine.engine import Engine
from vtc.engine.install import engine_of
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.limits import MAX_FRAMES, MAX_NEW_TOKENS, check_count
from vtc.video.files import VideoFile
from vtc.video.prompt import VideoPrompt
from vtc.video.sampling import (
    check_sampling,
    sample_by_count,
    sample_by_default,
    sample_by_fps,
    sample_by_scenes,
)
from vtc.video.session import SESSIONS, VideoAnswer, VideoSession
from vtc.video.windows import VideoBudget, streams

__all__ = ["VideoAnswer", "VideoQAPipeline", "VideoSession"]

STRATEGIES = ("compress", "captions")


class VideoQAPipeline:
    """Answer questions about video files of any length with an unmodified model, in bounded memory.

    The sampled frames are decoded, encoded and compressed in windows; the language model reads what stays, at the
    positions of the full prompt. Between calls the model is as it was found.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family with videos; `vtc models` lists them.
    processor : ProcessorMixin
        The model's, with a chat template.
    method : str
        Compression method. One that works inside the decoder or looks at the question sees the whole video at once and
        is refused where it does not fit into one window.
    keep_ratio, keep_tokens, per_window, per_frame : optional
        How many tokens stay, exactly one of them: a fraction of every window; so many of the whole video, shared among
        the windows in proportion to their frames; so many of every window; so many of every frame, each frame by itself
        (for families that join two frames into one step: of every step).
    fps, frames, scenes : optional
        Which frames are looked at: so many per second; so many over the whole length; the first of each scene, a scene
        being a change of brightness above this number (0 to 1). `frames` beside `scenes` is at most so many. By default
        one per second, but at least 8 over the whole length (all of a clip that has fewer): two frames of a clip of two
        seconds show too little of it.
    window : int
        Frames in memory at a time, up to `vtc.limits.MAX_FRAMES`; rounded up where the family joins frames.
    strategy : {"compress", "captions"}
        "captions" is the baseline after LLoVi: each window is described in a sentence, and the question is asked about
        these sentences.
    decoder : str, optional
        One of `vtc.video.DECODERS` instead of the first that can.
    max_new_tokens : int
        Length of an answer, up to `vtc.limits.MAX_NEW_TOKENS`.
    structural : {"keep", "drop"}
    seed : int
    at : str or Site, optional
        Where tokens leave, as in `vtc.compress`.
    progress : bool
        Show a bar on stderr.
    **options
        Options of the method.

    Raises
    ------
    ConfigError, InputError, UnsupportedMethodError, UnsupportedModelError
        What was asked cannot be done; found before a file is opened.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        method: str = DEFAULT_METHOD,
        *,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
        per_window: int | None = None,
        per_frame: int | None = None,
        fps: float | None = None,
        frames: int | None = None,
        scenes: float | None = None,
        window: int = 32,
        strategy: str = "compress",
        decoder: str | None = None,
        max_new_tokens: int = 64,
        structural: str = "keep",
        seed: int = 0,
        at: str | Site | None = None,
        progress: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.processor = model, processor
        self.budget = VideoBudget(keep_ratio, keep_tokens, per_window, per_frame)
        self.config = self.budget.config(method, structural=structural, seed=seed, options=options, at=at)
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
        check_sampling(fps, frames, scenes)
        check_count("window", window, MAX_FRAMES)
        check_count("max_new_tokens", max_new_tokens, MAX_NEW_TOKENS)
        self.strategy, self.decoder, self.max_new_tokens, self.progress = strategy, decoder, max_new_tokens, progress
        self.fps, self.frames, self.scenes = fps, frames, scenes
        with self.compressing() as engine:  # everything about the method that can be refused is refused here
            prompt = VideoPrompt(processor, engine, [0], 1.0, 1)
            prompt.text("?")
            self.window = -(-window // prompt.join) * prompt.join
            self.streams = streams(engine)
            if not self.streams and not self.budget.whole:
                raise UnsupportedMethodError(
                    f"{method} must see the whole video at once, so it cannot be given budgets per frame or window; "
                    "use keep_ratio or keep_tokens"
                )
            if engine.plan.changes_encoder and self.budget.keep_ratio is None:
                where = str(engine.plan.stages[0].site)
                raise UnsupportedMethodError(
                    f"{method} at {where!r} chooses in every frame, or window of frames, by itself, so "
                    "that it cannot be given a number of tokens; use keep_ratio"
                )
            by_stage = any(stage.stage.keep is not None for stage in engine.plan.before_decoder)
            if self.budget.keep_tokens is not None and by_stage:
                raise UnsupportedMethodError(
                    f"{method} splits its budget over several stages as fractions; use keep_ratio with videos"
                )

    @overload
    def __call__(self, video: str | Path, question: str) -> VideoAnswer: ...

    @overload
    def __call__(self, video: str | Path, question: list[str] | tuple[str, ...]) -> list[VideoAnswer]: ...

    def __call__(
        self, video: str | Path, question: str | list[str] | tuple[str, ...]
    ) -> VideoAnswer | list[VideoAnswer]:
        """Return one answer for one question, a list for several; the video is read once.

        Raises
        ------
        InputError
            The file cannot be read as a video, or a question is empty.
        """
        asked = [question] if isinstance(question, str) else list(question)
        if not asked or not all(one.strip() for one in asked):
            raise InputError("There is no question, or an empty one.")
        session = self.watch(video)
        answers = [session.ask(one) for one in asked]
        return answers[0] if isinstance(question, str) else answers

    def watch(self, video: str | Path) -> VideoSession:
        """Read a file and return a session for questions about it; the file is closed again when this returns.

        Raises
        ------
        InputError
            The file cannot be read as a video.
        """
        began = time.perf_counter()
        with VideoFile(video, self.decoder) as file, self._bar() as bar:
            numbers = self._sample(file)
            opened = time.perf_counter() - began
            times = file.times[numbers]
            if bar is not None:
                bar.reset(total=len(numbers))
            session = SESSIONS[self._kind](self, file.info, times, file.windows(numbers, self.window), bar)
        session.seconds["decode"] = session.seconds.get("decode", 0.0) + opened
        return session

    @property
    def _kind(self) -> str:
        return self.strategy if self.strategy == "captions" else "streamed" if self.streams else "whole"

    def _sample(self, file: VideoFile) -> list[int]:
        if self.scenes is not None:
            return sample_by_scenes(file, self.scenes, count=self.frames, window=self.window)
        if self.frames is not None:
            return sample_by_count(file.times, file.info.duration, self.frames)
        if self.fps is not None:
            return sample_by_fps(file.times, file.info.duration, self.fps)
        return sample_by_default(file.times, file.info.duration)

    @contextmanager
    def compressing(self) -> Iterator[Engine]:
        """Compress the model while entered, and return the engine."""
        with api.compressed(self.model, self.config):
            yield engine_of(self.model)

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        if not self.progress:
            yield None
            return
        from tqdm import tqdm

        with tqdm(unit="frame", desc="video") as bar:
            yield bar
