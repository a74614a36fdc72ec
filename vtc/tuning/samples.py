"""A user's own prompts as model inputs, for what looks at several of them: calibration and advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from vtc.chat import image_inputs
from vtc.engine.install import paused
from vtc.errors import InputError
from vtc.pictures import open_image

__all__ = ["as_found", "prompts"]


def prompts(processor: Any, samples: Sequence[Any], model: Any) -> list[dict[str, Any]]:
    """Make model inputs of one row each, on the model's device and in its precision.

    Parameters
    ----------
    processor : ProcessorMixin or None
        The model's; None if all samples are ready-made inputs.
    samples : sequence
        (image, question) pairs, the image a picture or a list of them; or mappings of one row, as a processor returns
        them: that is how videos come. A picture is what `vtc.open_image` takes, or an array that the processor takes.
    model : PreTrainedModel

    Raises
    ------
    InputError
        There are no samples, or one is not of this kind, shows nothing or cannot be read.
    """
    if isinstance(samples, (str, bytes)) or not len(samples):
        raise InputError("at least one sample is needed: (image, question) pairs, or inputs from a processor")
    found = []
    for number, sample in enumerate(samples):
        if isinstance(sample, Mapping):
            prompt = dict(sample)
            if "input_ids" not in prompt or len(prompt["input_ids"]) != 1:
                raise InputError(f"sample {number}: inputs need input_ids of exactly one row")
        else:
            prompt = dict(_processed(processor, number, sample))
        if not any(name.startswith("pixel_values") for name in prompt):
            raise InputError(f"sample {number} has no image or video, so there is nothing to compress in it")
        moved = {}
        for name, value in prompt.items():
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            value = value.to(model.device) if isinstance(value, torch.Tensor) else value
            moved[name] = value.to(model.dtype) if floating else value
        found.append(moved)
    return found


def _processed(processor: Any, number: int, sample: Any) -> Any:
    try:
        images, question = sample
    except (TypeError, ValueError) as error:
        raise InputError(f"sample {number} must be an (image, question) pair or a mapping, got {sample!r}") from error
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if processor is None or not images or any(image is None for image in images) or not isinstance(question, str):
        raise InputError(f"sample {number}: pairs need a processor, at least one image and a question in words")
    try:
        arrays = (np.ndarray, torch.Tensor)
        images = [image if isinstance(image, arrays) else open_image(image) for image in images]
        return image_inputs(processor, images, question)
    except InputError as error:
        raise InputError(f"sample {number}: {error}") from error


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Uninstall an earlier compression and set evaluation mode while entered."""
    training = model.training
    with paused(model):
        model.eval()
        try:
            yield
        finally:
            model.train(training)
