"""Questions about video files, with the tiny model of every family that takes videos.

The weights are random, so the answers mean nothing; they are good for telling whether two ways to one prompt agree.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtc
import vtc.reference
from tests import tiny
from tests.tiny_processors import VIDEO_FAMILIES, processor
from tests.video import clips
from vtc.engine.cache import CACHE
from vtc.engine.install import engine_of
from vtc.selectors.aim import AimSelector
from vtc.video import windows as streaming
from vtc.video.files import VideoFile
from vtc.video.pipeline import VideoQAPipeline
from vtc.video.prompt import VideoPrompt, _folded
from vtc.video.windows import VideoBudget, read_video

FRAMES = 12
QUESTION = "what happens in the clip ?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0)
    shown = [noise.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1) for _ in range(4)]
    moving = [np.roll(shown[index // 3], 5 * index, axis=1) for index in range(FRAMES)]
    return clips.write(folder / "clip.mp4", moving, fps=4)


@pytest.fixture(scope="module")
def built() -> Any:
    """Tiny models and processors, each made once."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in made:
            made[family] = tiny.build(family).model, processor(family)
        return made[family]

    return get


def pipeline(built: Any, family: str, method: str = "evs", **arguments: Any) -> VideoQAPipeline:
    model, words = built(family)
    arguments = {"fps": 4.0, "max_new_tokens": 4, **arguments}
    if not {"keep_ratio", "keep_tokens", "per_window", "per_frame"} & set(arguments):
        arguments["keep_ratio"] = 0.5
    return VideoQAPipeline(model, words, method, **arguments)


