"""Questions about a marked box, and the methods that they compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc
from eval import regions
from eval.packed_reader import Reader
from eval.reference.train.cache import Data
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene
from tests import learned

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


def test_budgets_hold_and_all_methods_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    features = torch.randn(len(SCENES), 1, 256, 384, generator=torch.Generator().manual_seed(0)).half().numpy()
    data = Data([features], SCENES, [(0, index) for index in range(len(SCENES))])
    monkeypatch.setattr(regions, "BUDGETS", (4,))
    reader = Reader()
    found = regions.compare(reader, data, 2, Path(learned.pixelrefer(reader.model, tmp_path, scale=0.0)))
    kept = {row["method"]: row["kept"] for row in found["rows"]}
    assert kept["random"] == kept["uniform"] == kept["pixelrefer, trained"] == 4
    assert kept["pixelrefer"] == kept["tokens of the box"] == 4
    assert kept["all tokens"] == 256
    assert 4 < kept["all tokens of the box"] < 256
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in found["rows"])


def test_samples_are_what_training_reads(tmp_path: Path) -> None:
    regions.main(["samples", "--scenes", "2", "--questions", "2", "--out", str(tmp_path)])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {sample["image"] for sample in samples} == {"scene-0000.png", "scene-0001.png"}
    for sample in samples:
        width, height = vtc.open_image(tmp_path / sample["image"]).size
        left, top, right, bottom = sample["region"]
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert sample["question"].endswith("?")
        assert sample["answer"]
