"""The baseline `resize`: the picture itself becomes smaller, so that the whole model has less to do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from PIL import Image

from eval import models
from eval.models import Loaded
from eval.runs import Run
from eval.tasks.base import Media, Sample


def resized(loaded: Loaded, sample: Sample, media: Media, run: Run) -> Media:
    """Resample pictures or frames so that the processor makes about as many tokens of them as the run keeps.

    Both sides shrink by the square root of the share; the processor rounds them to whole tokens as it does for any
    picture, so the share that tables show is the one that came out.
    """
    share = run.keep_ratio
    if share is None:
        share = min(1.0, (run.keep_tokens or 1) / _tokens(loaded, sample, media))
    scale = math.sqrt(share)
    video = media.video
    if video is not None:
        frames = [_smaller(Image.fromarray(frame), scale) for frame in video.frames]
        video = replace(video, frames=np.stack([np.asarray(frame) for frame in frames]))
    return Media([_smaller(image, scale) for image in media.images], video)


def refusal(loaded: Loaded, samples: Iterable[Sample]) -> str | None:
    """Return why pictures cannot be made smaller for this model, by the first readable sample; None if they can."""
    for sample in samples:
        try:
            media = sample.open()
            before = _tokens(loaded, sample, media)
            after = _tokens(loaded, sample, resized(loaded, sample, media, Run("resize", 0.25)))
        except Exception:  # the row of the sample will say why
            continue
        if after < before:
            return None
        return f"a picture or video makes {before} tokens, and {after} with a quarter of the pixels"
    return "no sample could be read"


def _smaller(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _tokens(loaded: Loaded, sample: Sample, media: Media) -> int:
    return models.visual_tokens(loaded, models.inputs(loaded, [sample], [media]))
