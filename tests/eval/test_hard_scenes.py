"""The hard scenes are as hard as they say, and their answers stay right."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

from eval.models import conversation
from eval.tasks import get_task
from eval.tasks.base import Sample
from eval.tasks.generated import scene_at
from eval.tasks.hard import SHRUNK
from eval.tasks.scenes.vocabulary import DIGITS, GRID, NUMBERS, PATCH, WORDS


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(get_task("hard-scenes", pictures=12, per_picture=4).samples(None))


def test_pictures_take_turns_and_ids_are_unique(samples: list[Sample]) -> None:
    assert {sample.meta["kind"] for sample in samples} == {
        "crowded", "small writing", "absent", "present", "second turn",
    }  # fmt: skip
    assert len({sample.id for sample in samples}) == len(samples)


def test_crowded_pictures_are_crowded(samples: list[Sample]) -> None:
    crowded = [sample for sample in samples if sample.meta["kind"] == "crowded"]
    for sample in crowded:
        scene = scene_at(0, sample.meta["index"])
        assert len(scene.objects) >= 5
        assert len(scene.things) >= 9


def test_small_writing_is_where_the_truth_says(samples: list[Sample]) -> None:
    """The patches that the truth lists hold the colour of the thing that it names."""
    task = get_task("hard-scenes", pictures=12, per_picture=4)
    small = [sample for sample in samples if sample.meta["kind"] == "small writing"]
    assert {sample.target for sample in small} <= {*DIGITS, *WORDS, *NUMBERS}
    for sample in small:
        (image,) = sample.open_images()
        pixels = np.asarray(image, np.float32)
        assert pixels.shape == (224, 224, 3)
        scene = scene_at(0, sample.meta["index"])
        things = [thing for thing in scene.things if thing.role != "distractor"]
        for thing, patches in zip(things, task.truth(sample).things, strict=True):
            x, y = (patches[0] % GRID) * PATCH, (patches[0] // GRID) * PATCH
            left, top, width, height = thing.box
            inside = scene.image[top : top + height, left : left + width].astype(np.float32)
            nearest = np.abs(inside.reshape(-1, 1, 3) - pixels[y + 7, x + 7]).sum(-1).min()
            assert nearest < 60, thing
    assert 0.6 < SHRUNK / 224 < 0.8


def test_absent_objects_are_absent(samples: list[Sample]) -> None:
    asked = [sample for sample in samples if sample.meta["kind"] in ("absent", "present")]
    assert {(sample.meta["kind"], sample.target) for sample in asked} == {("absent", "no"), ("present", "yes")}


def test_false_yes_is_the_share_of_wrong_answers_about_absent_objects() -> None:
    rows = [
        {"kind": "absent", "scores": {"exact": 0.0}},
        {"kind": "absent", "scores": {"exact": 1.0}},
        {"kind": "present", "scores": {"exact": 0.0}},
    ]
    assert get_task("hard-scenes").summarise(rows) == {"exact": pytest.approx(1 / 3), "false_yes": 0.5}


def test_a_second_turn_follows_a_first_about_something_else(samples: list[Sample]) -> None:
    second = [sample for sample in samples if sample.meta["kind"] == "second turn"]
    assert second
    for sample in second:
        ((question, answer),) = sample.earlier
        assert question != sample.question
        chat = conversation([{"type": "image"}], [*sample.earlier, (sample.question, "")])
        assert [message["role"] for message in chat] == ["user", "assistant", "user"]
        assert [part["type"] for part in chat[0]["content"]] == ["image", "text"]
        assert chat[1]["content"][0]["text"] == answer
        assert chat[2]["content"] == [{"type": "text", "text": sample.question}]
