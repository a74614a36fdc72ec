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
from tests import learned
from vtc.chat import image_inputs
from vtc.engine.install import adapter_for
from vtc.engine.plan import shape_of
from vtc.selectors.learned import save_modules
from vtc.selectors.learned.llava_mini.training import begin
from vtc.tuning.train import _predicted


@pytest.mark.parametrize("fusion", [0, 1])
@torch.no_grad()
def test_the_cached_pass_is_the_compressed_model(tmp_path: Path, fusion: int) -> None:
    """Also with other questions packed behind the same picture, and with narrower layers."""
    reader = train_llava_mini.Reader()
    model, processor = vtc.reference.load("llava")
    scene = make_scene("train", 5, 0)
    questions = ask(scene, 3)
    question = questions[1]
    inputs = image_inputs(processor, [Image.fromarray(scene.image)], question.text)
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    features = hidden[model.config.vision_feature_layer][:, 1:]
    decoder = train_llava_mini.narrower(learned.decoder_of(model), 64)
    projector = learned.projector_of(model)
    modules, module = begin(shape_of(adapter_for(model)), projector, decoder, side=2, fusion=fusion)
    for weight in module.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save_modules(tmp_path, modules, module)
    text = reader.packer.pack([questions])
    tokens, fuse = train_llava_mini.replaced(reader, module), train_llava_mini.fused(reader, module)
    assert (fuse is None) == (fusion == 0)
    where = text.labels != IGNORE
    cached = reader.answer(features[:, None], tokens, text, fuse)[text.segments[where] == 2]
    answer = text.labels[where & (text.segments == 2)]
    with vtc.compressed(model, "llava-mini", modules=str(tmp_path), keep_tokens=4):
        whole = _predicted(model, inputs, answer)
    torch.testing.assert_close(whole, cached, rtol=1e-4, atol=1e-4)


def test_intervals_hold_the_mean() -> None:
    scenes = [np.array([1.0, 0.0]), np.array([1.0]), np.array([0.0, 0.0, 1.0])]
    mean, low, high = train_llava_mini.interval(scenes)
    assert mean == 0.5
    assert low < mean < high
