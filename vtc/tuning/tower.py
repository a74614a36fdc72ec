"""Fit adaptive methods of the vision tower to a cost, on a user's own pictures and without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vtc import api
from vtc.config import CompressionConfig
from vtc.engine.install import adapter_for
from vtc.errors import ConfigError
from vtc.plain import real, shown
from vtc.tuning.samples import as_found, prompts

__all__ = ["fit_multiplier", "tower_share"]

_NO_CEILING = 2**31 - 1
_LARGEST = 64.0


def fit_multiplier(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    *,
    share: float,
    method: str = "adaptive-sparse-vit",
    tolerance: float = 0.01,
    steps: int = 12,
    **options: Any,
) -> CompressionConfig:
    """Find the `multiplier` of a method's thresholds that leaves a share of the vision tower's arithmetic.

    By bisection: the higher the thresholds, the fewer tokens stay. The relation of the thresholds to each other stays
    as it is. The model is left as it was found.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin or None
        The model's; None if `samples` are ready-made inputs.
    samples : sequence
        As for `vtc.calibrate`; only their pictures matter.
    share : float
        In (0, 1): what `tower_share` is to be on average over the samples.
    method : str
        One that has the option `multiplier`.
    tolerance : float
        Distance from `share` at which the search ends.
    steps : int
        Settings that are tried at most; the nearest is returned.
    **options
        Options of the method that stay as they are.

    Returns
    -------
    CompressionConfig
        Without a ceiling for single pictures.

    Raises
    ------
    ConfigError
        `share` is no fraction, or the layers in front of the first place alone take more; or the method has no
        multiplier.
    InputError
        There are no samples, or one has no image.
    """
    wanted = real(share)
    if wanted is None or not 0 < wanted < 1:
        raise ConfigError(f"share must lie between 0 and 1, got {shown(share)}")
    inputs = prompts(processor, samples, model)
    with as_found(model):

        def measured(multiplier: float) -> tuple[CompressionConfig, float]:
            config = CompressionConfig(
                method, keep_tokens=_NO_CEILING, options={**options, "multiplier": float(f"{multiplier:.4g}")}
            )
            return config, tower_share(model, config, inputs)

        low, high = 0.0, 1.0
        best = tried = measured(high)
        while tried[1] > wanted + tolerance:
            if high >= _LARGEST:
                raise ConfigError(
                    f"{method} cannot leave {wanted:g} of the tower's arithmetic: with the highest thresholds it is "
                    f"{tried[1]:.3f}"
                )
            low, high = high, 4 * high
            tried = measured(high)
            best = min(best, tried, key=lambda found: abs(found[1] - wanted))
        for _ in range(steps):
            if abs(best[1] - wanted) <= tolerance:
                break
            tried = measured((low + high) / 2)
            low, high = ((low + high) / 2, high) if tried[1] > wanted else (low, (low + high) / 2)
            best = min(best, tried, key=lambda found: abs(found[1] - wanted))
    return best[0]


@torch.no_grad()
def tower_share(model: nn.Module, config: CompressionConfig, inputs: Sequence[dict[str, Any]]) -> float:
    """Measure the arithmetic of the layers of a compressed model's tower, as a share of that with all tokens.

    A layer with m tokens takes m times the size of its matrices, and 2 m ** 2 times its width for attention. What
    crops of different length are padded with counts, and so do layers behind the one that makes the features.

    Parameters
    ----------
    model : PreTrainedModel
        Not compressed.
    config : CompressionConfig
    inputs : sequence of dict
        Prompts with pictures.
    """
    lengths: list[tuple[int, int, nn.Module]] = []  # crops and tokens that a block was given
    adapter = adapter_for(model)
    blocks = {block: None for modality in adapter.modalities for block in adapter.tower_blocks(modality)}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        lengths.append((1 if hidden.dim() == 2 else hidden.shape[0], hidden.shape[-2], module))

    shares = []
    with api.compressed(model, config), _seeing(list(blocks), see):
        for prompt in inputs:
            lengths.clear()
            model(**prompt)
            full = lengths[0][1]
            spent = sum(crops * _macs(tokens, module) for crops, tokens, module in lengths)
            shares.append(spent / sum(crops * _macs(full, module) for crops, _, module in lengths))
    return sum(shares) / len(shares)


@contextmanager
def _seeing(blocks: Sequence[nn.Module], see: Any) -> Iterator[None]:
    handles = [block.register_forward_hook(see, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _macs(tokens: int, block: nn.Module) -> int:
    """Multiply-adds of one layer of a tower."""
    matrices = [weight for weight in block.parameters() if weight.dim() == 2]
    width = min(min(weight.shape) for weight in matrices)
    return tokens * sum(weight.numel() for weight in matrices) + 2 * width * tokens**2
