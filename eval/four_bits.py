"""Writes a checkpoint with its decoder rounded to 4 bits, in the layouts of GPTQ and AWQ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["write"]

_GROUP = 64
_LAYOUTS: dict[str, dict[str, Any]] = {
    "gptq": {"desc_act": False, "sym": True, "checkpoint_format": "gptq", "backend": "gptq_torch"},
    "awq": {
        "zero_point": True,
        "version": "gemm",
        "backend": "torch_awq",
        # Beginnings of names. Of what is not excluded, transformers makes layers whose weights are any numbers.
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    },
}


def write(folder: Path, out: Path, method: str) -> Path:
    """Copy a checkpoint of one file to `out` with the projections of its decoder rounded; `method`: "gptq" or "awq"."""
    shutil.copytree(folder, out)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(out / "model.safetensors").items():
        if "language_model" in name and "_proj.weight" in name:
            for part, value in rounded(weight.float().t(), method).items():
                weights[f"{name.removesuffix('weight')}{part}"] = value.contiguous()
        else:
            weights[name] = weight
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": _GROUP, **_LAYOUTS[method]}
    (out / "config.json").write_text(json.dumps(config))
    return out


def rounded(weight: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    """Round a weight (inputs, outputs) to 4 bits in groups of inputs, and pack eight of them into each integer."""
    inputs, outputs = weight.shape
    groups, places = inputs // _GROUP, torch.arange(0, 32, 4)
    scales = (weight.reshape(groups, _GROUP, outputs).abs().amax(dim=1) / 7).clamp(min=1e-6)
    steps = (weight / scales.repeat_interleave(_GROUP, dim=0)).round().clamp(-8, 7).long() + 8
    parts = {"scales": scales.half()}
    if method == "gptq":  # along the inputs; zeros are stored less one
        zeros, order = torch.full((groups, outputs), 7), torch.arange(8)
        packed = (steps.reshape(inputs // 8, 8, outputs) << places[None, :, None]).sum(dim=1)
        parts["g_idx"] = (torch.arange(inputs) // _GROUP).int()
    else:  # along the outputs, interleaved
        zeros, order = torch.full((groups, outputs), 8), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        packed = (steps.reshape(inputs, outputs // 8, 8)[..., order] << places).sum(dim=-1)
    packed_zeros = (zeros.reshape(groups, outputs // 8, 8)[..., order] << places).sum(dim=-1)
    return {"qweight": _as_int32(packed), "qzeros": _as_int32(packed_zeros), **parts}


def _as_int32(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values >= 2**31, values - 2**32, values).int()
