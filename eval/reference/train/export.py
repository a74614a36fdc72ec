"""Write trained weights into the ``vtc-reference`` distribution, in float16.

Configurations, processors and chat templates are files of the distribution already.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from eval.reference.train.cache import PACKAGE, TOKENIZER
from eval.reference.train.models import new_packed


def trained(name: str, run: Path) -> Any:
    """Build the stock model with the weights of a run (a shared tower is left random: it is stored apart)."""
    model, packed = new_packed(name, AutoTokenizer.from_pretrained(TOKENIZER))
    packed.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    if name == "llava":
        packed.fold()
    if name == "qwen2_5_vl":
        visual: Any = model.model.visual
        visual.load_state_dict(torch.load(run / "tower.pt", weights_only=True))
        last, adapter = visual.merger.mlp[-1], packed.adapter
        with torch.no_grad():
            last.bias.copy_(adapter.weight @ last.bias + adapter.bias)
            last.weight.copy_(adapter.weight @ last.weight)
    return model


def export(name: str, run: Path, package: Path = PACKAGE) -> None:
    """Store the weights of a run (``tower``: of the converted tower) in the distribution."""
    with tempfile.TemporaryDirectory() as folder:
        if name != "tower":  # save_pretrained writes the names that every release reads
            trained(name, run).save_pretrained(folder)
        weights = load_file((run if name == "tower" else Path(folder)) / "model.safetensors")
    own = {key: weight.half().contiguous() for key, weight in weights.items() if not key.startswith("vision_tower.")}
    (package / name).mkdir(parents=True, exist_ok=True)
    save_file(own, package / name / "model.safetensors", metadata={"format": "pt"})
