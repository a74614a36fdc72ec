"""The image reference models: made as described, assembled as stored, and able to see."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

from transformers import AutoTokenizer

from eval.reference.train.__main__ import start_from_llava, teacher_tokens
from eval.reference.train.cache import TOKENIZER
from eval.reference.train.labels import ATTRIBUTES, scene_labels, word_ids
from eval.reference.train.models import Example, new_packed
from eval.reference.train.packing import Packer
from eval.reference.train.tokenizer import VIDEO_SENTENCES
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import make_scene
from eval.tasks.scenes.vocabulary import DIGITS, NUMBERS, WORDS
from vtc import reference
from vtc.errors import ConfigError, StateError

FAMILIES = ("llava", "internvl")
SHIPPED = (*FAMILIES, "qwen2_5_vl", "qwen2_5_vl-long")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


def _installed() -> Any:
    module = pytest.importorskip(
        "vtc_reference", reason="vtc-reference is not installed (pip install ./eval/reference from a checkout)"
    )
    if not module.names():
        pytest.skip("vtc-reference is installed without weights")
    return module


# The tokenizer


def test_what_is_written_can_be_read_back(tokenizer: Any) -> None:
    for text in ("What is left of the cup?", "red star", "Zebra crossing, 17 Ünïcode!", "line\nbreak", "left"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_of_answers_are_single_tokens_wherever_they_stand(tokenizer: Any) -> None:
    word_ids(tokenizer)  # raises if one of them is not
    for word in (*WORDS, *NUMBERS, *DIGITS, "yes", "no", "top", "bottom", "left", "right"):
        (alone,) = tokenizer(word).input_ids
        assert alone in tokenizer(f"It says {word} here").input_ids
        assert alone != tokenizer.unk_token_id


def test_the_vocabulary_covers_motion(tokenizer: Any) -> None:
    for sentence in VIDEO_SENTENCES:
        pieces = len(tokenizer(sentence).input_ids)
        assert pieces <= len(sentence.split()) + sum(sentence.count(mark) for mark in "?.,"), sentence


# Training computes what inference computes


@pytest.fixture(scope="module")
def scene() -> Any:
    return next(s for s in (make_scene("test", 0, i) for i in range(50)) if len(s.objects) >= 3 and s.signs)


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    return {family: _installed().load(family)[1] for family in FAMILIES}


def _prefix(packed: Any, tokenizer: Any) -> list[int]:
    placeholder = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>" if len(packed.after) else "<image>")
    return [*packed.before.tolist(), *[placeholder] * len(packed.sources), *packed.after.tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_inference_see_the_same_prompt(
    family: str, tokenizer: Any, scene: Any, processors: dict[str, Any]
) -> None:
    _, packed = new_packed(family, tokenizer)
    processor, prefix = processors[family], _prefix(packed, tokenizer)
    packer = Packer(tokenizer, len(prefix), 175)
    for question in ask(scene, 3):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = processor(images=[Image.fromarray(scene.image)], text=[text], return_tensors="pt").input_ids[0].tolist()
        assert ids == prefix + packer.turn(question)[0]
        whole = processor.apply_chat_template(
            [*messages, {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}]
        )
        ids = processor(images=[Image.fromarray(scene.image)], text=[whole], return_tensors="pt").input_ids[0].tolist()
        assert ids == [*prefix, *packer.turn(question)[0], *packer.turn(question)[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_questions_compute_what_the_stock_model_computes(
    family: str, tokenizer: Any, scene: Any, processors: dict[str, Any]
) -> None:
    """Packing, folding, cached features and the layer loop together change nothing but rounding."""
    torch.manual_seed(0)
    model, packed = new_packed(family, tokenizer)
    model.eval()
    packed.eval()
    processor, prefix = processors[family], _prefix(packed, tokenizer)
    questions = ask(scene, 3)
    packer = Packer(tokenizer, len(prefix), 175)
    image = Image.fromarray(scene.image)
    text = "<s>" + ("<image>" if family == "llava" else "<IMG_CONTEXT>")
    pixels = processor(images=[image], text=[text], return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert len(states) == 13
        features = states[-2][None, :, 1:]
        packed.prepare(features + 0.1 * torch.randn_like(features))
        if family == "internvl":  # random features are nearly constant per channel: keep the gain at a sane size
            packed.projector.layer_norm.weight.clamp_(max=10.0)
            packed.projector.layer_norm.bias.clamp_(-10.0, 10.0)
        before, *_ = packed(features, packer.pack([questions]))
        if family == "llava":
            packed.fold()
        start = 0
        for question in questions:
            prompt, answer = packer.turn(question)
            ids = torch.tensor([prefix + prompt + answer[:-1]])
            stock = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[
                0, -len(answer) :
            ]
            torch.testing.assert_close(before[start : start + len(answer)], stock, atol=2e-5, rtol=1e-4)
            start += len(answer)


def test_tiles_show_the_patches_that_they_say(tokenizer: Any) -> None:
    """A token of a tile, and the four patches under a token of the thumbnail, are where the labels put them."""
    _, packed = new_packed("internvl", tokenizer)
    assert packed.sources.shape == (320, 4)
    board = np.arange(256).reshape(16, 16)
    for tile, (rows, columns) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        shown = packed.sources[64 * tile : 64 * (tile + 1)]
        assert (shown == shown[:, :1]).all(), "at twice the size, a token of four patches shows one patch of the scene"
        assert sorted(shown[:, 0].tolist()) == sorted(board[rows : rows + 8, columns : columns + 8].ravel().tolist())
    thumbnail = packed.sources[256:]
    assert sorted(thumbnail.flatten().tolist()) == list(range(256))
    for token in thumbnail:
        rows, columns = token // 16, token % 16
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 1


def test_labels_name_what_the_patches_show(scene: Any) -> None:
    labels = scene_labels(scene.things)
    for thing in scene.named:
        for patch in thing.patches:
            words = [
                words[label - 1] if label else ""
                for words, label in zip(ATTRIBUTES.values(), labels[patch], strict=True)
            ]
            assert words == [thing.colour, thing.name, thing.text, ""]
    owned = {patch for thing in scene.named for patch in thing.patches}
    assert not labels[[patch for patch in range(256) if patch not in owned]].any()


def test_a_few_steps_lower_every_loss(tokenizer: Any) -> None:
    torch.manual_seed(0)
    _, packed = new_packed("llava", tokenizer)
    scenes = [make_scene("train", 0, index) for index in range(4)]
    labels = torch.from_numpy(np.stack([scene_labels(scene.things) for scene in scenes]))
    features = torch.randn(4, 1, 256, 384)
    for column in range(3):  # features that carry the labels, so that there is something to learn
        features[:, 0, :, column] += 3.0 * labels[..., column].float()
    packed.prepare(features)
    questions = [ask(scene, 6) for scene in scenes]
    shown = [[(thing, thing.patches) for thing in scene.things] for scene in scenes]
    text = Packer(tokenizer, 1 + len(packed.sources), 64).pack(questions, shown)
    optimizer = torch.optim.AdamW(packed.parameters(), lr=5e-4)
    history = []
    for _ in range(6):
        losses = packed.losses(Example(features, labels, text))
        history.append([loss.item() for loss in losses.values()])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert len(history[0]) == 4
    assert all(last < first for first, last in zip(history[0], history[-1], strict=True)), history


# The distribution


def test_a_missing_distribution_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(StateError, match=r"pip install \./eval/reference"):
        reference.load("llava")


def test_an_unknown_model_is_refused_by_name() -> None:
    _installed()
    with pytest.raises(ConfigError, match="llava"):
        reference.load("gpt")


@pytest.mark.parametrize("family", SHIPPED)
def test_loading_gives_the_stock_class_and_leaves_the_random_state_alone(family: str) -> None:
    distribution = _installed()
    if family not in distribution.names():
        pytest.skip(f"the weights of {family} are not installed")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, processor = reference.load(family)
    assert torch.equal(torch.rand(3), expected)
    assert type(model).__module__.startswith("transformers.")
    assert not model.training
    assert model.dtype is torch.float32
    assert model.config.text_config.num_hidden_layers >= 6
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("family", SHIPPED)
def test_an_export_is_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    distribution = _installed()
    if family not in distribution.names():
        pytest.skip(f"the weights of {family} are not installed")
    model, processor = reference.load(family)
    folder = distribution.export(family, tmp_path / family)
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert type(other) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is left of the cup?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert AutoProcessor.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True) == text


def test_the_whole_distribution_stays_small() -> None:
    root = Path(_installed().__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert max(path.stat().st_size for path in files) <= 50e6
    # As a wheel holds them: indices of packages take 100 MB.
    assert sum(len(zlib.compress(path.read_bytes())) for path in files) <= 100e6


@pytest.mark.parametrize("family", SHIPPED)
def test_the_sample_questions_are_answered_right(family: str) -> None:
    distribution = _installed()
    if family not in distribution.names():
        pytest.skip(f"the weights of {family} are not installed")
    model, processor = reference.load(family)
    folder = reference.samples()[0].parent
    assert len(reference.samples()) == 10
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()][::3]
    right = 0
    for line in lines:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": line["question"]}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        encoded = processor(images=[Image.open(folder / line["image"])], text=[text], return_tensors="pt")
        out = model.generate(**encoded, do_sample=False)
        right += (
            processor.decode(out[0, encoded.input_ids.shape[1] :], skip_special_tokens=True).strip() == line["answer"]
        )
    assert right >= 0.75 * len(lines), f"{right} of {len(lines)}"


def test_training_can_go_on_from_the_shipped_weights(tokenizer: Any) -> None:
    shipped, _ = _installed().load("llava")
    model, packed = new_packed("llava", tokenizer)
    torch.manual_seed(0)
    packed.prepare(3 * torch.randn(2, 1, 256, 384) + torch.linspace(-1, 1, 384))
    start_from_llava(packed, "llava")
    features = torch.randn(1, 1, 256, 384)
    with torch.no_grad():
        expected = shipped.model.multi_modal_projector(features[:, 0])
        torch.testing.assert_close(packed.visual(features), expected, atol=1e-4, rtol=1e-4)
        packed.fold()
        torch.testing.assert_close(model.model.multi_modal_projector(features[:, 0]), expected, atol=1e-4, rtol=1e-4)
    for name, weight in shipped.model.language_model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], weight)


def test_another_family_begins_with_the_shipped_decoder_and_imitates_its_projector(tokenizer: Any) -> None:
    shipped, _ = _installed().load("llava")
    _, packed = new_packed("internvl", tokenizer)
    teacher = start_from_llava(packed, "internvl")
    assert teacher is not None
    for name, weight in shipped.model.language_model.state_dict().items():
        assert torch.equal(packed.decoder.state_dict()[name], weight)
    features = torch.randn(2, 5, 256, 384)
    shown = shipped.model.multi_modal_projector(features[:, -1])  # the thumbnail is what llava sees
    wanted = teacher_tokens(teacher, packed, features)
    tile, thumbnail = packed.sources[70], packed.sources[300]
    torch.testing.assert_close(wanted[:, 70], shown[:, tile[0]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wanted[:, 300], shown[:, thumbnail].mean(1), atol=1e-5, rtol=1e-5)
