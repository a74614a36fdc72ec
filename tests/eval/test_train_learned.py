"""Training of methods that update hidden states, on cached features: its pass is the compressed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc.reference
from eval import train_learned
from eval.reference.train.cache import Data
from eval.reference.train.packing import IGNORE
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene
from eval.train_llava_mini import Reader
from vtc.chat import image_inputs
from vtc.selectors.learned import save_modules
from vtc.selectors.learned.lora import begin_lora, save_lora


@pytest.mark.parametrize("method", train_learned.METHODS)
@torch.no_grad()
def test_the_cached_pass_is_the_compressed_model(method: str, tmp_path: Path) -> None:
    reader = Reader()
    model, processor = vtc.reference.load("llava")
    modules, module = train_learned.begin(method, model)
    adapter = begin_lora(reader.decoder, 2)
    generator = torch.Generator().manual_seed(0)
    for weight in [*module.parameters(), *adapter.parameters()]:
        weight += 0.05 * torch.randn(weight.shape, generator=generator)
    save_modules(tmp_path / "made", modules, module)
    save_lora(tmp_path / "made", adapter)
    question = ask(make_scene("train", 5, 0), 1)[0]
    inputs = image_inputs(processor, [Image.fromarray(make_scene("train", 5, 0).image)], question.text)
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    views = torch.stack([hidden[level + 1][:, 1:] for level in (3, 6, 10)], dim=1)
    text = reader.packer.pack([[question]])
    read = train_learned.Updating(reader, module, 4).read
    with train_learned.adapted(reader, adapter):
        cached = reader.answer(views, read, text)
    answer = text.labels[text.labels != IGNORE]
    ids = torch.cat([inputs["input_ids"], answer[None, :-1]], dim=1)
    with vtc.compressed(model, method, modules=str(tmp_path / "made"), keep_tokens=4):
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(whole.logits[0, -len(answer) :], cached, rtol=1e-3, atol=1e-3)
    pooled = reader.answer(views, lambda given: read(given)[:2], text)
    assert not torch.allclose(pooled, cached, atol=0.1), "the modules and the adapter count"


def test_a_short_run_makes_a_folder_that_can_be_compared(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        folder = str(tmp_path / f"{split}-{seed}")
        train_learned.main(["cache", "--split", split, "--seed", str(seed), "--count", "2", "--folder", folder])
    assert Data.load("test", tmp_path).batch([0, 1]).shape == (2, 3, 256, 384)
    run = ["--cache", str(tmp_path), "--tokens", "4", "--steps", "2", "--batch", "2", "--lora", "2"]
    train_learned.main(["train", "crosslmm", *run, "--out", str(tmp_path / "made")])
    table = tmp_path / "table.json"
    train_learned.main(["compare", str(tmp_path / "made"), "--cache", str(tmp_path), "--table", str(table)])
    assert '"method": "crosslmm"' in table.read_text()
