"""The model's side: of the rows that the family's own encoder makes, those that a method chooses.

Every class is vLLM's own with `Compressed` over it. A family says how the rows of its pictures and videos lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from vtc.engine.plan import PlannedStage
from vtc.errors import UnsupportedModelError
from vtc.integrations.vllm.choosing import Visual, choose_rows
from vtc.integrations.vllm.processing import Processor, field_of, stages_of, with_processor

__all__ = ["Compressed", "VtcInternVL", "VtcLlava", "VtcLlavaNext", "VtcLlavaOnevision"]

MODALITIES = ("image", "video")


class Compressed:
    """Mixin over a model class of vLLM whose rows of pictures and videos become fewer behind the encoder.

    The encoder's results are cached per item by vLLM, and the settings are part of the item's hash.
    """

    # Recorded graphs of the encoder would be replayed without what comes behind it.
    supports_encoder_cudagraph: ClassVar[bool] = False

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        """Say how the rows (n, D) of one item lie.

        Parameters
        ----------
        modality, rows
            Of the item.
        index
            Its number among the items of its modality in this call of the encoder.
        inputs
            Arguments of the call.

        Returns
        -------
        sequence of Visual
            What is compressed as a whole each, in the order of the rows: several where text stands between.
        """
        raise NotImplementedError

    def vtc_item(
        self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any], stage: PlannedStage | None
    ) -> Tensor:
        """Return what goes into the prompt for one item, (K, D)."""
        return rows if stage is None else self.vtc_chosen(modality, rows, index, inputs, stage)[1]

    def vtc_chosen(
        self,
        modality: str,
        rows: Tensor,
        index: int,
        inputs: Mapping[str, Any],
        stage: PlannedStage,
        width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose among the rows of one item; return which stay, (K,), and them, (K, D)."""
        visuals = self.vtc_visuals(modality, rows, index, inputs)
        kept, parts, start = [], [], 0
        for visual in visuals:
            size = sum(map(math.prod, visual.grids))
            if visual.structural is not None:
                size = len(visual.structural)
            stays, part = choose_rows(stage, visual, rows[start : start + size], width)
            kept.append(stays + start)
            parts.append(part)
            start += size
        return torch.cat(kept), torch.cat(parts)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode, and leave rows out of the result."""
        fields = {modality: kwargs.pop(field_of(modality), None) for modality in MODALITIES}
        rows = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        items = [
            (modality, index, stage)
            for modality in _in_order(kwargs)
            if (field := fields[modality]) is not None
            for index, stage in enumerate(stages_of(field))
        ]
        if not items:
            return rows
        return tuple(
            self.vtc_item(modality, part, index, kwargs, stage)
            for part, (modality, index, stage) in zip(rows, items, strict=True)
        )


def _in_order(inputs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modalities in the order in which vLLM encodes them, that of their first arguments."""
    yield from dict.fromkeys("video" if "video" in name else "image" for name in inputs)


class LlavaProcessor(Processor):
    """Mixin over the processor of LLaVA 1.5."""

    def vtc_structural(self, rows: int, modality: str, mm_items: Any, index: int) -> int:
        return _prefix(rows)


def _prefix(rows: int) -> int:
    """Return 1 if the rows of a square crop begin with a [CLS] token, else 0."""
    return int(math.isqrt(rows) ** 2 != rows and math.isqrt(rows - 1) ** 2 == rows - 1)


@with_processor(LlavaProcessor)
class VtcLlava(Compressed, LlavaForConditionalGeneration):
    """LLaVA 1.5: one square crop; a [CLS] token that stays among the patches is none of them."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        tower = vllm_config.model_config.hf_config.vision_config.model_type
        if tower == "pixtral":
            raise UnsupportedModelError("vtc does not compress Pixtral inside vLLM: its rows are text in part.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        n = len(rows)
        prefix = _prefix(n)
        side = math.isqrt(n - prefix)
        grid = (1, side, side) if side**2 == n - prefix else (1, 1, n)
        structural = torch.arange(n) < prefix
        return (Visual(modality, (grid,), structural),)


@with_processor()
class VtcInternVL(Compressed, InternS1ForConditionalGeneration):
    """InternVL: a picture is equal tiles, a video is frames that are pictures of one tile, with text between."""

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        side = math.isqrt(int(self.num_image_token))
        tiles = len(rows) // side**2
        grid = (1, side, side)
        if modality == "video":
            return [Visual("image", (grid,))] * tiles
        return (Visual("image", (grid,) * tiles),)


def _large_grid(info: Any, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of the large grid of a picture that is cut into tiles, newlines not counted."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    encoder, pinpoints = info.get_vision_encoder_info(), info.get_hf_config().image_grid_pinpoints
    rows, columns = get_anyres_image_grid_shape((height, width), pinpoints, encoder.get_image_size())
    tokens, newlines = info._get_num_unpadded_features(
        original_height=height,
        original_width=width,
        npatches=encoder.get_patch_grid_length(),
        num_patch_height=rows,
        num_patch_width=columns,
    )
    return newlines, tokens // newlines


class AnyResProcessor(Processor):
    """Mixin over the processors of families that cut pictures into tiles, with a newline behind every row."""

    def vtc_structural(self, rows: int, modality: str, mm_items: Any, index: int) -> int:
        if modality == "video":
            return 1  # behind the last frame
        items = mm_items[modality]
        if not isinstance(items, ImageProcessorItems):
            raise UnsupportedModelError("vtc compresses pictures, not embeddings of pictures, in families with tiles.")
        size = items.get_image_size(index)
        return _large_grid(self.info, size.height, size.width)[0]


class AnyRes(Compressed):
    """Mixin over model classes of these families."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.vtc_info = MULTIMODAL_REGISTRY.get_processing_info(vllm_config.model_config)

    def vtc_side(self) -> int:
        """Return how many patches a tile has along its edge."""
        vision = self.config.vision_config  # type: ignore[attr-defined]
        return int(vision.image_size // vision.patch_size)

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        side = self.vtc_side()
        height, width = map(int, inputs["image_sizes"][index])
        lines, columns = _large_grid(self.vtc_info, height, width)
        newlines = torch.zeros(len(rows), dtype=torch.bool)
        newlines[side**2 :].view(lines, columns + 1)[:, -1] = True
        return (Visual(modality, ((1, side, side), (1, lines, columns)), newlines),)


@with_processor(AnyResProcessor)
class VtcLlavaNext(AnyRes, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: a thumbnail, and tiles that form one large grid."""


@with_processor(AnyResProcessor)
class VtcLlavaOnevision(AnyRes, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision: pictures as in LLaVA-NeXT, frames of videos at half their size."""

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        if modality != "video":
            return super().vtc_visuals(modality, rows, index, inputs)
        side, n = -(-self.vtc_side() // 2), len(rows)
        return (Visual(modality, ((n // side**2, side, side),), torch.arange(n) == n - 1),)
