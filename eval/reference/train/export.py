"""Write a trained checkpoint into the ``vtc-reference`` distribution: float16 weights without the tower, and configs.

python -m eval.reference.train.export tower tower/
python -m eval.reference.train.export llava runs/llava/checkpoint.pt
python -m eval.reference.train.export internvl runs/internvl/checkpoint.pt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessor

from eval.reference.train import models, tower
from eval.reference.train.cache import IMAGE_MEAN, IMAGE_STD, tile_processor
from eval.reference.train.tokenizer import chat_template

PACKAGE = Path(__file__).parents[1] / "src" / "vtc_reference"
_SIZE = {"height": tower.IMAGE_SIZE, "width": tower.IMAGE_SIZE}


def export_tower(source: Path, package: Path) -> None:
    """Store the converted tower once, in float16, under its checkpoint names."""
    target = package / "tower"
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def save_family(model: Any, target: Path) -> None:
    """Own weights (everything outside the tower) under their checkpoint names, config and generation config."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:  # save_pretrained writes the names that every release reads
        model.save_pretrained(place)
        whole = load_file(Path(place) / "model.safetensors")
    own = {name: tensor.half().contiguous() for name, tensor in whole.items() if not name.startswith("vision_tower.")}
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float16
    model.config.save_pretrained(target)
    text = model.config.text_config
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, max_new_tokens=8
    ).save_pretrained(target)


def keep_family_files(processor: Any, target: Path) -> None:
    """Save the processor, then drop what the shared tokenizer's folder holds already."""
    processor.save_pretrained(target)
    for shared in (PACKAGE / "tokenizer").iterdir():
        own = target / shared.name
        if own.exists() and (shared.name == "tokenizer.json" or own.read_bytes() == shared.read_bytes()):
            own.unlink()


def trained(name: str, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The stock model with the weights of a training checkpoint (its tower is left random: it is stored apart)."""
    model, packed = models.new_packed(name, tokenizer)
    packed.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    packed.fold()
    return model


def llava_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """One picture resized to 224 x 224 (no crop: nothing of it is lost), 256 placeholders."""
    images = CLIPImageProcessor(
        do_resize=True, size=_SIZE, do_center_crop=False, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template("<image>"),
    )


def internvl_processor(tokenizer: PreTrainedTokenizerBase) -> InternVLProcessor:
    """Four tiles and a thumbnail, 64 placeholders each.

    The class asks its tokenizer for the names of the image tokens, so the tokenizer configuration is the family's own.
    """
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<|video_pad|>",
    }
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token=tokenizer.pad_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=names,
    )
    return InternVLProcessor(
        image_processor=tile_processor(),
        tokenizer=own,
        video_processor=InternVLVideoProcessor(size=_SIZE, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)),
        image_seq_length=64,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tower", "llava", "internvl"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--package", type=Path, default=PACKAGE)
    arguments = parser.parse_args()
    if arguments.what == "tower":
        export_tower(arguments.source, arguments.package)
        return
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "tokenizer")
    make_processor = {"llava": llava_processor, "internvl": internvl_processor}[arguments.what]
    target = arguments.package / arguments.what
    save_family(trained(arguments.what, arguments.source, tokenizer), target)
    keep_family_files(make_processor(tokenizer), target)


if __name__ == "__main__":
    main()
