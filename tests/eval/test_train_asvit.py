"""Training of thresholds in the tower: the differentiable pass is the compressed tower, and its loss falls."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip("vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference)")

import vtc
import vtc.reference
from eval import train_asvit

RESULT = Path(__file__).parents[2] / "eval/results/asvit/trained.json"
THRESHOLDS = (0.25, 0.45, 0.7)


@pytest.fixture
def reference() -> Iterator[Any]:
    model, processor = vtc.reference.load("llava")
    yield model, processor
    train_asvit.ALL_ATTENTION_FUNCTIONS._local_mapping.pop("vtc-eval-masked", None)


@torch.no_grad()
def test_the_masked_pass_is_the_compressed_tower(reference: Any) -> None:
    model, processor = reference
    images = train_asvit.pictures("train", 5, 2)
    inputs = [processor(images=image, text="<image>\nWhat is there?", return_tensors="pt") for image in images]
    theirs, kept = [], []
    with vtc.compressed(model, "adaptive-sparse-vit", keep_tokens=999, thresholds=THRESHOLDS):
        for row in inputs:
            features = model.model.get_image_features(row["pixel_values"], return_dict=True)
            model(**row)
            (segment,) = vtc.report(model).segments
            kept.append(segment.kept)
            theirs.append(features.pooler_output[0].flatten(0, -2))
    masked = train_asvit.Masked(model.model.vision_tower, 10)
    assert masked.layers == (4, 7, 10)
    hidden, scores = masked.begin(torch.cat([row["pixel_values"] for row in inputs]))
    ours, masks, share = masked(hidden, scores, torch.tensor(THRESHOLDS))
    projected = model.model.multi_modal_projector(ours[:, 1:])
    for row, indices in enumerate(kept):
        assert masks[-1][row, 1:].nonzero()[:, 0].tolist() == indices.tolist()
        # A masked key has a millionth of the weight of a token, and not none.
        torch.testing.assert_close(projected[row, indices], theirs[row][indices], rtol=1e-2, atol=1e-2)
    assert bool(((share > 0.4) & (share < 0.9)).all())
    away = train_asvit.turned(ours, masked.full(hidden), masks[-1])
    assert bool(((away > 0) & (away < 0.5)).all())


def test_training_meets_the_share(reference: Any) -> None:
    model, processor = reference
    masked = train_asvit.Masked(model.model.vision_tower, 10)
    pixels = train_asvit.pixels_of(processor, train_asvit.pictures("train", 5, 4))
    before = train_asvit.measure(masked, pixels, masked.initial)
    arguments = argparse.Namespace(steps=4, batch=4, rate=5e-4, share=before["share"] - 0.2, share_weight=2.0, seed=0)
    thresholds, history = train_asvit.train(masked, pixels, arguments)
    after = train_asvit.measure(masked, pixels, thresholds)
    assert abs(after["share"] - arguments.share) < 0.5 * abs(before["share"] - arguments.share)
    assert history[-1]["loss"] < history[0]["loss"]
    assert not any(weight.requires_grad for weight in model.model.vision_tower.parameters())


def test_the_committed_thresholds_are_a_configuration() -> None:
    config = vtc.CompressionConfig.load(RESULT)
    assert config.method == "adaptive-sparse-vit"
    assert len(config.options["thresholds"]) == 3
