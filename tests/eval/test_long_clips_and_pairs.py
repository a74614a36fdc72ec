"""Long clips and pairs of pictures show what their questions are about, and what they ask has one answer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

import itertools

from eval.tasks import get_task
from eval.tasks.base import Sample
from eval.tasks.generated import scene_at
from eval.tasks.long import KINDS, LENGTHS, ask, make_long_clip
from vtc import ConfigError

CLIPS = 9


@pytest.fixture(scope="module")
def long() -> list[Sample]:
    return list(get_task("long-clips", pictures=CLIPS, per_picture=6).samples(None))


@pytest.fixture(scope="module")
def pairs() -> list[Sample]:
    return list(get_task("picture-pairs", pictures=20, per_picture=4).samples(None))


def test_long_clips_have_all_lengths_and_kinds(long: list[Sample]) -> None:
    assert len({sample.id for sample in long}) == len(long)
    assert {sample.meta["frames"] for sample in long} == set(LENGTHS)
    assert {sample.meta["kind"] for sample in long} == set(KINDS)
    assert all(sample.target in sample.options for sample in long)


def test_long_clips_of_one_length() -> None:
    task = get_task("long-clips", pictures=2, frames=64)
    assert {sample.meta["frames"] for sample in task.samples(None)} == {64}
    assert task.samples(None)[-1].video().frames.shape == (64, 112, 112, 3)
    assert task.truth(task.samples(None)[-1]).grid == (32, 8, 8)
    with pytest.raises(ConfigError, match="64, 128, 256"):
        get_task("long-clips", frames=16)


def test_objects_show_in_their_frames_alone() -> None:
    """Where an object stands, pixels differ between its own frames and the others by more than the noise."""
    for index in range(CLIPS):
        clip = make_long_clip(0, index)
        spans = sorted((actor.first, actor.last) for actor in clip.actors)
        assert all(0 < first < last <= clip.length for first, last in spans)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
        for actor in clip.actors:
            assert 4 <= actor.last - actor.first <= 8
            x, y, size = *actor.start, actor.size
            area = clip.frames[:, y : y + size, x : x + size].astype(np.float32)
            inside = area[actor.first : actor.last].mean(0)
            own = [a for a in clip.actors if a.colour == actor.colour]
            elsewhere = [t for t in range(clip.length) if not any(a.visible(t) for a in own)]
            assert np.abs(inside - area[elsewhere].mean(0)).mean() > 10


def test_answers_follow_from_the_clip(long: list[Sample]) -> None:
    for sample in long:
        clip = make_long_clip(0, sample.meta["index"])
        first = {actor.colour: actor.first for actor in reversed(clip.actors)}
        named = sorted((sample.question.find(colour), colour) for colour in first if colour in sample.question)
        colours = [colour for _, colour in named]
        if sample.meta["kind"] == "times":
            assert sample.target == str(Counter(actor.colour for actor in clip.actors)[colours[0]])
        if sample.meta["kind"] == "order":
            assert sample.target == min(colours, key=first.__getitem__)
        if sample.meta["kind"] == "before":
            assert (sample.target == "before") == (first[colours[0]] < first[colours[1]])


def test_no_answer_to_how_often_is_right_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.tasks.clips.clip.draw", lambda *_: np.empty((0, 0, 0, 3), np.uint8))
    asked = [q for index in range(400) for q in ask(make_long_clip(7, index), 6)]
    counts = Counter(question.answer for question in asked if question.kind == "times")
    assert set(counts) == {"1", "2", "3"}
    assert max(counts.values()) < 0.5 * sum(counts.values())
    before = [question.answer == "before" for question in asked if question.kind == "before"]
    assert 0.4 < np.mean(before) < 0.6


def test_every_long_clip_and_its_truth_are_drawn_again_alike(long: list[Sample]) -> None:
    task = get_task("long-clips", pictures=CLIPS)
    sample = long[0]
    shown = sample.video()
    assert shown.frames.shape == (sample.meta["frames"], 112, 112, 3)
    assert np.array_equal(shown.frames, make_long_clip(0, sample.meta["index"]).frames)
    truth = task.truth(sample)
    assert truth.grid == (sample.meta["frames"] // 2, 8, 8)
    assert all(0 <= cell < np.prod(truth.grid) for thing in truth.things for cell in thing)
    assert all(truth.things)


def test_what_is_asked_of_a_pair_is_in_one_picture(pairs: list[Sample]) -> None:
    kinds = {"first picture": 0, "second picture": 1}
    assert {sample.meta["kind"] for sample in pairs} == set(kinds)
    assert len({sample.id for sample in pairs}) == len(pairs)
    for sample in pairs:
        shown, other = kinds[sample.meta["kind"]], 1 - kinds[sample.meta["kind"]]
        scenes = [scene_at(0, 2 * sample.meta["index"] + number) for number in range(2)]
        for image, scene in zip(sample.open_images(), scenes, strict=True):
            assert np.array_equal(np.asarray(image), scene.image)
        words = {word for thing in scenes[other].objects for word in (thing.colour, thing.name)}
        assert not words & set(sample.question.strip("?").split())
        answers = {word for thing in scenes[shown].objects for word in (thing.colour, thing.name, thing.text)}
        assert sample.target in answers
