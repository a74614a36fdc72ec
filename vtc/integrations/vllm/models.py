"""The model's side: of the rows that the family's own encoder makes, those that a method chooses.

Every class is vLLM's own with `Compressed` over it. A family says how the rows of its pictures and videos lie.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from vtc.adapters.base import Adapter
from vtc.core.signals import Signal, VisionSignal
from vtc.engine.plan import PlannedStage
from vtc.errors import StateError, UnsupportedModelError
from vtc.integrations.vllm.choosing import Visual, choose_rows
from vtc.integrations.vllm.processing import Processor, field_of, stages_of, with_processor
from vtc.integrations.vllm.tower import Seen, Tower, adapter_of, reads_tower, tower_signals

__all__ = ["Compressed", "VtcInternVL", "VtcLlava", "VtcLlavaNext", "VtcLlavaOnevision"]

MODALITIES = ("image", "video")
_LOG = logging.getLogger(__name__)


class Compressed:
    """Mixin over a model class of vLLM whose rows of pictures and videos become fewer behind the encoder.

    The encoder's results are cached per item by vLLM, and the settings are part of the item's hash.
    """

    # Recorded graphs of the encoder would be replayed without what comes behind it.
    supports_encoder_cudagraph: ClassVar[bool] = False
    vtc_packed: ClassVar[bool] = False  # whether all pictures enter the tower as one sequence
    vtc_config: Any
    vtc_known_adapter: Adapter | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        compilation = vllm_config.compilation_config
        if compilation.compile_mm_encoder:
            _LOG.warning("vtc reads layers of the vision tower: it runs without compile_mm_encoder.")
            compilation.compile_mm_encoder = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.vtc_config = vllm_config.model_config.hf_config

    @functools.cached_property
    def vtc_tower(self) -> Tower:
        """The vision tower, as methods read it."""
        return Tower(self.vtc_adapter(), cast(nn.Module, self), MMEncoderAttention, packed=self.vtc_packed)

    def vtc_adapter(self) -> Adapter:
        """Return the library's adapter of the model."""
        if self.vtc_known_adapter is None:
            self.vtc_known_adapter = adapter_of(self.vtc_config)
        return self.vtc_known_adapter

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
        self,
        modality: str,
        rows: Tensor,
        index: int,
        inputs: Mapping[str, Any],
        stage: PlannedStage | None,
        signals: Mapping[Signal, Tensor],
    ) -> Tensor:
        """Return what goes into the prompt for one item, (K, D)."""
        return rows if stage is None else self.vtc_chosen(modality, rows, index, inputs, stage, signals)[1]

    def vtc_chosen(
        self,
        modality: str,
        rows: Tensor,
        index: int,
        inputs: Mapping[str, Any],
        stage: PlannedStage,
        signals: Mapping[Signal, Tensor],
        width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose among the rows of one item; return which stay, (K,), and them, (K, D)."""
        visuals = self.vtc_visuals(modality, rows, index, inputs)
        kept, parts, start = [], [], 0
        for visual in visuals:
            size = sum(map(math.prod, visual.grids))
            if visual.structural is not None:
                size = len(visual.structural)
            here = slice(start, start + size)
            own = {signal: value[here] for signal, value in signals.items()}
            stays, part = choose_rows(stage, visual, rows[here], width, own)
            kept.append(stays + start)
            parts.append(part)
            start += size
        return torch.cat(kept), torch.cat(parts)

    def vtc_carried(self, modality: str, inputs: Mapping[str, Any], patches: Tensor) -> Tensor:
        """Make of values of the patches of all items, (crops, M, C), those of their rows, (total, C)."""
        return self.vtc_tower.adapter.patches_to_tokens(modality, inputs, patches)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode, and leave rows out of the result."""
        fields = {modality: kwargs.pop(field_of(modality), None) for modality in MODALITIES}
        stages = {
            modality: stages_of(field, self.vtc_adapter)
            for modality in _in_order(kwargs)
            if (field := fields[modality]) is not None
        }
        wanted = {modality: self._vtc_signals(modality, each) for modality, each in stages.items()}
        with ExitStack() as watching:
            # A setting of one picture is none of another's, but what they read is seen in one run of the tower.
            seen = {
                modality: watching.enter_context(self.vtc_tower.observed(signals, self.vtc_tower.encoded_as(modality)))
                for modality, signals in wanted.items()
                if signals
            }
            rows = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if not stages:
            return rows
        items = sum(map(len, stages.values()))
        if len(rows) != items:
            raise StateError(f"vLLM's encoder gave {len(rows)} results for {items} pictures and videos.")
        done, left = [], list(rows)
        for run, (modality, each) in enumerate(stages.items()):
            mine, left = left[: len(each)], left[len(each) :]
            lengths, runs = [len(part) for part in mine], (run, len(stages))  # the tower runs once per modality
            signals = {
                signal: self._vtc_values(seen[modality], runs, signal, modality, kwargs).split(lengths)
                for signal in wanted[modality]
            }
            done += [
                self.vtc_item(
                    modality,
                    part,
                    index,
                    kwargs,
                    stage,
                    {} if stage is None else {x: signals[x][index] for x in self._vtc_signals(modality, [stage])},
                )
                for index, (part, stage) in enumerate(zip(mine, each, strict=True))
            ]
        return tuple(done)

    def _vtc_signals(self, modality: str, stages: Sequence[PlannedStage | None]) -> list[VisionSignal]:
        """Return the signals of the tower that some of these stages read, each once."""
        reading = [stage for stage in stages if stage is not None and reads_tower(stage)]
        if not reading:
            return []
        encoded = self.vtc_tower.encoded_as(modality)
        return list(dict.fromkeys(signal for stage in reading for signal in tower_signals(stage, encoded)))

    def _vtc_values(
        self,
        seen: Seen,
        runs: tuple[int, int],
        signal: VisionSignal,
        modality: str,
        inputs: Mapping[str, Any],
    ) -> Tensor:
        encoded = self.vtc_tower.encoded_as(modality)
        carry = functools.partial(self.vtc_carried, encoded, inputs)
        return self.vtc_tower.values(seen, runs, signal, encoded, carry)


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
        super().__init__(vllm_config=vllm_config, prefix=prefix)
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

    def vtc_carried(self, modality: str, inputs: Mapping[str, Any], patches: Tensor) -> Tensor:
        videos = inputs.get("pixel_values_videos")
        if modality != "video" or isinstance(videos, Tensor):
            return super().vtc_carried(modality, inputs, patches)
        parts = patches.split([len(video) for video in videos or ()])  # with unequal numbers of frames
        carry = super().vtc_carried
        return torch.cat(
            [
                carry(modality, {"pixel_values_videos": video[None]}, part)
                for video, part in zip(videos or (), parts, strict=True)
            ]
        )

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        if modality != "video":
            return super().vtc_visuals(modality, rows, index, inputs)
        side, n = -(-self.vtc_side() // 2), len(rows)
        return (Visual(modality, ((n // side**2, side, side),), torch.arange(n) == n - 1),)
