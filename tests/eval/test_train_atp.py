"""Training of thresholds: the differentiable pass is the compressed model, and its losses fall."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc.reference
from eval import train_atp
from eval.reference.train.__main__ import Data
from eval.reference.train.cache import tower_features
from eval.reference.train.packing import IGNORE, Packer
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.vocabulary import GRID
from vtc.core.stage import ModelShape
from vtc.selectors.learned.atp import AtpModule, AtpSelector, load_modules, save_modules

SCENES = 3


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [make_scene("train", 5, index) for index in range(SCENES)]


@pytest.fixture
def reference() -> Iterator[Any]:
    model, processor = vtc.reference.load("llava")
    yield model, processor
    train_atp.ALL_ATTENTION_FUNCTIONS._local_mapping.pop("vtc-eval-gated", None)


def modules_for(model: Any, width: int = 8) -> list[AtpModule]:
    torch.manual_seed(0)
    modules = [AtpModule(GRID, width) for _ in train_atp.places(model, AtpSelector())]
    with torch.no_grad():  # the grid counts at one place and not at the others
        modules[1].head_s.bias.fill_(-3.0)
        modules[1].head_s.weight.zero_()
    return modules


@torch.no_grad()
def test_the_gated_pass_is_the_compressed_model(reference: Any, scenes: list[Any], tmp_path: Path) -> None:
    model, processor = reference
    questions = [ask(scene, 1)[0] for scene in scenes]
    modules, path = modules_for(model), str(tmp_path / "modules.pt")
    save_modules(modules, path)
    theirs, kept, features = [], [], []
    for scene, question in zip(scenes, questions, strict=True):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=Image.fromarray(scene.image), text=[prompt], return_tensors="pt")
        features.append(model.model.vision_tower(inputs.pixel_values, output_hidden_states=True).hidden_states[-2])
        with vtc.compressed(model, "atp", keep_tokens=GRID**2, modules=path):
            theirs.append(model(**inputs, logits_to_keep=1).logits[0, -1])
            kept.append([selection for _, selection in vtc.report(model).segments[0].selections])

    gated = train_atp.Gated(model, modules, AtpSelector())
    text = Packer(processor.tokenizer, gated.first + GRID**2, 40).pack([[question] for question in questions])
    logits, masks = gated(torch.cat(features)[:, 1:], text)
    answered = (text.labels != IGNORE).sum(dim=1)
    starts = answered.cumsum(0) - answered
    torch.testing.assert_close(logits[starts], torch.stack(theirs), rtol=1e-3, atol=1e-3)
    counts = set()
    for row, selections in enumerate(kept):
        left = torch.arange(GRID**2)
        for mask, selection in zip(masks, selections, strict=True):
            left = left[selection.keep]
            assert torch.equal(mask[row].nonzero()[:, 0], left)
            counts.add(len(left))
    assert len(counts) > 3, "images and places differ"
    assert 1 < min(counts) < max(counts) < GRID**2


@pytest.mark.parametrize("soft", [False, True])
def test_losses_fall_and_every_module_learns(
    reference: Any, scenes: list[Any], soft: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = reference
    pixels = processor.image_processor([Image.fromarray(s.image) for s in scenes], return_tensors="pt").pixel_values
    features = tower_features(model.model.vision_tower, pixels)[0]
    data = Data([features[:, None].numpy()], scenes, [(0, index) for index in range(SCENES)])
    modules = modules_for(model)
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    gated = train_atp.Gated(model, modules, AtpSelector(), soft=soft)
    weights = model.lm_head.weight.clone()
    settings = {"steps": 6, "batch": 2, "rate": 0.01, "target": 0.1, "target_weight": 0.02, "depth_weight": 0.01}
    packer = Packer(processor.tokenizer, gated.first + GRID**2, 40)
    history = train_atp.train(gated, packer, data, argparse.Namespace(seed=0, **settings))
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert abs(history[-1]["kept"] - 0.1 * GRID**2) < abs(history[0]["kept"] - 0.1 * GRID**2)
    for module, state in zip(modules, before, strict=True):
        assert all(not torch.equal(value, state[name]) for name, value in module.state_dict().items() if "mix" in name)
    assert torch.equal(model.lm_head.weight, weights), "the model is frozen"
    assert not capsys.readouterr().out


def test_the_modules_that_are_shipped_fit_the_reference() -> None:
    root = Path(__file__).parents[2]
    config = vtc.CompressionConfig.load(root / "eval" / "results" / "atp" / "trained.json")
    selector = AtpSelector(modules=str(root / config.options["modules"])).resolve(ModelShape(6), None)
    assert selector.layers == (0, 2, 4)
    assert {module.grid for module in load_modules(selector.modules)} == {GRID}
