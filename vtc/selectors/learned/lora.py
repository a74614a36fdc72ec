"""Low-rank adapters of the decoder, trained beside the modules of a method and kept in the same folder.

The files are PEFT's (``adapter_config.json``, ``adapter_model.safetensors``), so that PEFT loads them onto the language
model, too. Here they need no PEFT: a layer's output gets the change added, while the method is installed and not
disabled, and the layer itself is not touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...files import replacing, write_text
from ...plain import integer, parse_json, shown
from .folder import initialised

__all__ = ["LoraAdapter", "begin_lora", "read_lora", "save_lora"]

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_UNUSED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")


class _LowRank(nn.Module):
    """What is added to the output of one linear layer: s B A x."""

    def __init__(self, width_in: int, width_out: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_A, self.lora_B = (nn.Linear(*size, bias=False) for size in ((width_in, rank), (rank, width_out)))
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the change (..., width_out) for an input (..., width_in), in float32, where the input is."""
        if self.lora_A.weight.device != x.device:  # layers of one model may be on several devices
            self.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.lora_B(self.lora_A(x.float())) * self.scaling
            return out


class LoraAdapter(nn.Module):
    """Changes of linear layers, by their names within the language model; with B = 0, as they begin, none.

    Parameters
    ----------
    sizes
        Inputs and outputs of each layer.
    rank, alpha
        Of the changes; they are scaled by alpha / rank.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        parts = {name.replace(".", "/"): _LowRank(*size, rank, alpha / rank) for name, size in sizes.items()}
        self.layers = nn.ModuleDict(parts)

    def changes(self) -> dict[str, Any]:
        """Return the change of every layer by its name."""
        return {name.replace("/", "."): change for name, change in self.layers.items()}


def begin_lora(decoder: nn.Module, rank: int, seed: int = 0) -> LoraAdapter:
    """Make an adapter that changes nothing yet, of the queries, keys, values and outputs of every attention.

    Scaled by 2, which is PEFT's way to write lora_alpha = 2 rank.

    Raises
    ------
    ConfigError
        The rank is no integer of at least 1, or the language model has no such layers.
    """
    if (integer(rank) or 0) < 1:
        raise ConfigError(f"lora must be a rank, an integer of at least 1; got {shown(rank)}.")
    sizes = {
        name: (layer.in_features, layer.out_features)
        for name, layer in decoder.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in _TARGETS
    }
    if not sizes:
        raise ConfigError(
            f"lora changes linear layers {', '.join(_TARGETS)}, and {type(decoder).__name__} has none; train the "
            "modules alone."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraAdapter(sizes, rank, 2 * rank)


def save_lora(folder: str | Path, adapter: LoraAdapter, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter in PEFT's format beside the modules of a folder."""
    where = Path(folder)
    weights = {
        f"{_PREFIX}{key.removeprefix('layers.').replace('/', '.')}": value.detach().to("cpu", dtype).contiguous()
        for key, value in adapter.state_dict().items()
    }
    with replacing(where / _WEIGHTS) as file:
        safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.changes()}),
    }
    write_text(where / _CONFIG, json.dumps(config, indent=2) + "\n")


def read_lora(folder: str | Path, method: str) -> LoraAdapter | None:
    """Read the adapter that is in a folder, ready to run and frozen; None if there is none.

    Raises
    ------
    ConfigError
        It is no plain LoRA of linear layers, or cannot be read.
    """
    where = Path(folder)
    if not (where / _CONFIG).exists():
        return None
    try:
        config = parse_json((where / _CONFIG).read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(where / _WEIGHTS)
    except (OSError, ConfigError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{method}: the adapter in {where} cannot be read: {error}") from error
    rank, alpha = (integer(config.get(name)) for name in ("r", "lora_alpha")) if isinstance(config, dict) else (0, 0)
    other = [name for name in _UNUSED if config.get(name)] if rank else []
    if not rank or rank < 1 or not alpha or config["peft_type"] != "LORA" or config.get("bias") != "none" or other:
        raise ConfigError(f"{method}: the adapter in {where} is no plain LoRA with r and lora_alpha.")
    sizes: dict[str, tuple[int, int]] = {}
    for key, value in weights.items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if value.ndim != 2 or part not in ("lora_A", "lora_B"):
            raise ConfigError(f"{method}: the adapter in {where} has a weight {key} of another kind than LoRA's.")
        before = sizes.get(name, (0, 0))
        sizes[name] = (value.shape[1], before[1]) if part == "lora_A" else (before[0], value.shape[0])
    adapter = LoraAdapter(sizes, rank, alpha)
    own = {f"layers.{key.removeprefix(_PREFIX)}": value for key, value in weights.items()}
    named = {key.replace("/", "."): key for key in adapter.state_dict()}
    initialised(adapter, {named.get(key, key): value for key, value in own.items()}, method, where)
    return adapter
