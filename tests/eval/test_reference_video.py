"""The qwen2_5_vl reference model: how it is trained, and that the shipped one answers about its sample clips."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model
from transformers.video_utils import VideoMetadata

import vtc.reference
from eval.models import Loaded
from eval.reference.evaluate import generated
from eval.reference.train import __main__ as training
from eval.reference.train import qwen_cache, qwen_scales, qwen_tower
from eval.reference.train.cache import PATCH, TOKENIZER
from eval.reference.train.labels import ATTRIBUTES, EVENTS, clip_labels, event_labels, scene_labels
from eval.reference.train.models import HIDDEN, PackedQwen, new_model
from eval.reference.train.packing import IGNORE, Packer, attention_mask
from eval.reference.train.qwen_cache import draw_clips, reframed
from eval.reference.train.qwen_convert import convert
from eval.reference.train.qwen_crops import make_crop
from eval.reference.train.qwen_tower import patchify, tower_tokens
from eval.tasks.base import Sample
from eval.tasks.clips.clip import FPS, cells, make_clip
from eval.tasks.clips.questions import ask as ask_clip
from eval.tasks.clips.questions import part_of
from eval.tasks.scenes.scene import make_scene
from eval.tasks.video import VideoSource

TOKENS = AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return new_model("qwen2_5_vl").eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return _shipped("qwen2_5_vl")[1]


def test_patches_are_those_of_the_processor(processor: Any) -> None:
    image = make_scene("test", 0, 0).image[:112]
    pixels = processor.image_processor(images=image, return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 8, 16]]
    still = torch.from_numpy(image)[None, None].expand(1, 2, -1, -1, -1)
    assert torch.allclose(patchify(still)[0], pixels["pixel_values"], atol=1e-5)
    clip = make_clip("test", 0, 0, (8,))
    videos = processor.video_processor(videos=[clip.frames], return_tensors="pt")
    assert videos["video_grid_thw"].tolist() == [[4, 8, 8]]
    assert torch.allclose(patchify(torch.from_numpy(clip.frames)[None])[0], videos["pixel_values_videos"], atol=1e-5)


def test_conversion_keeps_what_the_teacher_computes() -> None:
    """On pictures that the conversion has not seen, but for absolute places, which cannot be converted.

    A random teacher is the hardest there is: all its units and directions matter, and half of them are left out. An
    unconverted tower scores 0.0.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
    teacher = Dinov2Model(Dinov2Config(**shape)).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(2.5)
        teacher.embeddings.position_embeddings.zero_()
        visual: Any = convert(teacher, torch.stack([picture(i) for i in range(6)]))
        fresh = torch.stack([picture(i) for i in range(6, 9)])
        states: list[torch.Tensor] = []
        visual.blocks[-1].register_forward_hook(lambda _, __, out: states.append(out))
        patches = (
            fresh.view(3, 3, 16, 14, 16, 14)
            .permute(0, 2, 4, 1, 3, 5)[:, :, :, :, None]
            .expand(-1, -1, -1, -1, 2, -1, -1)
        )
        visual(patches.reshape(768, -1), grid_thw=torch.tensor([[1, 16, 16]] * 3))
        wanted = teacher(fresh, output_hidden_states=True).hidden_states[6][:, 1:]
    order = torch.arange(256).view(2, 8, 2, 8).permute(0, 2, 1, 3).flatten()  # the tower works in windows of 8 x 8
    found = states[0].view(3, 256, -1)
    wanted = (wanted - wanted.mean(-1, keepdim=True))[:, order]
    found, wanted = (t - t.mean((0, 1)) for t in (found, wanted))
    assert torch.cosine_similarity(found, wanted, dim=-1).mean() > 0.65


def picture(seed: int) -> torch.Tensor:
    """A normalised crop, ``(3, 224, 224)``."""
    frames, _ = make_crop(224, False, np.random.default_rng([1, seed]))
    return torch.from_numpy(frames[0]).permute(2, 0, 1).float() / 64 - 2


