"""Training of compressors on cached features: its pass is the compressed model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("av", reason="clips go through H.264")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc.reference
from eval import models, packed_reader, train_learned
from eval.packed_reader import READERS, ClipReader, PackedReader
from eval.reference.train.packing import IGNORE
from eval.tasks.base import Media, Sample
from eval.tasks.clips.clip import FPS
from eval.tasks.scenes.scene import make_scene
from eval.tasks.video import Frames
from vtc.chat import image_inputs
from vtc.selectors.learned import save_modules
from vtc.selectors.learned.lora import begin_lora, save_lora
from vtc.tuning.train import _predicted

SOURCE = ("--seed", "5", "--count", "1")


def prompt(reader: PackedReader, model: Any, processor: Any, question: str) -> Any:
    """Show the first source of the train split, seed 5, as `generate` gets it."""
    if not isinstance(reader, ClipReader):
        return image_inputs(processor, [Image.fromarray(make_scene("train", 5, 0).image)], question)
    frames = packed_reader.compressed(packed_reader.clip_of("train", 5, 0))
    video = Frames(frames, tuple(range(len(frames))), FPS, len(frames))
    loaded = models.Loaded(model, processor, reader.name, "")
    return models.inputs(loaded, [Sample("", question)], [Media([], video)])


@pytest.mark.parametrize("task", READERS)
@pytest.mark.parametrize(
    ("method", "tokens", "fusion"),
    [("crosslmm", 4, 0), ("vision-remember", 4, 0), ("llava-mini", 16, 0), ("llava-mini", 16, 1), ("pool", 4, 0)],
)
@torch.no_grad()
def test_the_cached_pass_is_the_compressed_model(
    task: str, method: str, tokens: int, fusion: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with other questions packed behind the same picture or clip, and with narrower layers."""
    reader = READERS[task]()
    model, processor = vtc.reference.load(reader.name)
    with monkeypatch.context() as patch:  # of the tower in float32
        patch.setattr(torch, "autocast", lambda *args, **given: nullcontext())
        train_learned.main(["cache", "--task", task, "--split", "train", *SOURCE, "--folder", f"{tmp_path}/train"])
    data = reader.load("train", tmp_path)
    questions = reader.ask(data.scenes[0], 3, 0)
    inputs = prompt(reader, model, processor, questions[1].text)
    text = reader.packer.pack([questions])
    where = text.labels != IGNORE
    answer = text.labels[where & (text.segments == 2)]
    options, adapter, fuse = {}, None, None
    if method == "pool":
        read = packed_reader.selected(reader, "pool", tokens)
    else:
        modules, module = train_learned.begin(method, reader, tokens, fusion=fusion, hidden=64)
        adapter = begin_lora(reader.decoder, 2)
        generator = torch.Generator().manual_seed(0)
        for weight in [*module.parameters(), *adapter.parameters()]:
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
        save_modules(tmp_path / "made", modules, module)
        save_lora(tmp_path / "made", adapter)
        read, fuse = train_learned.reading(reader, module, tokens)
        assert (fuse is None) == (fusion == 0)
        options = {"modules": str(tmp_path / "made")}
    with train_learned.adapted(reader, adapter):
        cached = reader.answer(data.batch([0]), read, text, fuse)[text.segments[where] == 2]
    with vtc.compressed(model, method, keep_tokens=tokens, **options):
        whole = _predicted(model, inputs, answer)
    torch.testing.assert_close(whole, cached, rtol=0.0, atol=0.03)  # the cache is in float16
    left_out = reader.answer(data.batch([0]), lambda views: read(views)[:2], text)[text.segments[where] == 2]
    assert method == "pool" or not torch.allclose(whole, left_out, rtol=0.0, atol=0.1), "modules and adapter count"


def test_a_compressor_may_read_the_tower() -> None:
    reader = READERS["scenes"]()
    compressor = train_learned.begin("llava-mini", reader, 4, tower=True)[1]
    views = torch.randn(1, 1, 256, 384, generator=torch.Generator().manual_seed(0))
    tokens, places = train_learned.Replacing(reader, compressor).read(views)
    torch.testing.assert_close(tokens, compressor(views[:, 0], (16, 16)))
    assert places.tolist() == [[68, 76, 196, 204]]
    with pytest.raises(vtc.ConfigError, match="leave --tower out"):
        train_learned.begin("llava-mini", READERS["clips"](), 4, tower=True)


@pytest.mark.parametrize(("task", "method"), [("scenes", "crosslmm"), ("clips", "llava-mini")])
def test_a_short_run_makes_a_folder_that_can_be_compared(task: str, method: str, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        folder = str(tmp_path / f"{split}-{seed}")
        given = ["--split", split, "--seed", str(seed), "--count", "2", "--folder", folder]
        train_learned.main(["cache", "--task", task, *given])
    made, table = str(tmp_path / "made"), tmp_path / "table.json"
    run = ["--task", task, "--cache", str(tmp_path)]
    size = ["--tokens", "4", "--steps", "2", "--batch", "2", "--lora", "2"]
    train_learned.main(["train", method, *run, *size, "--out", made])
    train_learned.main(["compare", made, *run, "--tokens", "4", "--table", str(table)])
    rows = json.loads(table.read_text())["rows"]
    assert [row["method"] for row in rows] == ["all tokens", "random", "uniform", "pool", "vtc", method]
    assert rows[-1]["tokens"] == 4
    with pytest.raises(vtc.ConfigError, match="C x C tokens"):
        train_learned.main(["train", "llava-mini", *run, "--tokens", "3", "--out", made])


def test_intervals_hold_the_mean() -> None:
    sources = [np.array([1.0, 0.0]), np.array([1.0]), np.array([0.0, 0.0, 1.0])]
    mean, low, high = packed_reader.interval(sources)
    assert mean == 0.5
    assert low < mean < high
