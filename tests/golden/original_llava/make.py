"""Makes tiny checkpoints in the layout of the original LLaVA code, and asks that code about pictures.

    python make.py

It needs packages of their time, in an environment of their own, without what they pull in: llava-torch 1.2.2.post1,
transformers 4.36.2, tokenizers 0.15.0, huggingface_hub 0.20.3, sentencepiece and protobuf beside torch, numpy, pillow
and requests. `v1_5` is LLaMA with a tower beside it and shards of PyTorch, as llava-v1.5-7b; `v1_6` divides pictures
(anyres), holds its tower and has shards of safetensors, as llava-v1.6-vicuna-7b; `v1_6_mistral` is the same on Mistral.
`yi` is a tokenizer like that of llava-v1.6-34b; `prompts.npz` has prompts made with it, and with `mm_use_im_start_end`.
Weights are random and stored in float16; the model computes in float32.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree

if not hasattr(_pytree, "_register_pytree_node"):  # a newer torch than transformers 4.36 knows
    _pytree._register_pytree_node = lambda cls, flatten, unflatten, **_: _pytree.register_pytree_node(
        cls, flatten, unflatten
    )

import sentencepiece
import transformers
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer, LlamaTokenizerFast

HERE = Path(__file__).parent
TOWER = "tiny-clip"
SIDE, WIDTH = 32, 32
QUESTION = "What is left of the red cup?"
TEXT = """A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,
and polite answers to the user's questions. What is left of the red cup? There is a blue plate on the table. How many
cups are there? The picture shows two cups and three plates. USER ASSISTANT INST"""
ROWS = 8  # logits that are kept, at the end of the prompt
PICTURES = {"wide": (53, 31), "tall": (24, 70), "square": (48, 48)}


def tokenizer(folder: Path, fast: bool, *, yi: bool = False) -> None:
    """Write a tokenizer of Vicuna's kind, or of Yi's: words around the turns, and no space before a text."""
    model = io.BytesIO()
    turns = {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"], "add_dummy_prefix": False} if yi else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **turns,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    ends = {"legacy": True, "eos_token": "<|im_end|>", "add_bos_token": False} if yi else {"legacy": False}
    words = LlamaTokenizer(str(folder / "tokenizer.model"), pad_token="<unk>", padding_side="right", **ends)
    words.save_pretrained(folder)
    if fast:
        LlamaTokenizerFast(str(folder / "tokenizer.model"), pad_token="<unk>", padding_side="right").save_pretrained(
            folder
        )


def tower(folder: Path) -> None:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=16,
        hidden_act="quick_gelu",
        initializer_factor=8.0,
    )
    rough(CLIPVisionModel(config)).half().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def rough(model: torch.nn.Module) -> torch.nn.Module:
    """Give weights a spread that makes every token matter."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
        elif name.endswith("weight"):
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
        else:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def checkpoint(folder: Path, kind: str) -> None:
    torch.manual_seed(2)
    folder.mkdir(parents=True, exist_ok=True)
    anyres = kind != "v1_5"
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 330,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "mm_vision_tower": TOWER,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32]] if anyres else None,
        "mm_patch_merge_type": "spatial_unpad" if anyres else "flat",
        "mm_resampler_type": None,
        "unfreeze_mm_vision_tower": anyres,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    if kind == "v1_6_mistral":
        model = LlavaMistralForCausalLM(LlavaMistralConfig(**settings, sliding_window=None))
    else:
        model = LlavaLlamaForCausalLM(LlavaConfig(**settings))
    if anyres:
        model.get_vision_tower().load_model()
    inside = "vision_tower"
    for name, weight in model.named_parameters():
        if inside in name:
            continue
        torch.nn.init.normal_(weight, mean=float(name.endswith("norm.weight")), std=0.15)
    if anyres:  # fine-tuned with the rest: not that of the folder beside
        rough(model.get_vision_tower())
    model.half().save_pretrained(folder, max_shard_size="60KB", safe_serialization=anyres)
    tokenizer(folder, fast=anyres)


