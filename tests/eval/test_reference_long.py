"""The reference model for long clips: how its adapter is trained, and that the shipped one beats its base."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")
pytest.importorskip(
    "vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference from a checkout)"
)

import vtc.reference
from eval.models import Loaded
from eval.reference.evaluate import generated
from eval.reference.train import qwen_cache, qwen_long
from eval.reference.train.qwen_tower import tower_tokens
from eval.tasks import get_task
from eval.tasks.long import make_long_clip
from vtc_reference.loading import add_adapter

if qwen_long.NAME not in vtc.reference.names():
    pytest.skip(f"the weights of {qwen_long.NAME} are not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def base() -> Any:
    return vtc.reference.load("qwen2_5_vl")


@pytest.fixture(scope="module")
def parts(base: Any) -> qwen_long.Parts:
    return qwen_long.draw_parts(base[0].model.visual, "train", 0, [0], 112)[0]


def test_pairs_of_frames_do_not_know_their_clip(base: Any, parts: qwen_long.Parts) -> None:
    """Tokens that are put together are those that the tower gives for the whole clip."""
    clip = make_long_clip(0, 0, "train")
    with torch.no_grad():
        whole = tower_tokens(base[0].model.visual, torch.from_numpy(clip.frames)[None]).view(32, 64, -1)
    for actor in clip.actors:
        number = [other.colour for other in parts.actors].index(actor.colour)
        mine = parts.tokens[parts.shows == number].float()
        step = whole[actor.first // 2]
        assert torch.cdist(mine.flatten(1), step.flatten()[None]).min() < 0.03 * step.norm()
    assert (parts.shows < 0).any()


def test_composed_clips_are_as_the_task_draws_them(parts: qwen_long.Parts) -> None:
    rng, most = np.random.default_rng(0), 0
    for number in range(30):
        clip, tokens = qwen_long.compose(parts, 12 + number, "train", number, rng)
        assert len(tokens) == clip.length // 2 * 64
        steps = tokens.view(-1, 64, tokens.shape[-1])
        shows = {tuple(t[0].tolist()[:4]): int(s) for t, s in zip(parts.tokens, parts.shows, strict=True)}
        spans = sorted((actor.first, actor.last) for actor in clip.actors)
        assert all(0 < first < last <= clip.length for first, last in spans)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for step in range(clip.length // 2):
            seen = [actor.colour for actor in clip.actors if actor.visible(2 * step)]
            which = shows[tuple(steps[step, 0].tolist()[:4])]
            assert seen == ([] if which < 0 else [parts.actors[which].colour])
        most = max(most, *Counter(actor.colour for actor in clip.actors).values())
    assert most == 3


def test_labels_tell_how_often_and_what_before(parts: qwen_long.Parts) -> None:
    _, packer = qwen_long.begin(Path())
    batch = qwen_long.batch_of([parts] * 6, 30, "train", packer, np.random.default_rng(1), qwen_long.KINDS)
    assert {q.kind for row in batch.asked for q in row} == set(qwen_long.KINDS)
    colours = list(qwen_long.COLOURS)
    for row, questions in enumerate(batch.asked):
        for question in questions:
            named = sorted((question.text.find(c), c) for c in colours if c in question.text)
            own = [parts.owned[i] for _, c in named for i, actor in enumerate(parts.actors) if actor.colour == c]
            tokens = [(torch.arange(30)[:, None] * 64 + places).flatten() for places in own]
            shown = [places[batch.seen[row, places] > 0] for places in tokens]
            if question.kind == "times":  # objects stand apart, so that no other is ever seen in these places
                assert int(batch.seen[row, shown[0]].max()) == int(question.answer)
            if question.kind == "before":
                later = bool(batch.earlier[row, shown[0]][:, colours.index(named[1][1])].all())
                assert question.answer == ("after" if later else "before")


def test_an_adapter_begins_with_nothing_and_is_merged_as_trained(base: Any, tmp_path: Path) -> None:
    packed, _ = qwen_long.begin(tmp_path)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = base[0](input_ids=ids).logits
        torch.testing.assert_close(packed.head(packed.decoder(input_ids=ids).last_hidden_state), expected)
        for number, change in enumerate(packed.changes.values()):
            change.lora_A.copy_(change.lora_A.half())  # as it is stored
            change.lora_B.copy_((0.02 * torch.randn(change.lora_B.shape, generator=torch.manual_seed(number))).half())
        wanted = packed.head(packed.decoder(input_ids=ids).last_hidden_state)
        assert not torch.allclose(wanted, expected, atol=0.1)
        packed.write(tmp_path)
        model, _ = vtc.reference.load("qwen2_5_vl")
        add_adapter(model, tmp_path)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_peft_reads_the_shipped_adapter(base: Any) -> None:
    peft = pytest.importorskip("peft")
    model, _ = vtc.reference.load(qwen_long.NAME)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        other, _ = vtc.reference.load("qwen2_5_vl")
        given = peft.PeftModel.from_pretrained(other, qwen_long.PACKAGE / qwen_long.NAME)(input_ids=ids).logits
    torch.testing.assert_close(given, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(given, base[0](input_ids=ids).logits, atol=0.1)


def test_a_few_steps_lower_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(qwen_long, "SHARES", {56: 1.0})
    monkeypatch.setattr(qwen_long, "_MANY", 2)
    monkeypatch.setattr(qwen_long, "TOKENS", 600)
    monkeypatch.setattr(qwen_cache, "BATCH", 2)
    qwen_long.build(tmp_path, clips=4, old=2, held=4)
    history = qwen_long.train(tmp_path, steps=15, folder=tmp_path / "adapter")
    assert {name for losses in history for name in losses} == {"answer", "pointing", "seen", "earlier", "old"}
    answers = [losses["answer"] for losses in history if "answer" in losses]
    assert np.mean(answers[-3:]) < np.mean(answers[:3])
    assert "after 15 steps" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1.5e6


def test_the_shipped_model_answers_what_its_base_was_never_taught(base: Any) -> None:
    model, processor = vtc.reference.load(qwen_long.NAME)
    assert type(model) is type(base[0])
    assert torch.equal(model.model.visual.merger.mlp[-1].weight, base[0].model.visual.merger.mlp[-1].weight)
    task = get_task("long-clips", pictures=2, per_picture=12, seed=950, frames=64)
    samples = [sample for sample in task.samples(None) if sample.meta["kind"] in ("before", "times")][:5]
    assert len(samples) == 5
    right = {}
    for name, loaded in (("base", base), ("long", (model, processor))):
        given = generated(Loaded(*loaded, name, ""), samples, batch=4)
        right[name] = np.mean([answer == sample.target for answer, sample in zip(given, samples, strict=True)])
    assert right["base"] <= 0.2, right
    assert right["long"] >= 0.8, right
    assert "adapter" in vtc.reference._distribution().card(qwen_long.NAME)
    assert vtc.reference.modules(qwen_long.NAME) == {}
