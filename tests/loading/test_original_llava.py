"""Checkpoints of the original LLaVA code: their logits are those of that code; what cannot be read is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vtc
from vtc.cli import main
from vtc.loading.original_llava import _reads_sentencepiece
from vtc.loading.weights import Weights, tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "original_llava"
KINDS = ("v1_5", "v1_6", "v1_6_mistral")
PICTURES = ("wide", "tall", "square")
TOWER = "tiny-clip"


def place(kind: str, folder: Path, *, tower: bool = True) -> Path:
    """Copy a checkpoint, and the tower beside it; with a tokenizer that needs no sentencepiece where there is none."""
    copied = shutil.copytree(GOLDEN / kind, folder / kind)
    if tower:
        shutil.copytree(GOLDEN / TOWER, folder / TOWER)
    if not _reads_sentencepiece():
        shutil.copy(GOLDEN / "v1_6" / "tokenizer.json", copied)
    return copied


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    folder = place(kind, tmp_path_factory.mktemp("checkpoints"))
    return (*vtc.load(folder, dtype=torch.float32), np.load(GOLDEN / f"{kind}.npz"))


def asked(processor: Any, golden: Any, picture: str) -> Any:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": str(golden["question"])}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=Image.fromarray(golden[f"{picture}_picture"]), text=prompt, return_tensors="pt")


@pytest.mark.parametrize("picture", PICTURES)
def test_logits_are_those_of_the_original_code(loaded: Any, kind: str, picture: str) -> None:
    model, processor, golden = loaded
    inputs = asked(processor, golden, picture)
    pixels = torch.from_numpy(golden[f"{picture}_pixels"])
    settings = processor.image_processor
    mean, std = (torch.tensor(value)[:, None, None] for value in (settings.image_mean, settings.image_std))
    torch.testing.assert_close(inputs["pixel_values"], (pixels / 255 - mean) / std, atol=1e-5, rtol=0)
    expected = torch.from_numpy(golden[f"{picture}_logits"])  # of the last tokens
    length = inputs["input_ids"].shape[1]
    assert length == int(golden[f"{picture}_length"])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -len(expected) :]
        said = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    # One row more than there: that of the placeholder, whose logit is the mean of the others.
    assert expected.std() > 0.5
    torch.testing.assert_close(logits[:, :-1], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[:, -1], expected.mean(dim=1), atol=1e-3, rtol=0)
    assert torch.equal(said[0, length:], torch.from_numpy(golden[f"{picture}_said"]))


def test_prompt_is_that_of_the_original_code(loaded: Any) -> None:
    _, processor, golden = loaded
    ids = asked(processor, golden, "wide")["input_ids"][0]
    image = ids == processor.image_token_id
    start = int(image.nonzero()[0])
    theirs = torch.from_numpy(golden["input_ids"][0])
    assert torch.equal(ids[~image], theirs[theirs >= 0])
    assert int(theirs[start]) < 0


def test_classes_settings_and_what_ends_an_answer(loaded: Any, kind: str) -> None:
    model, processor, _ = loaded
    family = "Llava" if kind == "v1_5" else "LlavaNext"
    text = "mistral" if kind == "v1_6_mistral" else "llama"
    assert type(model) is getattr(transformers, f"{family}ForConditionalGeneration")
    assert type(processor) is getattr(transformers, f"{family}Processor")
    assert model.config.text_config.model_type == text
    assert not model.training
    assert model.generation_config.eos_token_id == [2]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_compression_works(loaded: Any) -> None:
    model, processor, golden = loaded
    inputs = asked(processor, golden, "wide")
    with vtc.compressed(model, "divprune", keep_ratio=0.25), torch.inference_mode():
        model.generate(**inputs, do_sample=False, max_new_tokens=2)
        report = vtc.report(model)
    assert report.visual_tokens_after < report.visual_tokens_before


def test_a_conversation_of_turns(tmp_path: Path) -> None:
    _, processor = vtc.load(place("v1_5", tmp_path))
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "Where?"}, {"type": "image"}]},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt.replace("> \n", ">\n").endswith(
        "user's questions. USER: <image>\nWhere? ASSISTANT: Here.</s>USER: And? ASSISTANT:"
    )
    with pytest.raises(Exception, match="got system"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    ("word", "end", "said"),
    [
        ("<|im_start|>", "<|im_end|>", "<|im_start|>user\n<image>\nWhere?<|im_end|><|im_start|>assistant\n"),
        ("<|start_header_id|>", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhere?<|eot_id|>"),
    ],
)
def test_prompts_follow_the_words_of_the_tokenizer(word: str, end: str, said: str, tmp_path: Path) -> None:
    folder = place("v1_6", tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(GOLDEN / "v1_6")
    words.add_special_tokens({"additional_special_tokens": [word, end]})
    words.save_pretrained(folder)
    model, processor = vtc.load(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    assert said in processor.apply_chat_template(chat, add_generation_prompt=True).replace("> \n", ">\n")
    assert model.generation_config.eos_token_id == [2, words.convert_tokens_to_ids(end)]
    assert model.config.image_token_id == model.config.text_config.vocab_size - 1 == 332


def spoken(processor: Any, turns: list[str], pictures: int) -> tuple[list[int], int]:
    """Return the ids of a conversation without its pictures, and how many places these take."""
    shown: list[dict[str, str]] = [{"type": "image"}] * pictures
    chat = []
    for index, text in enumerate(turns):
        parts = [*(shown if index == 0 else []), {"type": "text", "text": text}]
        chat.append({"role": ("user", "assistant")[index % 2], "content": parts})
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor(images=[Image.new("RGB", (8, 8))] * pictures, text=prompt)["input_ids"][0]
    return [int(i) for i in ids if i != processor.image_token_id], list(ids).count(processor.image_token_id)


@pytest.mark.skipif(not _reads_sentencepiece(), reason="sentencepiece reads the tokenizer of Yi")
@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_prompts_of_yi_are_those_of_the_original_code(kind: str, tmp_path: Path) -> None:
    """The tokenizer of llava-v1.6-34b puts no space before a text, and its turns are words of their own."""
    folder = place("v1_5", tmp_path)
    shutil.copytree(GOLDEN / "yi", folder, dirs_exist_ok=True)
    model, processor = vtc.load(folder)
    if kind == "tokenizer.json":
        processor.save_pretrained(tmp_path / "saved")
        (folder / "tokenizer.model").unlink()
        shutil.copy(tmp_path / "saved" / "tokenizer.json", folder)
        model, processor = vtc.load(folder)
    theirs = np.load(GOLDEN / "prompts.npz")["yi"]
    question = str(np.load(GOLDEN / "v1_5.npz")["question"])
    ids, places = spoken(processor, [question, "A plate.", "How many cups?"], 1)
    assert (ids, places) == (theirs[theirs >= 0].tolist(), 16)
    assert model.generation_config.eos_token_id == [2, 4]


def test_words_around_pictures_are_those_of_the_original_code(tmp_path: Path) -> None:
    """The words of mm_use_im_start_end are added when a checkpoint is loaded, where its tokenizer lacks them."""
    folder = place("v1_5", tmp_path)
    configure(folder, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    model, processor = vtc.load(folder)
    theirs = np.load(GOLDEN / "prompts.npz")["start_end"]
    question = str(np.load(GOLDEN / "v1_5.npz")["question"])
    assert spoken(processor, [question], 2) == (theirs[theirs >= 0].tolist(), 32)
    assert model.config.image_token_id == 333


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    folder = place("v1_5", tmp_path)
    stored = {name: tensor(value) for name, value in Weights.of(folder).named.items()}
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    torch.save({**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    expected = vtc.load(folder)[0]
    torch.save(
        {name: value for name, value in stored.items() if name != "lm_head.weight"}, folder / "pytorch_model.bin"
    )
    configure(folder, tie_word_embeddings=True)
    model, _ = vtc.load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


def test_weights_keep_their_type_and_what_from_pretrained_takes_is_passed_on(tmp_path: Path) -> None:
    folder = place("v1_6", tmp_path)
    model, _ = vtc.load(folder, attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}
    assert model.config._attn_implementation == "eager"
    older, _ = vtc.load(folder, torch_dtype=torch.bfloat16)
    assert {weight.dtype for weight in older.parameters()} == {torch.bfloat16}
    with pytest.raises(vtc.ConfigError, match="two names of one"):
        vtc.load(folder, dtype="float32", torch_dtype=torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="which files are mapped is seen on Linux")
def test_weights_stay_on_the_disk_until_they_are_read() -> None:
    named = Weights.of(GOLDEN / "v1_6").named
    assert not any(isinstance(stored, torch.Tensor) for stored in named.values())
    weights = Weights.of(GOLDEN / "v1_5")
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(file) in mapped for file in (GOLDEN / "v1_5").glob("pytorch_model-*.bin"))
    assert weights.named


# ------------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("where", ["argument", "inside", "path"])
def test_where_a_tower_is_found(where: str, tmp_path: Path) -> None:
    folder = place("v1_5", tmp_path, tower=False)
    tower = folder / TOWER if where == "inside" else tmp_path / "elsewhere" / "clip"
    shutil.copytree(GOLDEN / TOWER, tower)
    if where == "path":
        configure(folder, mm_vision_tower=str(tower))
    model, _ = vtc.load(folder, vision_tower=tower if where == "argument" else None)
    expected = vtc.load(place("v1_5", tmp_path / "beside"))[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["v1_5", "v1_6"])
def test_a_tower_that_is_not_there(kind: str, tmp_path: Path) -> None:
    with pytest.raises(vtc.InputError, match=f"vision tower {TOWER} is needed .*vision_tower="):
        vtc.load(place(kind, tmp_path, tower=False))


def test_a_tower_that_is_no_clip(tmp_path: Path) -> None:
    folder = place("v1_5", tmp_path)
    configure(tmp_path / TOWER, model_type="siglip")
    with pytest.raises(vtc.UnsupportedModelError, match="siglip"):
        vtc.load(folder)


def test_a_known_name_is_enough_where_the_weights_are_inside(tmp_path: Path) -> None:
    folder = place("v1_6", tmp_path, tower=False)
    configure(folder, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(vtc.InputError, match=r"the configuration says|lacks|its configuration says"):
        vtc.load(folder)  # it was looked for as a CLIP of 24 layers


# ----------------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mpt": ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
    "qwen": ({"architectures": ["LlavaQwenForCausalLM"]}, "LlavaQwenForCausalLM"),
    "linear": ({"mm_projector_type": "linear"}, "projector is linear"),
    "deeper": ({"mm_projector_type": "mlp3x_gelu"}, "mlp3x_gelu"),
    "resampler": ({"mm_resampler_type": "spatial_pool"}, "spatial_pool"),
    "scales": ({"s2": True}, "several scales"),
    "feature": ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is cls"),
    "layers": ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer is \[-2, -5\]"),
    "no layer": ({"mm_vision_select_layer": 0}, "mm_vision_select_layer is 0; its tower has layers from 1 to 3"),
    "a lower layer": ({"mm_vision_select_layer": -4}, "mm_vision_select_layer is -4"),
    "crops": ({"image_aspect_ratio": "anyres_max_9"}, "anyres_max_9"),
    "flat": ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "mm_patch_merge_type is flat"),
    "divided": (
        {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_select_feature": "cls_patch",
        },
        "mm_vision_select_feature is cls_patch; .*anyres",
    ),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_has_no_class_for_is_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, said = REFUSED[name]
    folder = place("v1_5", tmp_path)
    configure(folder, **changes)
    with pytest.raises(vtc.UnsupportedModelError, match=said):
        vtc.load(folder)


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("pytorch_model-*.bin"))[0].unlink()


def lose_all(folder: Path) -> None:
    for file in folder.glob("pytorch_model*"):
        file.unlink()


def leave(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        lose_all(folder)
        torch.save({}, folder / name)

    return edit


def cut_a_shard(folder: Path) -> None:
    file = sorted(folder.glob("pytorch_model-*.bin"))[0]
    file.write_bytes(file.read_bytes()[:500])


def one_weight(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for file in folder.glob("pytorch_model-*.bin"):
            stored = torch.load(file, weights_only=True)
            if name in stored:
                changed = change(stored.pop(name))
                torch.save(stored if changed is None else {**stored, name: changed}, file)

    return edit


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def hide_code(folder: Path) -> None:
    file = sorted(folder.glob("pytorch_model-*.bin"))[0]
    with file.open("wb") as out:
        pickle.dump({"model.norm.weight": Code(folder / "it-ran")}, out)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (lose_a_shard, "pytorch_model-00001-of"),
    "all are missing": (lose_all, "holds no weights"),
    "a shard is cut": (cut_a_shard, "cannot be read as weights"),
    "code in a pickle": (hide_code, "cannot be read as weights"),
    "a LoRA": (leave("non_lora_trainables.bin"), "no complete language model.* only non_lora_trainables.bin"),
    "a projector": (leave("mm_projector.bin"), "no complete language model.* only mm_projector.bin"),
    "only a part": (one_weight("lm_head.weight", lambda _: None), "no complete language model.* no lm_head.weight"),
    "a weight is missing": (one_weight("model.mm_projector.2.bias", lambda _: None), "lacks .*linear_2.bias"),
    "another shape": (one_weight("model.norm.weight", lambda weight: weight[:5]), r"norm.weight has the shape \(5,\)"),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("token*")] and None, "tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name: str, tmp_path: Path) -> None:
    spoil, said = BROKEN[name]
    folder = place("v1_5", tmp_path)
    spoil(folder)
    with pytest.raises(vtc.InputError, match=said):
        vtc.load(folder)
    assert not (folder / "it-ran").exists()


def test_old_buffers_are_left_out(tmp_path: Path) -> None:
    folder = place("v1_5", tmp_path)
    file = sorted(folder.glob("pytorch_model-*.bin"))[0]
    stored = torch.load(file, weights_only=True)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(stored, file, _use_new_zipfile_serialization=False)  # as files before 2020
    vtc.load(folder)


# ---------------------------------------------------------------------------------------------------- other ways in


def test_a_folder_of_transformers_and_the_reference(tmp_path: Path, loaded: Any) -> None:
    model, processor, golden = loaded
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    again, other = vtc.load(tmp_path / "ours")
    inputs = asked(processor, golden, "tall")
    pixels = asked(other, golden, "tall")["pixel_values"]  # resized by torchvision, the default of transformers
    torch.testing.assert_close(pixels, inputs["pixel_values"], atol=0.05, rtol=0)
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(vtc.ConfigError, match="no original LLaVA"):
        vtc.load(tmp_path / "ours", vision_tower=tmp_path)
    with pytest.raises(vtc.ConfigError, match="dtype='floaty'"):
        vtc.load(tmp_path / "ours", dtype="floaty")
    with pytest.raises(vtc.ConfigError, match="device_map"):
        vtc.load("reference", device_map="auto")
    with pytest.raises(vtc.InputError, match="no such folder"):
        vtc.load(tmp_path / "nowhere")
    with pytest.raises(vtc.InputError, match="a file, and no folder"):
        vtc.load(tmp_path / "ours" / "config.json")
    with pytest.raises(vtc.InputError, match="cannot be loaded as an image-text-to-text model"):
        vtc.load(tmp_path)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_commands_take_such_folders(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place("v1_6", tmp_path)
    given = ["--model", str(folder), "--dtype", "float32"]
    assert main(["ask", str(photo), "What?", *given, "--max-new-tokens", "2"]) == 0
    assert main(["inspect", str(photo), *given, "-o", str(tmp_path / "kept.png")]) == 0
    output = tmp_path / "converted"
    assert main(["convert", str(folder), "-o", str(output)]) == 0
    assert "LlavaNextForConditionalGeneration" in capsys.readouterr().out
    assert main(["ask", str(photo), "What?", "--model", str(output), "--max-new-tokens", "2"]) == 0
    assert main(["convert", str(folder), "-o", str(output)]) == 2
    assert "no empty folder" in capsys.readouterr().err


def test_evaluation_takes_such_folders(tmp_path: Path) -> None:
    from eval import models

    loaded = models.load(str(place("v1_5", tmp_path)))
    assert type(loaded.model) is transformers.LlavaForConditionalGeneration