def test_crops_are_reproducible_and_labelled() -> None:
    one, labels = make_crop(112, True, np.random.default_rng(3))
    two, _ = make_crop(112, True, np.random.default_rng(3))
    assert np.array_equal(one, two)
    assert labels.shape == (len(ATTRIBUTES), 8, 8)
    many = [make_crop(112, bool(i % 2), np.random.default_rng(i)) for i in range(30)]
    for row, attribute in enumerate(ATTRIBUTES):
        classes = np.concatenate([crop_labels[row].ravel() for _, crop_labels in many])
        assert 0 < classes.max() <= len(ATTRIBUTES[attribute])
    moved = [labels[3] for _, labels in many[1::2] if labels[3].any()]
    assert moved, "some crops must hold motion"
    assert all(not labels[3].any() for _, labels in many[::2]), "crops at rest hold none"


def test_scenes_of_other_sizes_keep_their_things() -> None:
    found = 0
    for index in range(12):
        scene = make_scene("test", 1, index)
        for height, width in ((168, 224), (224, 280)):
            other = reframed(scene, height, width)
            if other is None:
                continue
            found += 1
            assert other.image.shape == (height, width, 3)
            for before, after in zip(scene.things, other.things, strict=True):
                left, top, w, h = after.box
                assert 0 <= left <= width - w
                assert 0 <= top <= height - h
                x, y = before.box[:2]
                assert np.array_equal(other.image[top : top + h, left : left + w], scene.image[y : y + h, x : x + w])
            labels = scene_labels(other.things, height * width // PATCH**2)
            assert (labels[:, 0] > 0).sum() == len({p for t in other.named for p in t.patches})
    assert found >= 12


def test_clip_labels_name_the_motion() -> None:
    clip = make_clip("train", 0, 0)
    labels = clip_labels(clip)
    words = {ATTRIBUTES["motion"][i - 1] for i in labels[:, 3] if i}
    assert words == {actor.direction for actor in clip.objects if actor.direction}


def test_event_labels_name_what_becomes_of_objects() -> None:
    seen = set()
    for index in range(4):
        clip = make_clip("train", 0, index, (8,))
        labels = event_labels(clip)
        owned = set()
        for actor in clip.objects:
            shown = cells(actor, clip.length)
            owned |= set(shown)
            (event,) = {EVENTS[i] for i in labels[list(shown)].tolist()}
            seen.add(event)
            assert (event == "always visible") == (actor.first == 0 and actor.last == clip.length)
            assert event.startswith("appears") == (actor.first > 0)
            if actor.first > 0:
                assert event.endswith(part_of(actor.first, clip.length))
        assert not labels[[i for i in range(len(labels)) if i not in owned]].any()
    assert len(seen) >= 3


def test_practice_asks_more_of_what_is_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_cache, "BATCH", 4)
    _, batch = draw_clips(0, "train", 0)
    share = {}
    for practice in (False, True):
        kinds = [q.kind for row in batch.ask(9, 0, practice=practice) for q in row]
        share[practice] = np.mean([kind in qwen_cache.PRACTICED for kind in kinds])
    assert share[True] > share[False]


