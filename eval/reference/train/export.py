"""Write a trained checkpoint into the ``vtc-reference`` distribution: float16 weights without the tower, and configs.

python -m eval.reference.train.export tower tower/
python -m eval.reference.train.export llava runs/llava/checkpoint.pt
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
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip import CLIPImageProcessor

from eval.reference.train import models, tower
from eval.reference.train.cache import IMAGE_MEAN, IMAGE_STD
from eval.reference.train.tokenizer import chat_template

PACKAGE = Path(__file__).parents[1] / "src" / "vtc_reference"


def export_tower(source: Path, package: Path) -> None:
    """Store the converted tower once, in float16."""
    target = package / "tower"
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def image_processor() -> CLIPImageProcessor:
    """Resize to 224 x 224 (no crop: nothing of the picture is lost), ImageNet statistics."""
    size = {"height": tower.IMAGE_SIZE, "width": tower.IMAGE_SIZE}
    return CLIPImageProcessor(
        do_resize=True, size=size, do_center_crop=False, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )


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
    """Save the processor, then drop the tokenizer's files: the distribution stores them once for all models."""
    processor.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (target / name).unlink(missing_ok=True)


def export_llava(checkpoint: Path, package: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """LLaVA from its training checkpoint."""
    model = models.new_llava(tokenizer)
    packed = models.PackedLlava(model, tokenizer, torch.zeros(384), torch.ones(384))
    packed.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    packed.fold()
    save_family(model, package / "llava")
    processor = LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=tower.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template("<image>"),
    )
    keep_family_files(processor, package / "llava")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tower", "llava"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--package", type=Path, default=PACKAGE)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "tokenizer")
    if arguments.what == "tower":
        export_tower(arguments.source, arguments.package)
    else:
        export_llava(arguments.source, arguments.package, tokenizer)


if __name__ == "__main__":
    main()
