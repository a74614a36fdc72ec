"""Folders of modules for tiny models, with random weights that are not small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtc.engine.install import adapter_for
from vtc.engine.plan import shape_of
from vtc.selectors.learned import atp as learned_atp
from vtc.selectors.learned import crosslmm, save_modules, vision_remember
from vtc.selectors.learned import pixelrefer as learned_pixelrefer
from vtc.selectors.learned.decoder import Decoder
from vtc.selectors.learned.llava_mini.training import begin
from vtc.selectors.learned.lora import begin_lora, save_lora

UPDATING = {"crosslmm": crosslmm, "vision-remember": vision_remember}


def projector_of(model: Any) -> dict[str, Any] | None:
    """The weights of a LLaVA's projector; None for other families."""
    adapter = adapter_for(model)
    return adapter.base.multi_modal_projector.state_dict() if adapter.config.model_type == "llava" else None


def decoder_of(model: Any) -> Decoder:
    """What modules may take over from the language model."""
    adapter = adapter_for(model)
    return Decoder.of(adapter.config.get_text_config(), adapter.text_model.layers)


def _written(folder: Path, made: tuple[Any, torch.nn.Module], scale: float, seed: int = 0) -> str:
    """Write modules with noise on every weight; return the folder."""
    modules, module = made
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    save_modules(folder, modules, module)
    return str(folder)


def updating(model: Any, method: str, folder: Path, *, noise: float = 0.3, lora: int | None = None) -> str:
    """Write modules of a method that updates hidden states, with noise on every weight; return the folder.

    Without noise they are as they begin. With `lora` there is an adapter of the decoder of this rank, too.
    """
    adapter = adapter_for(model)
    modules, module = UPDATING[method].begin(shape_of(adapter))
    parts = [module] if lora is None else [module, begin_lora(adapter.text_model, lora)]
    generator = torch.Generator().manual_seed(7)
    for weight in (weight for part in parts for weight in part.parameters() if noise):
        weight.data += noise * torch.randn(weight.shape, generator=generator)
    save_modules(folder, modules, module)
    if len(parts) > 1:
        save_lora(folder, parts[1])
    return str(folder)


def llava_mini(model: Any, folder: Path, *, side: int = 2, fusion: int = 0, scale: float = 0.1) -> str:
    """Write modules of `llava-mini` for a model; return the folder."""
    made = begin(shape_of(adapter_for(model)), projector_of(model), decoder_of(model), side=side, fusion=fusion)
    return _written(folder, made, scale, side)


def atp(model: Any, folder: Path, *, scale: float = 0.5, **options: Any) -> str:
    """Write modules of `atp` for a model; return the folder."""
    return _written(folder, learned_atp.begin(shape_of(adapter_for(model)), None, decoder_of(model), **options), scale)


def pixelrefer(model: Any, folder: Path, *, scale: float = 0.1) -> str:
    """Write modules of `pixelrefer` for a model; return the folder."""
    return _written(folder, learned_pixelrefer.begin(shape_of(adapter_for(model)), projector_of(model), heads=4), scale)
