"""Training of LLaVA-Mini on cached features: its pass is the compressed model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc.reference
from eval import train_llava_mini
from eval.reference.train.packing import IGNORE
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene
from vtc.chat import image_inputs
from vtc.engine.install import adapter_for
from vtc.engine.plan import shape_of
from vtc.selectors.learned import save_modules
from vtc.selectors.learned.llava_mini.training import begin


@torch.no_grad()
def test_the_cached_pass_is_the_compressed_model(tmp_path: Path) -> None:
    reader = train_llava_mini.Reader()
    model, processor = vtc.reference.load("llava")
    scene = make_scene("train", 5, 0)
    question = ask(scene, 1)[0]
    inputs = image_inputs(processor, [Image.fromarray(scene.image)], question.text)
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    features = hidden[model.config.vision_feature_layer][:, 1:]
    modules, module = begin(shape_of(adapter_for(model)), model.model.multi_modal_projector.state_dict(), side=2)
    save_modules(tmp_path, modules, module)
    text = reader.packer.pack([[question]])
    cached = reader(*train_llava_mini.replaced(module)(features[:, None]), text)
    answer = text.labels[text.labels != IGNORE]
    ids = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    with vtc.compressed(model, "llava-mini", modules=str(tmp_path), keep_tokens=4):
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(whole.logits[0, -len(answer) :], cached, rtol=1e-4, atol=1e-4)


def test_intervals_hold_the_mean() -> None:
    scenes = [np.array([1.0, 0.0]), np.array([1.0]), np.array([0.0, 0.0, 1.0])]
    mean, low, high = train_llava_mini.interval(scenes)
    assert mean == 0.5
    assert low < mean < high