# ---------------------------------------------------------------------------------------------- one prompt, two ways


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("window", [FRAMES, 4], ids=["one window", "windows"])
def test_ids_and_features_are_those_of_the_whole_video(built: Any, clip: Path, family: str, window: int) -> None:
    model, words = built(family)
    with VideoFile(clip) as file, vtc.compressed(model, "uniform", keep_ratio=1.0):
        engine = engine_of(model)
        frames = file.read(range(FRAMES))
        prompt = VideoPrompt(words, engine, list(range(FRAMES)), 4.0, FRAMES)
        whole = words(
            text=[prompt.text(QUESTION)],
            videos=[frames],
            do_sample_frames=False,
            video_metadata=[prompt.metadata(range(FRAMES))],
            return_tensors="pt",
        )
        parts = [frames[start : start + window] for start in range(0, FRAMES, window)]
        video = read_video(engine, prompt, iter(parts), window, VideoBudget(keep_ratio=1.0))
        assert torch.equal(prompt.ids(QUESTION), whole["input_ids"])
        positions = prompt.positions(whole["input_ids"])
        given = {name: whole[name] for name in whole if name not in ("pixel_values", "pixel_values_videos")}
        given.pop("video_metadata", None)
        expected = model._prepare_position_ids_for_generation(given.pop("input_ids"), given)
        assert torch.equal(positions, expected)
    assert sum(count for count, _, _ in video.windows) == FRAMES
    assert len(video.windows) == FRAMES // window
    assert video.segment.tokens_after == video.segment.tokens_before
    # Reading ahead and asking is reading at once: the next token's logits, and every key and value before it.
    with torch.no_grad():
        inputs = {name: value for name, value in whole.items() if name != "video_metadata"}
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        end = video.prefix.shape[1]
        for ours, theirs in zip(video.cache.layers, output[CACHE].layers, strict=True):
            if getattr(ours, "keys", None) is None:  # recurrent layers of the hybrid
                continue
            for name in ("keys", "values"):
                difference = getattr(ours, name) - getattr(theirs, name)[:, :, :end]
                assert difference.abs().max() < (1e-4 if family != "qwen3_5" else 1e-2)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("uniform", "decoder"),
        ("divprune", "decoder"),
        ("vtc", "decoder"),
        ("uniform", "pixels"),
        ("divprune", "vision:1"),
        ("vtc", "vision:1"),
        ("resize", "pixels"),
    ],
)
def test_one_window_answers_as_compress_and_generate_do(
    built: Any, clip: Path, family: str, method: str, at: str
) -> None:
    if family == "internvl":
        pytest.skip("a video is one segment here and one image per frame in compress(), so that budgets differ")
    if family == "llava_onevision_video" and at != "decoder":
        pytest.skip("frames are interpolated across patches")
    if method == "resize" and not tiny.family(family).any_size:
        pytest.skip("its tower takes pictures of one size")
    model, words = built(family)
    answer = pipeline(built, family, method, keep_ratio=0.4, at=at, window=FRAMES, max_new_tokens=5)(clip, QUESTION)
    with VideoFile(clip) as file:
        frames = file.read(range(FRAMES))
    with vtc.compressed(model, method, keep_ratio=0.4, at=at):
        prompt = VideoPrompt(words, engine_of(model), list(range(FRAMES)), 4.0, FRAMES)
        inputs = words(
            text=[prompt.text(QUESTION)],
            videos=[frames],
            do_sample_frames=False,
            video_metadata=[prompt.metadata(range(FRAMES))],
            return_tensors="pt",
        )
        inputs.pop("video_metadata", None)
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        report = vtc.report(model)
    expected = words.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert answer.text == expected
    assert answer.report is not None
    assert answer.report.segments[0].kept.tolist() == report.segments[0].kept.tolist()
    assert answer.report.lengths_per_layer == report.lengths_per_layer
    assert answer.report.prefill_flops_after == report.prefill_flops_after


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "llava_next_video", "video_llava", "internvl"])
def test_windows_are_thinned_before_they_are_encoded(built: Any, clip: Path, family: str) -> None:
    answer = pipeline(built, family, "uniform", keep_ratio=0.5, at="vision:1", window=4)(clip, QUESTION)
    assert answer.report is not None
    (segment,) = answer.report.segments
    scorable = segment.tokens_before - segment.structural
    assert segment.tokens_after - segment.structural == scorable // 2
    frames = torch.tensor(segment.kept.tolist()) * FRAMES // segment.tokens_before
    assert len(frames.unique()) >= FRAMES // 2


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "qwen3_vl_video"])
def test_windows_of_smaller_frames_are_the_whole_video_of_them(built: Any, clip: Path, family: str) -> None:
    answers = [pipeline(built, family, "resize", keep_ratio=0.5, window=size)(clip, QUESTION) for size in (FRAMES, 4)]
    kept = [answer.report.segments[0] for answer in answers if answer.report is not None]
    assert kept[0].kept.tolist() == kept[1].kept.tolist()
    assert len(kept[0].kept) < kept[0].tokens_before
    assert answers[0].text == answers[1].text


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "qwen3_vl_video", "llava_onevision_video", "internvl"])
def test_questions_reuse_the_video_and_do_not_touch_each_other(built: Any, clip: Path, family: str) -> None:
    questions = [QUESTION, "describe a b c ?", QUESTION]
    pipe = pipeline(built, family, window=6)
    first, second, again = pipe(clip, questions)
    alone = pipe(clip, questions[1])
    assert first.reused == ()
    assert second.reused == ("features", "compressed KV prefix")
    assert second.timings["encode"] == second.timings["decode"] == 0.0
    assert first.timings["encode"] > 0
    assert again.text == first.text
    assert alone.text == second.text
    assert alone.reused == ()
    assert "re-used: features, compressed KV prefix" in str(second)
    assert first.report is not None
    assert second.report is not None
    assert (first.report.reused, second.report.reused) == (first.reused, second.reused)
    assert "earlier question and re-used: features, compressed KV prefix" in str(second.report)
    assert "earlier question" not in str(first.report)
    assert not vtc.is_compressed(built(family)[0])


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "llava_next_video", "internvl"])
def test_methods_inside_the_decoder_reuse_the_features(
    built: Any, clip: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = built(family)
    encoder = model.base_model
    name = "get_image_features" if family == "internvl" else "get_video_features"
    original, calls = getattr(type(encoder), name), []

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(encoder), name, counted)
    pipe = pipeline(built, family, "fastv", layer=2)
    one, two = pipe(clip, [QUESTION, "describe a b c ?"])
    assert len(calls) == 1
    assert two.reused == ("features",)
    assert two.report is not None
    assert two.report.reused == ("features",)
    assert pipe(clip, "describe a b c ?").text == two.text
    assert len(calls) == 2
    assert one.report is not None
    assert one.report.visual_tokens_after < one.report.average_visual_tokens < one.report.visual_tokens_before
    assert f", {one.report.average_visual_tokens:.0f} of {one.report.visual_tokens_before} visual tokens" in str(one)
    assert "mean over layers" in str(one)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_frames_are_processed_once_for_all_questions(
    built: Any, clip: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, words = built(family)
    original, processed = type(words.video_processor).__call__, []
    monkeypatch.setattr(
        type(words.video_processor), "__call__", lambda *args, **kw: processed.append(1) or original(*args, **kw)
    )
    pipe = pipeline(built, family, "cdpruner")
    del processed[:]
    _, two = pipe(clip, [QUESTION, "describe a b c ?"])
    assert len(processed) == 1
    alone = pipe(clip, "describe a b c ?")
    assert two.text == alone.text
    assert two.report is not None
    assert alone.report is not None
    assert two.report.lengths_per_layer == alone.report.lengths_per_layer


def test_choices_that_do_not_read_the_question_are_made_once(
    built: Any, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, sites = AimSelector.select, []
    monkeypatch.setattr(AimSelector, "select", lambda self, ctx: sites.append(str(ctx.site)) or original(self, ctx))
    pipe = pipeline(built, "qwen2_5_vl_video", "aim")
    _, two = pipe(clip, [QUESTION, "describe a b c ?"])
    assert sites.count("decoder") == 1
    assert two.text == pipe(clip, "describe a b c ?").text
    assert len([site for site in sites if site != "decoder"]) % 3 == 0, "inside the decoder for each question"


# ---------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("family", ["qwen2_5_vl_video", "llava_onevision_video", "video_llava"])
@pytest.mark.parametrize("method", ["evs", "vidcom2", "dycoke", "fastvid", "prunevid", "holitom", "flashvid", "vtc"])
def test_budgets_are_exact(built: Any, clip: Path, family: str, method: str) -> None:
    def scored(**budget: Any) -> tuple[list[int], Any]:
        answer = pipeline(built, family, method, window=4, **budget)(clip, QUESTION)
        assert answer.report is not None
        (segment,) = answer.report.segments
        (_, selection), *_ = segment.selections
        (mask,) = selection.grid_mask(segment.grids)
        per_step = mask.flatten(1).sum(dim=1).tolist()
        steps = len(per_step) // 3  # three windows
        return [sum(per_step[at : at + steps]) for at in range(0, len(per_step), steps)], per_step

    per_window, _ = scored(keep_tokens=20)
    assert sum(per_window) == 20
    assert max(per_window) - min(per_window) <= 1
    assert scored(per_window=9)[0] == [9, 9, 9]
    assert set(scored(per_frame=2)[1]) == {2}
    assert scored(keep_tokens=2)[0] == [1, 1, 0]


def test_a_budget_is_one_of_four(built: Any) -> None:
    model, words = built("qwen2_5_vl_video")
    with pytest.raises(vtc.ConfigError, match="exactly one of keep_ratio, keep_tokens, per_window and per_frame"):
        VideoQAPipeline(model, words, "evs")
    with pytest.raises(vtc.ConfigError, match="exactly one"):
        VideoQAPipeline(model, words, "evs", keep_ratio=0.5, per_frame=3)
    with pytest.raises(vtc.ConfigError, match="per_frame must be at least 1"):
        VideoQAPipeline(model, words, "evs", per_frame=0)


def test_what_cannot_be_done_is_refused_before_a_file_is_opened(built: Any, clip: Path) -> None:
    with pytest.raises(vtc.UnsupportedMethodError, match="budgets per frame or window"):
        pipeline(built, "qwen2_5_vl_video", "fastv", per_frame=2, layer=2)
    with pytest.raises(vtc.UnsupportedMethodError, match="cannot be given a number of tokens; use keep_ratio"):
        pipeline(built, "qwen2_5_vl_video", "uniform", keep_tokens=20, at="vision:1")
    with pytest.raises(vtc.UnsupportedMethodError, match="resize at 'pixels' chooses in every frame"):
        pipeline(built, "qwen2_5_vl_video", "resize", keep_tokens=20)
    with pytest.raises(vtc.UnsupportedMethodError, match="12 frames were sampled and a window holds 4"):
        pipeline(built, "qwen2_5_vl_video", "fastv", layer=2, window=4)(clip, QUESTION)
    with pytest.raises(vtc.UnsupportedMethodError, match="Did you mean 'evs'"):
        pipeline(built, "qwen2_5_vl_video", "evz")
    with pytest.raises(vtc.ConfigError, match="strategy must be"):
        pipeline(built, "qwen2_5_vl_video", strategy="guess")
    with pytest.raises(vtc.ConfigError, match="Give fps, or frames, or scenes"):
        pipeline(built, "qwen2_5_vl_video", fps=1.0, frames=3)
    for name in ("window", "max_new_tokens", "frames"):
        for value in (0, -1, 10**9, 1.5):
            with pytest.raises(vtc.ConfigError, match=f"{name} must be an integer from 1 to 100,000, got {value}"):
                pipeline(built, "qwen2_5_vl_video", **{"fps": None, name: value})
    for fps in (0, -1.0, float("nan"), 1e9):
        with pytest.raises(vtc.ConfigError, match="fps must be positive, and at most 1,000"):
            pipeline(built, "qwen2_5_vl_video", fps=fps)
    with pytest.raises(vtc.ConfigError, match="between 0 and 1"):
        pipeline(built, "qwen2_5_vl_video", fps=None, scenes=float("nan"))
    model = tiny.build("llava").model
    with pytest.raises(vtc.UnsupportedModelError, match="takes no videos"):
        VideoQAPipeline(model, processor("video_llava"), "uniform", keep_ratio=0.5)
    assert not vtc.is_compressed(model)
    with pytest.raises(vtc.InputError, match="no question"):
        pipeline(built, "qwen2_5_vl_video")(clip, " ")
    with pytest.raises(vtc.InputError, match=r"holds .*stands for a picture or video"):
        pipeline(built, "qwen2_5_vl_video")(clip, "what is <|video_pad|> ?")


def test_an_earlier_compression_comes_back(built: Any, clip: Path) -> None:
    model, _ = built("qwen2_5_vl_video")
    vtc.compress(model, "random", keep_ratio=0.3)
    try:
        pipeline(built, "qwen2_5_vl_video")(clip, QUESTION)
        assert engine_of(model).plan.configs[0].method == "random"
    finally:
        vtc.restore(model)


# -------------------------------------------------------------------------------------------------- more than one way


@pytest.mark.parametrize(
    ("arguments", "count"),
    [({"fps": 2.0}, 6), ({"frames": 5}, 5), ({"scenes": 0.9}, 1), ({"scenes": 0.05, "frames": 2}, 2)],
)
def test_frames_are_sampled_as_asked(built: Any, clip: Path, arguments: dict[str, Any], count: int) -> None:
    answer = pipeline(built, "llava_onevision_video", **{"fps": None, **arguments})(clip, QUESTION)
    assert len(answer.times) == count
    assert list(answer.times) == sorted(answer.times)


@pytest.mark.parametrize(("given", "fps", "count"), [(5, 4, 5), (12, 4, 8), (40, 4, 10)])
def test_a_short_clip_is_looked_at_with_8_frames(built: Any, tmp_path: Path, given: int, fps: int, count: int) -> None:
    path = clips.write(tmp_path / "clip.mp4", clips.frames(given), fps=fps)
    for family in ("llava_onevision_video", "qwen2_5_vl_video"):
        answer = pipeline(built, family, fps=None)(path, QUESTION)
        assert len(answer.times) == count
        assert [frames for frames, _, _ in answer.windows] == [count]
        assert f"{count} frames" in str(answer)
    assert len(pipeline(built, "qwen2_5_vl_video", fps=1.0)(path, QUESTION).times) == -(-given // fps), "as asked"


@pytest.mark.skipif(not vtc.reference.available(), reason="vtc-reference is not installed")
def test_the_sample_clips_are_seen_by_default() -> None:
    model, words = vtc.reference.load("qwen2_5_vl")
    clip = vtc.reference.clips()[0]
    rows = map(json.loads, (clip.parent / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    asked = {row["question"]: row["answer"] for row in rows if row["video"] == clip.name}
    answers = VideoQAPipeline(model, words, "uniform", keep_ratio=1.0)(clip, list(asked))
    assert {len(answer.times) for answer in answers} == {8}
    assert {answer.question: answer.text for answer in answers} == asked


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_few_frames(built: Any, tmp_path: Path, family: str, count: int) -> None:
    path = clips.write(tmp_path / "few.mp4", clips.frames(count))
    answer = pipeline(built, family, fps=10.0)(path, QUESTION)
    assert len(answer.times) == count
    assert answer.tokens == 4


def test_captions_are_asked_for_once(built: Any, clip: Path) -> None:
    pipe = pipeline(built, "qwen2_5_vl_video", strategy="captions", window=4, max_new_tokens=3)
    first, second = pipe(clip, [QUESTION, "a ?"])
    assert len(first.captions) == 3
    assert first.captions[0].startswith("[0.0 to 0.8 s] ")
    assert first.captions == second.captions
    assert first.report is None
    assert second.reused == ("captions",)
    assert first.timings["captions_encode"] > 0 == second.timings["captions_encode"]
    assert "from 3 captions" in str(first)


def test_the_answer_survives_json_and_can_be_drawn(built: Any, clip: Path) -> None:
    answer = pipeline(built, "qwen2_5_vl_video", window=4)(clip, QUESTION)
    data = json.loads(json.dumps(answer.to_dict()))
    assert [frames for frames, _, _ in data["windows"]] == [4, 4, 4]
    assert data["time_to_first_token"] == pytest.approx(answer.time_to_first_token)
    with VideoFile(clip) as file:
        frames = file.read(range(FRAMES))
    assert answer.report is not None
    drawn = vtc.visualize(answer.report, frames, size=64)
    assert drawn.width > 64


@pytest.mark.usefixtures("young_heap")
def test_frames_are_let_go_of(built: Any, clip: Path) -> None:
    """However many windows there are, the frames of two at most are in memory."""
    model, words = built("llava_onevision_video")
    frames_made: list[Any] = []
    most = 0

    def windows() -> Any:
        nonlocal most
        import weakref

        for _ in range(10):
            frames = np.zeros((4, 48, 64, 3), dtype=np.uint8)
            frames_made.append(weakref.ref(frames))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in frames_made))
            yield frames
            del frames

    with vtc.compressed(model, "evs", keep_ratio=0.25):
        engine = engine_of(model)
        prompt = VideoPrompt(words, engine, list(range(40)), 4.0, 40)
        video = read_video(engine, prompt, windows(), 4, VideoBudget(keep_ratio=0.25))
    assert len(video.windows) == 10
    assert most <= 2


def test_what_windows_leave_lies_together(built: Any, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors left among the large ones of a window keep the C library from using that memory again."""
    left: list[Any] = []
    read = streaming._read
    monkeypatch.setattr(streaming, "_read", lambda *args: left.extend(args[2]) or read(*args))
    pipeline(built, "qwen3_vl_video", keep_ratio=0.5, window=2).watch(clip)
    assert len(left) == FRAMES // 2
    tensors = [t for piece in left for t in (piece.kept, piece.features, *piece.planes, piece.selection.keep)]
    assert len(left[0].planes) > 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_blocks_of_the_arena_are_as_large_as_they_need_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming._Arena, "_BLOCK", 1000)
    arena = streaming._Arena()
    given = [torch.arange(n).to(kind) for n in (0, 7, 90, 3000) for kind in (torch.bool, torch.bfloat16, torch.long)]
    placed = [arena._copied(tensor) for tensor in given]
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(placed, given, strict=True))


def test_a_template_without_videos_is_refused_before_a_file_is_read(built: Any) -> None:
    model, words = built("qwen2_5_vl_video")
    blind = copy.copy(words)
    blind.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(vtc.InputError, match="leaves videos out"):
        VideoQAPipeline(model, blind, "evs", keep_ratio=0.5)


def test_runs_of_placeholders_become_one() -> None:
    assert _folded("a<v><v>b<v>", "<v>") == ("a<v>b<v>", [2, 1])
    assert _folded("<v>" * 3, "<v>") == ("<v>", [3])
    assert _folded("none", "<v>") == ("none", [])
    text = "<v>" * 100_000
    tracemalloc.start()
    _folded(text, "<v>")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(text)


def test_nothing_stays_open(built: Any, clip: Path, tmp_path: Path) -> None:
    def files() -> list[str]:
        gc.collect()
        found = []
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            except OSError:
                continue
        return sorted(name for name in found if name.endswith((".mp4", ".m4a")))

    pipe = pipeline(built, "llava_onevision_video")
    pipe(clip, QUESTION)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:2000])
    with pytest.raises(vtc.InputError, match=r"broken\.mp4"):
        pipe(broken, QUESTION)
    assert files() == []
