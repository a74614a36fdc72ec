"""Folders of modules for tiny models, with random weights that are not small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtc.engine.install import adapter_for
from vtc.engine.plan import shape_of
from vtc.selectors.learned import save_modules
from vtc.selectors.learned.llava_mini.training import begin


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
