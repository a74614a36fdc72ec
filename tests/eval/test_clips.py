"""The clips: reproducible, disjoint, and their answers follow from what is drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval.tasks.clips.clip import DIRECTIONS, SIDE, Actor, Clip, cells, make_clip
from eval.tasks.clips.files import read_mp4, write_mp4, write_task
from eval.tasks.clips.questions import KINDS, ask, part_of
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.vocabulary import COLOURS

CLIPS = [make_clip("train", 5, index) for index in range(24)]
ASKED = [(clip, question) for clip in CLIPS for question in ask(clip, 12)]


def test_equal_arguments_give_equal_clips_and_questions() -> None:
    again = make_clip("train", 5, 7)
    assert np.array_equal(again.frames, CLIPS[7].frames)
    assert again.actors == CLIPS[7].actors
    assert ask(again, 9) == ask(CLIPS[7], 9)
    assert ask(again, 9, seed=1) != ask(CLIPS[7], 9)


def test_clips_of_other_splits_seeds_and_indices_differ() -> None:
    frames = [
        make_clip(split, seed, index, (8,)).frames for split in ("train", "test") for seed in (0, 1) for index in (0, 1)
    ]
    for i, one in enumerate(frames):
        assert all(not np.array_equal(one, other) for other in frames[i + 1 :])


def seen(clip: Clip, actor: Actor, frame: int) -> bool:
    """Whether the middle of an object really has its colour in a frame, read from the pixels."""
    left, top = actor.corner(frame, clip.length)
    row, column = top + int(0.6 * actor.size), left + int(0.5 * actor.size)
    patch = clip.frames[frame, row - 2 : row + 3, column - 2 : column + 3].reshape(-1, 3).astype(float)
    return bool(np.abs(patch.mean(0) - np.asarray(COLOURS[actor.colour])).max() < 26)


def test_pixels_show_what_the_description_says() -> None:
    shown, hidden = [], []
    for clip in CLIPS:
        for actor in clip.objects:
            if actor.name == "cup":  # its middle is not its centre of mass
                continue
            for frame in range(clip.length):
                (shown if actor.visible(frame) else hidden).append(seen(clip, actor, frame))
    assert len(hidden) > 50
    assert np.mean(shown) == 1.0
    assert np.mean(hidden) < 0.1  # a background may happen to have the colour


def object_named(clip: Clip, question: Question) -> Actor:
    return clip.actors[question.targets[0]]


def test_motion_answers_agree_with_the_corners() -> None:
    asked = [(clip, q) for clip, q in ASKED if q.kind == "motion"]
    assert len(asked) > 10
    for clip, question in asked:
        actor = object_named(clip, question)
        (x0, y0), (x1, y1) = actor.corner(0, clip.length), actor.corner(clip.length - 1, clip.length)
        step = DIRECTIONS[question.answer]
        assert (np.sign(x1 - x0), np.sign(y1 - y0)) == step


def test_order_and_when_answers_agree_with_the_events() -> None:
    for clip, question in ASKED:
        if question.kind == "order":
            early, late = (clip.actors[i] for i in question.targets)
            appears = "disappears" not in question.text
            assert (early.first < late.first) if appears else (early.last < late.last < clip.length)
            assert question.answer == early.colour
            assert early.colour in question.text
            assert late.colour in question.text
        elif question.kind == "when":
            actor = object_named(clip, question)
            frame = actor.last if "disappear" in question.text else actor.first
            assert 0 < frame < clip.length
            assert frame % 2 == 0
            assert question.answer == part_of(frame, clip.length)


@pytest.mark.parametrize(
    ("frame", "length", "word"), [(2, 8, "start"), (4, 8, "middle"), (6, 8, "end"), (6, 16, "start")]
)
def test_parts_of_a_clip(frame: int, length: int, word: str) -> None:
    assert part_of(frame, length) == word


def test_changes_and_counts_agree_with_who_is_there() -> None:
    for clip, question in ASKED:
        first, last = ({a for a in clip.objects if a.visible(t)} for t in (0, clip.length - 1))
        if question.kind == "change":
            (only,) = (
                (last - first) if "that appears" in question.text or "it appears" in question.text else (first - last)
            )
            assert question.answer in (only.colour, only.name)
        elif question.kind == "count":
            group = (
                first
                if question.text.endswith("start?")
                else last
                if question.text.endswith("end?")
                else set(clip.objects)
            )
            assert question.answer == str(len(group))


def test_answers_are_options_and_no_kind_is_given_away_by_one_answer() -> None:
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for index in range(150):
        for question in ask(make_bare(index), 10):
            assert question.answer in question.options
            answers[question.kind][question.answer] += 1
    for kind, counter in answers.items():
        assert counter.total() > 100, kind
        assert counter.most_common(1)[0][1] < 0.55 * counter.total(), kind


def make_bare(index: int) -> Clip:
    return make_clip("test", 3, index, (8,))


def test_cells_cover_the_object_where_it_is() -> None:
    still = Actor("object", "square", "red", 28, (14, 28), (14, 28), "", 2, 8)
    assert cells(still, 8) == tuple(t * 64 + r * 8 + c for t in (1, 2, 3) for r in (2, 3) for c in (1, 2))
    for clip in CLIPS:
        for actor in clip.objects:
            own = cells(actor, clip.length)
            assert own
            assert max(own) < clip.length // 2 * 64
            assert {i // 64 for i in own} == {t // 2 for t in range(clip.length) if actor.visible(t)}


def test_files_hold_the_clips(tmp_path: Path) -> None:
    total = write_task(tmp_path, "test", 2, per_clip=5)
    records = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(records) == total == 10
    for index, name in enumerate(sorted({record["video"] for record in records})):
        frames = read_mp4(tmp_path / name)
        clip = make_clip("test", 0, index)
        assert frames.shape == (clip.length, SIDE, SIDE, 3)
        assert np.abs(frames.astype(float) - clip.frames).mean() < 6  # lossy, but the same clip
        assert (tmp_path / name).stat().st_size < 200_000
    expected = [q.answer for index in range(2) for q in ask(make_clip("test", 0, index), 5)]
    assert [record["answer"] for record in records] == expected


def test_the_same_frames_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, CLIPS[0].frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
