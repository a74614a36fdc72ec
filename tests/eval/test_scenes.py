"""The scenes are what they claim to be: reproducible, split cleanly, and asked about truthfully."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

from eval.tasks.scenes import oracle, sources
from eval.tasks.scenes.questions import MARGIN, ask
from eval.tasks.scenes.scene import Scene, make_scene
from eval.tasks.scenes.vocabulary import CANVAS, COLOURS, GRID, KINDS, PATCH, SHAPES
from eval.tasks.scenes.writer import write


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(split, 11, index) for split in sources.SPLITS for index in range(30)]


def test_a_scene_depends_on_its_arguments_only() -> None:
    first = make_scene("test", 0, 5)
    make_scene("train", 3, 1)  # whatever is drawn in between
    again = make_scene("test", 0, 5)
    assert np.array_equal(first.image, again.image)
    assert first.things == again.things
    assert ask(first, 10) == ask(again, 10)
    for other in (make_scene("test", 0, 6), make_scene("test", 1, 5), make_scene("train", 0, 5)):
        assert not np.array_equal(first.image, other.image)


def test_the_splits_share_no_material() -> None:
    photographs = [set(sources.PHOTOGRAPHS[split]) for split in sources.SPLITS]
    fonts = [set(sources.FONTS[split]) for split in sources.SPLITS]
    digits = [
        {hashlib.sha256(image.tobytes()).hexdigest() for group in sources.handwritten(split) for image in group}
        for split in sources.SPLITS
    ]
    # The two motorcycle photographs show one place from two eyes: both names must never sit in different splits.
    assert sum(any("motorcycle" in name for name in names) for names in photographs) == 1
    for train, test in (photographs, fonts, digits):
        assert train
        assert test
        assert not train & test


def test_layouts_of_the_splits_differ() -> None:
    layouts = [{tuple(t.box for t in make_scene(split, 0, i).things) for i in range(20)} for split in sources.SPLITS]
    assert not (layouts[0] & layouts[1]) - {()}


def test_things_do_not_overlap_and_stay_inside(scenes: list[Scene]) -> None:
    for scene in scenes:
        cover = np.zeros((CANVAS, CANVAS), int)
        for left, top, width, height in (thing.box for thing in scene.things):
            assert left >= 0
            assert top >= 0
            assert left + width <= CANVAS
            assert top + height <= CANVAS
            cover[top : top + height, left : left + width] += 1
        assert cover.max(initial=0) <= 1
        colours = [thing.colour for thing in scene.objects]
        assert len(set(colours)) == len(colours), "a colour must name one object"


def test_patches_lie_under_their_thing(scenes: list[Scene]) -> None:
    for thing in (thing for scene in scenes for thing in scene.things):
        left, top, width, height = thing.box
        assert thing.patches
        for patch in thing.patches:
            row, column = divmod(patch, GRID)
            assert column * PATCH < left + width
            assert left < (column + 1) * PATCH
            assert row * PATCH < top + height
            assert top < (row + 1) * PATCH
        area = len(thing.patches) * PATCH * PATCH
        assert area <= 2.2 * width * height or len(thing.patches) == 1


def test_an_object_really_has_its_colour(scenes: list[Scene]) -> None:
    """The middle of a plain square shows the colour that the scene says: drawing and bookkeeping agree."""
    seen = 0
    for scene in scenes:
        for thing in scene.objects:
            if thing.name == "square" and not thing.text:
                x, y = (int(v) for v in thing.centre)
                pixel = scene.image[y - 3 : y + 3, x - 3 : x + 3].reshape(-1, 3).mean(0)
                distances = {name: np.abs(pixel - rgb).sum() for name, rgb in COLOURS.items()}
                assert min(distances, key=distances.__getitem__) == thing.colour
                seen += 1
    assert seen >= 5


def _answer_from_geometry(scene: Scene, kind: str, text: str) -> str | None:
    """Answer by reading the question and the boxes again, independently of how it was asked; None: not understood."""
    words = text.lower().replace("?", "").replace(".", "").split()
    objects = scene.objects
    colours = [w for w in words if w in COLOURS]
    shapes = [
        w.removesuffix("s") if w not in SHAPES else w for w in words if w.removesuffix("s") in SHAPES or w in SHAPES
    ]
    if kind == "exist":
        return "yes" if any((not shapes or t.name == shapes[0]) and t.colour == colours[0] for t in objects) else "no"
    if kind == "count":
        return str(sum(not shapes or thing.name == shapes[0] for thing in objects))
    if kind == "colour":
        (thing,) = (t for t in objects if t.name == shapes[0])
        return thing.colour
    if kind == "shape":
        (thing,) = (t for t in objects if t.colour == colours[0])
        return thing.name
    if kind == "extreme":
        key = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
        axis, sign = next(key[w] for w in words if w in key)
        thing = min(objects, key=lambda t: sign * t.centre[axis])
        return thing.name if "shape" in words else thing.colour
    if kind == "place" and (colours or shapes):
        (thing,) = (
            t for t in objects if (not colours or t.colour == colours[0]) and (not shapes or t.name == shapes[0])
        )
        x, y = thing.centre
        return f"{'top' if y < CANVAS / 2 else 'bottom'} {'left' if x < CANVAS / 2 else 'right'}"
    if kind == "digit":
        (thing,) = (
            t for t in objects if (not colours or t.colour == colours[0]) and (not shapes or t.name == shapes[0])
        )
        return thing.text
    if kind == "reading":
        papers = [w for w in words if w in ("white", "black")]
        (thing,) = (t for t in scene.signs if not papers or t.colour == papers[0])
        return thing.text
    return None


def test_answers_follow_from_the_boxes(scenes: list[Scene]) -> None:
    checked: dict[str, int] = dict.fromkeys(KINDS, 0)
    for scene in scenes:
        for question in ask(scene, 24):
            assert question.answer in question.options
            assert all(0 <= i < len(scene.things) for i in question.targets)
            expected = _answer_from_geometry(scene, question.kind, question.text)
            if expected is not None:
                assert question.answer == expected, (question.text, scene.things)
                checked[question.kind] += 1
    del checked["relation"]  # has a test of its own below
    assert min(checked.values()) >= 20, checked


def test_relations_follow_from_the_boxes(scenes: list[Scene]) -> None:
    axes = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
    compared = named = 0
    for scene in scenes:
        for question in ask(scene, 12, kinds=("relation",)):
            axis, sign = next(value for phrase, value in axes.items() if phrase in question.text)
            first, second = (scene.things[i] for i in question.targets)
            lead = sign * (second.centre[axis] - first.centre[axis])
            assert abs(lead) >= MARGIN
            if question.answer in ("yes", "no"):
                assert question.answer == ("yes" if lead > 0 else "no")
                compared += 1
            else:  # "what is left of X": the one object on that side of the anchor
                there = [
                    t for t in scene.objects if sign * (second.centre[axis] - t.centre[axis]) > 0 and t is not second
                ]
                assert [f"{t.colour} {t.name}" for t in there] == [question.answer]
                named += 1
    assert compared >= 20
    assert named >= 20


def test_every_kind_is_asked_and_no_answer_dominates() -> None:
    answers: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for index in range(150):
        for question in ask(make_scene("test", 0, index), 12):
            tally = answers[question.kind]
            tally[question.answer] = tally.get(question.answer, 0) + 1
    for kind, tally in answers.items():
        total = sum(tally.values())
        assert total >= 60, kind
        assert max(tally.values()) / total <= 0.62, (kind, tally)


def test_distractors_are_never_named(scenes: list[Scene]) -> None:
    assert sum(len(scene.distractors) for scene in scenes) > 60
    for scene in scenes:
        for question in ask(scene, 20):
            assert not {"cross", "ring", "checker", "stripes", "print"} & set(question.text.lower().split())
            assert all(scene.things[i].role != "distractor" for i in question.targets + question.focus)


def test_the_oracle_takes_turns(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes:
        for budget in (1, 14, 28, 256, 400):
            kept = oracle.round_robin(scene.things, budget, rng)
            assert len(kept) == len(set(kept.tolist())) == min(budget, GRID * GRID)
            counts = [len(set(kept.tolist()) & set(thing.patches)) for thing in scene.named]
            if budget >= len(scene.named):
                assert all(counts)
            unfilled = [n for n, t in zip(counts, scene.named, strict=True) if n < len(t.patches)]
            if unfilled and budget <= sum(len(t.patches) for t in scene.named):
                assert max(counts) - min(unfilled) <= max(len(t.patches) for t in scene.named)
                assert max(unfilled) - min(unfilled) <= 1


def test_the_anti_oracle_avoids_objects_while_it_can(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes:
        owned = {patch for thing in scene.named for patch in thing.patches}
        kept = set(oracle.anti_oracle(scene.things, 28, rng).tolist())
        assert len(kept) == 28
        assert not kept & owned


def test_written_files_hold_the_same_scenes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    written = write(tmp_path, "test", 3, per_scene=5)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == written == 15
    assert len({line["question_id"] for line in lines}) == written
    for index in range(3):
        scene = make_scene("test", 0, index)
        mine = [line for line in lines if line["image"] == f"images/test-0-{index:05d}.png"]
        assert np.array_equal(np.asarray(Image.open(tmp_path / mine[0]["image"])), scene.image)
        assert [(line["question"], line["answer"]) for line in mine] == [(q.text, q.answer) for q in ask(scene, 5)]
        assert [item["box"] for item in mine[0]["objects"]] == [list(thing.box) for thing in scene.things]