@pytest.mark.parametrize("modality", ["image", "video"])
def test_packed_training_sees_what_generate_sees(model: Any, processor: Any, modality: str) -> None:
    """The packed row's logits for one question are the stock model's for the chat template's prompt."""
    clip = make_clip("test", 0, 1, (8,))
    questions = ask_clip(clip, 3)
    content = [{"type": modality}, {"type": "text", "text": questions[1].text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if modality == "video":
        metadata = VideoMetadata(total_num_frames=8, fps=FPS, frames_indices=list(range(8)))
        inputs = processor(videos=[clip.frames], video_metadata=[metadata], text=text, return_tensors="pt")
        frames, grid = torch.from_numpy(clip.frames)[None], (4, 8, 8)
    else:
        image = np.concatenate([clip.frames[0], clip.frames[1]], 1)
        inputs = processor(images=image, text=text, return_tensors="pt")
        frames, grid = torch.from_numpy(image)[None, None].expand(1, 2, -1, -1, -1), (1, 8, 16)
    packed = PackedQwen(model, TOKENS).eval()
    torch.nn.init.eye_(packed.adapter.weight)
    torch.nn.init.zeros_(packed.adapter.bias)
    packer = Packer(TOKENS, PackedQwen.text_start(grid), 64)
    packed_text = packer.pack([questions])
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
        logits = packed(tower_tokens(model.model.visual, frames), packed_text, grid)[0]
    first = [int((packed_text.segments[0] == n).nonzero()[0]) for n in (1, 2)]
    labelled = (packed_text.labels[0] != IGNORE).nonzero().flatten()
    row = int((labelled < first[1]).sum())  # the second question's first answer token
    assert torch.allclose(logits[row], expected, atol=2e-4)
    prompt = packed_text.ids[0, first[1] : int(labelled[row]) + 1].tolist()
    assert inputs["input_ids"][0, -len(prompt) :].tolist() == prompt
    assert attention_mask(3, packed_text.segments).shape[-1] == 67


def test_a_few_steps_lower_both_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower from random weights, tiny batches: a smoke test of the whole chain, not of quality."""
    monkeypatch.setattr(qwen_tower, "BATCHES", ((112, True, 4), (112, False, 4)))
    monkeypatch.setattr(qwen_tower, "RATE", 4e-3)
    monkeypatch.setattr(qwen_cache, "BATCH", 3)
    torch.manual_seed(0)
    visual, teacher = new_model("qwen2_5_vl").model.visual, qwen_tower.Teacher()
    losses = qwen_tower.fit(visual, qwen_tower.Vocabulary(teacher.llava), teacher, 5)
    assert losses[-1] < losses[0]
    torch.save(visual.state_dict(), tmp_path / "tower.pt")
    qwen_cache.build(tmp_path, "train", scenes=3, clips=3)
    batches = qwen_cache.load(tmp_path / "train.pt")
    assert [batch.grid[0] for batch in batches] == [1, 4]
    assert batches[1].tokens.shape == (3, 4 * 8 * 8, HIDDEN)
    packed = PackedQwen(new_model("qwen2_5_vl"), TOKENS)
    monkeypatch.setattr(training, "QUESTIONS", 4)

    def examples(epoch: int) -> Any:
        return training.qwen_examples(batches, lambda start: Packer(TOKENS, start, 176), epoch)

    recipe, checkpoint = training.RECIPES["qwen2_5_vl"], tmp_path / "checkpoint.pt"
    losses = training.fit(packed, examples, recipe, 10, checkpoint, max_steps=4)
    assert len(losses) == 4
    assert np.mean(losses[-2:]) < losses[0]
    assert torch.load(checkpoint, weights_only=True)["step"] == 4


def _shipped(name: str) -> Any:
    if not vtc.reference.available() or name not in vtc.reference.names():
        pytest.skip(f"the weights of {name} are not installed (pip install ./eval/reference from a checkout)")
    return vtc.reference.load(name)


def test_the_teacher_can_read_what_its_tokens_show() -> None:
    """Its own tokens, places taken off and put back: far above the 28 words' chance."""
    _shipped("llava")
    teacher = qwen_tower.Teacher()
    vocabulary = qwen_tower.Vocabulary(teacher.llava)
    scenes = [make_scene("test", 2, index) for index in range(4)]
    frames = torch.from_numpy(np.stack([scene.image for scene in scenes]))[:, None]
    labels = torch.from_numpy(np.stack([scene_labels(scene.things, 256) for scene in scenes])).long().transpose(1, 2)
    everything = teacher.tokens(frames)
    teacher.prepare(everything)
    assert teacher.places.mean(0).abs().max() < 1e-4, "only what differs from place to place is taken off"
    tokens = teacher.tokens(frames)
    torch.testing.assert_close(tokens + teacher.places, everything)
    with torch.no_grad():
        _, accuracy = teacher.reading(tokens, labels, vocabulary.tables["text"])
        _, shuffled = teacher.reading(tokens.roll(1, 0), labels, vocabulary.tables["text"])
    assert accuracy > 0.6
    assert shuffled < 0.3
    assert float(teacher.loss(tokens, tokens, labels)) == 0.0


def test_the_decoder_starts_from_the_shipped_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llava, _ = _shipped("llava")
    monkeypatch.setattr(qwen_cache, "BATCH", 2)
    torch.manual_seed(0)
    model = new_model("qwen2_5_vl")
    torch.save(model.model.visual.state_dict(), tmp_path / "tower.pt")
    qwen_cache.build(tmp_path, "train", scenes=2, clips=0)
    packed = PackedQwen(model, TOKENS)
    training.start_from_llava(packed, "qwen2_5_vl")
    explained = training.fit_adapter(packed, qwen_cache.load(tmp_path / "train.pt"))
    assert 0.0 <= explained < 1.0
    for name, weight in llava.model.language_model.state_dict().items():
        assert torch.equal(packed.decoder.state_dict()[name], weight)
    assert not packed.decoder.layers[0].self_attn.q_proj.bias.any()


def test_the_shipped_model_answers_questions_about_its_sample_clips() -> None:
    model, processor = _shipped("qwen2_5_vl")
    paths = vtc.reference.clips()
    assert len(paths) == 3
    folder = paths[0].parent
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    samples = [
        Sample(str(number), line["question"], video=VideoSource(folder / line["video"], 16), target=line["answer"])
        for number, line in enumerate(lines)
    ]
    loaded = Loaded(model, processor, "qwen2_5_vl", "shipped")
    given = generated(loaded, samples, batch=8)
    right = [answer == sample.target for answer, sample in zip(given, samples, strict=True)]
    assert np.mean(right) >= 0.75, list(zip(given, (sample.target for sample in samples), strict=True))


def test_a_smaller_batch_keeps_its_questions_and_its_things() -> None:
    frames, batch = qwen_cache.draw_sized(0, "train", 0, 224, 224)
    small, described = qwen_scales.scaled(frames, batch, 112)
    assert small.shape == (*frames.shape[:2], 112, 112, 3)
    assert described.grid == (1, 8, 8)
    assert described.labels.shape == (len(frames), 64, 4)
    for before, after in zip(batch.owned, described.owned, strict=True):
        for full, few in zip(before, after, strict=True):
            assert few
            assert {(p // 16 // 2) * 8 + p % 16 // 2 for p in full} >= set(few), "no patch that shows none of it"
    assert described.ask(3, 0) == batch.ask(3, 0)


def test_classes_are_pooled_where_enough_of_a_token_shows_something() -> None:
    labels = torch.zeros(1, 16, dtype=torch.uint8)
    labels[0, [0, 1, 4]] = 2  # three of the four patches of the first token
    labels[0, 5] = 1
    labels[0, 10] = 3  # one of four
    pooled = qwen_scales.pooled_classes(labels, 1, 4, 2)
    assert pooled.tolist() == [[2, 0, 0, 0]]


def test_a_second_turn_sees_the_first_and_is_trained_as_generate_asks_it(model: Any, processor: Any) -> None:
    """The packed logits of a second question are the stock model's for the chat template's two turns."""
    clip = make_clip("test", 0, 1, (8,))
    first, second = ask_clip(clip, 2)
    image = np.concatenate([clip.frames[0], clip.frames[1]], 1)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first.text}]},
        {"role": "assistant", "content": [{"type": "text", "text": first.answer}]},
        {"role": "user", "content": [{"type": "text", "text": second.text}]},
    ]
    inputs = processor(
        images=image, text=processor.apply_chat_template(chat, add_generation_prompt=True), return_tensors="pt"
    )
    packed = PackedQwen(model, TOKENS).eval()
    torch.nn.init.eye_(packed.adapter.weight)
    torch.nn.init.zeros_(packed.adapter.bias)
    text = Packer(TOKENS, PackedQwen.text_start((1, 8, 16)), 64).pack([(first, second)], turns=2)
    assert text.segments.unique().tolist() == [0, 1]
    frames = torch.from_numpy(image)[None, None].expand(1, 2, -1, -1, -1)
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1]
        logits = packed(tower_tokens(model.model.visual, frames), text, (1, 8, 16))[0]
    answered = len(TOKENS(first.answer, add_special_tokens=False).input_ids) + 1  # and its end
    assert torch.allclose(logits[answered], expected, atol=2e-4)


def test_a_few_steps_teach_the_tower_smaller_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_scales, "SIDES", (112,))
    monkeypatch.setattr(qwen_scales, "CROPS", 2)
    monkeypatch.setattr(qwen_scales, "RATE", 2e-3)
    torch.manual_seed(0)
    visual = new_model("qwen2_5_vl").model.visual
    teacher = copy.deepcopy(visual).requires_grad_(False)
    losses = qwen_scales.fit(visual, teacher, 10)
    assert losses[8] < losses[0]
