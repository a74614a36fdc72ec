"""Questions about a marked box, and the methods that they compare."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

from eval import regions
from eval.packed_reader import Reader
from eval.reference.train.cache import Data
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene

SCENES = [make_scene("test", 33, index) for index in range(3)]


def test_questions_do_not_name_their_thing() -> None:
    for scene in SCENES:
        for question in ask(scene, 4, kinds=("region",)):
            (index,) = question.targets
            thing = scene.things[index]
            assert question.kind == "region"
            assert question.answer in (thing.colour, thing.name, thing.text)
            assert question.answer in question.options
            assert thing.colour not in question.text
            assert thing.name not in question.text.replace("sign", "") or thing.role == "sign"


def test_boxes_hold_the_patches_of_their_thing() -> None:
    for scene in SCENES:
        for thing in scene.named:
            assert set(thing.patches) <= set(regions.in_box(thing).tolist())


def test_budgets_hold_and_all_methods_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(len(SCENES), 1, 256, 384, generator=torch.Generator().manual_seed(0)).half().numpy()
    data = Data([features], SCENES, [(0, index) for index in range(len(SCENES))])
    monkeypatch.setattr(regions, "BUDGETS", (4,))
    found = regions.compare(Reader(), data, 2)
    kept = {row["method"]: row["kept"] for row in found["rows"]}
    assert kept["random"] == kept["uniform"] == 4
    assert kept["pixelrefer"] == kept["tokens of the box"] == 4
    assert kept["all tokens"] == 256
    assert 4 < kept["all tokens of the box"] < 256
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in found["rows"])
