"""Folders of modules for tiny models, with random weights that are not small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtc.engine.install import adapter_for
from vtc.engine.plan import shape_of
from vtc.selectors.learned import crosslmm, save_modules, vision_remember
from vtc.selectors.learned.llava_mini.training import begin
from vtc.selectors.learned.lora import begin_lora, save_lora

UPDATING = {"crosslmm": crosslmm, "vision-remember": vision_remember}


def projector_of(model: Any) -> dict[str, Any] | None:
    """The weights of a LLaVA's projector; None for other families."""
    adapter = adapter_for(model)
    return adapter.base.multi_modal_projector.state_dict() if adapter.config.model_type == "llava" else None


def llava_mini(model: Any, folder: Path, *, side: int = 2, scale: float = 0.1) -> str:
    """Write modules of `llava-mini` for a model, with noise on every weight; return the folder."""
    modules, compressor = begin(shape_of(adapter_for(model)), projector_of(model), side=side)
    generator = torch.Generator().manual_seed(side)
    for weight in compressor.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    save_modules(folder, modules, compressor)
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