def ask(folder: Path, kind: str) -> dict[str, np.ndarray]:
    cls = LlavaMistralForCausalLM if kind == "v1_6_mistral" else LlavaLlamaForCausalLM
    model = cls.from_pretrained(folder, torch_dtype=torch.float32).eval()
    sight = model.get_vision_tower()
    if not sight.is_loaded:
        sight.load_model()
    sight.to(torch.float32)
    words = LlamaTokenizer.from_pretrained(folder, use_fast=False)
    talk = conv_templates["mistral_instruct" if kind == "v1_6_mistral" else "vicuna_v1"].copy()
    talk.append_message(talk.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}")
    talk.append_message(talk.roles[1], None)
    prompt = talk.get_prompt()
    ids = tokenizer_image_token(prompt, words, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    found = {"prompt": np.array(prompt), "question": np.array(QUESTION), "input_ids": ids.numpy()}
    for name, size in PICTURES.items():
        pixels = np.random.default_rng(len(name)).integers(
            0, 256, size=(size[1] // 6 + 1, size[0] // 6 + 1, 3), dtype=np.uint8
        )
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        images = process_images([picture], sight.image_processor, model.config)
        with torch.inference_mode():
            out = model(ids, images=images, image_sizes=[picture.size], use_cache=False)
            said = model.generate(
                ids, images=images, image_sizes=[picture.size], do_sample=False, max_new_tokens=8, use_cache=True
            )
        found |= {
            f"{name}_picture": np.asarray(picture),
            f"{name}_pixels": bytes_of(images, sight.image_processor),
            f"{name}_length": np.array(out.logits.shape[1]),
            f"{name}_logits": out.logits[0, -ROWS:].numpy(),
            f"{name}_said": said[0, 1:].numpy(),  # behind <s>
        }
    return found


def spoken() -> dict[str, np.ndarray]:
    """Return the ids of prompts: of turns asked as llava-v1.6-34b is, on Yi, and with words around the picture."""
    tokenizer(Path("yi"), fast=False, yi=True)
    talk = conv_templates["chatml_direct"].copy()
    for index, said in enumerate((f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}", "A plate.", "How many cups?", None)):
        talk.append_message(talk.roles[index % 2], said)
    words = LlamaTokenizer.from_pretrained("yi", use_fast=False)
    found = {"yi": tokenizer_image_token(talk.get_prompt(), words, IMAGE_TOKEN_INDEX)}
    talk = conv_templates["vicuna_v1"].copy()
    shown = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    talk.append_message(talk.roles[0], f"{shown}\n{shown}\n{QUESTION}")
    talk.append_message(talk.roles[1], None)
    words = LlamaTokenizer.from_pretrained("v1_5", use_fast=False)
    words.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)  # as load_pretrained_model does
    words.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    found["start_end"] = tokenizer_image_token(talk.get_prompt(), words, IMAGE_TOKEN_INDEX)
    return {name: np.array(ids) for name, ids in found.items()}


def bytes_of(images: torch.Tensor, processor: CLIPImageProcessor) -> np.ndarray:
    """Undo the normalisation: pixels are whole numbers before it."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    values = (images * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8).numpy()


def main() -> None:
    print("torch", torch.__version__, "transformers", transformers.__version__)
    os.chdir(HERE)  # where the name of the tower is a path
    shutil.rmtree(TOWER, ignore_errors=True)
    tower(Path(TOWER))
    for kind in ("v1_5", "v1_6", "v1_6_mistral"):
        shutil.rmtree(kind, ignore_errors=True)
        checkpoint(Path(kind), kind)
        np.savez_compressed(f"{kind}.npz", **ask(Path(kind), kind))
        print(kind, json.loads((Path(kind) / "config.json").read_text())["architectures"])
    Path("yi").mkdir(exist_ok=True)
    np.savez_compressed("prompts.npz", **spoken())


if __name__ == "__main__":
    main()
