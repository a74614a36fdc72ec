"""Qwen-VL: (t, h, w) positions, of which those of kept tokens stay as they were.

vLLM's own pruning of videos shows the way: the encoder appends columns to its rows, from which positions are computed
again when the rows meet their prompt. Here the columns say where a row lies in its picture or video, in two digits
each, so that half precision holds them exactly, and how many positions the text behind it is away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLMultiModalProcessor
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldElem, MultiModalKwargsItem, PlaceholderRange
from vllm.multimodal.processing import PromptUpdateDetails

from vtc.core.signals import Signal
from vtc.engine.plan import PlannedStage
from vtc.integrations.vllm.choosing import Visual, kept_count
from vtc.integrations.vllm.models import Compressed
from vtc.integrations.vllm.processing import Processor, with_processor

__all__ = ["KeepsPositions", "VtcQwen2VL", "VtcQwen2_5VL", "VtcQwen3VL"]

_BASE = 256  # integers up to this are exact in bfloat16
_VALUES = 5  # t, h, w, the number of the row within its item, and how many positions the item takes
_COLUMNS = 2 * _VALUES


def _always() -> bool:
    return True


class KeepsPositions(Compressed):
    """Mixin over a model class with (t, h, w) positions."""

    vtc_packed: ClassVar[bool] = True
    supports_multimodal_pruning: ClassVar[bool] = True  # vLLM's mark of classes that have `recompute_mrope_positions`
    vtc_steps_aside: bool

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.multimodal_config
        steps_aside = bool(config.video_pruning_rate)
        if not steps_aside:
            # For the runner, and for tables of positions, rows with columns are what pruned videos are.
            config.__dict__["is_multimodal_pruning_enabled"] = _always
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtc_steps_aside = steps_aside
        if not steps_aside:
            self.is_multimodal_pruning_enabled = False  # the family's own code must not prune, too

    # -- of one item ----------------------------------------------------------------------------------------------

    def vtc_grid(self, modality: str, index: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return (t, h, w) of the rows of one item."""
        t, h, w = map(int, inputs[f"{modality}_grid_thw"][index])
        merge = int(self.config.vision_config.spatial_merge_size)  # type: ignore[attr-defined]
        return t, h // merge, w // merge

    def vtc_visuals(self, modality: str, rows: Tensor, index: int, inputs: Mapping[str, Any]) -> Sequence[Visual]:
        return (Visual(modality, (self.vtc_grid(modality, index, inputs),)),)

    def vtc_width(self, rows: Tensor) -> int:
        """Return how many columns of the rows are features."""
        return rows.shape[1]

    def vtc_tokens(self, modality: str, data: Mapping[str, Any]) -> list[int]:
        """Return what an uncompressed item is in the prompt."""
        t, h, w = (int(size) for size in data[f"{modality}_grid_thw"])
        merge = int(self.config.vision_config.spatial_merge_size)  # type: ignore[attr-defined]
        token = getattr(self.config, f"{modality}_token_id")  # type: ignore[attr-defined]
        return [token] * (t * h * w // merge**2)

    def vtc_positions(self, modality: str, data: Mapping[str, Any]) -> Tensor:
        """(N, 3) long: positions of an uncompressed item that stands alone, by the family's own rule."""
        tokens = self.vtc_tokens(modality, data)
        item = {name: MultiModalFieldElem(data=torch.as_tensor(value), field=None) for name, value in data.items()}
        feature = MultiModalFeatureSpec(
            data=MultiModalKwargsItem(item),
            modality=modality,
            identifier="",
            mm_position=PlaceholderRange(offset=0, length=len(tokens)),
        )
        positions, _ = super().get_mrope_input_positions(tokens, [feature])  # type: ignore[misc]
        return positions.T.long()

    def vtc_data(self, modality: str, index: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the positions of one item depend on."""
        names = (f"{modality}_grid_thw", *(("second_per_grid_ts",) if modality == "video" else ()))
        return {name: inputs[name][index] for name in names if inputs.get(name) is not None}

    def vtc_item(
        self,
        modality: str,
        rows: Tensor,
        index: int,
        inputs: Mapping[str, Any],
        stage: PlannedStage | None,
        signals: Mapping[Signal, Tensor],
    ) -> Tensor:
        positions = self.vtc_positions(modality, self.vtc_data(modality, index, inputs))
        takes = int(positions.max()) + 1
        if stage is not None:
            kept, rows = self.vtc_chosen(modality, rows, index, inputs, stage, signals, self.vtc_width(rows))
            positions = positions[kept.to(positions.device)]
        return _with_columns(rows, positions, takes)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if self.vtc_steps_aside:
            for modality in ("image", "video"):
                kwargs.pop(f"vtc_{modality}", None)
            return super(Compressed, self).embed_multimodal(**kwargs)  # type: ignore[misc]
        return super().embed_multimodal(**kwargs)

    # -- of a prompt ----------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Compute positions before anything is encoded: those of text are right, those of items where they begin.

        The text behind an item goes on where it does without compression.
        """
        if self.vtc_steps_aside:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        positions = torch.empty(3, len(input_tokens), dtype=torch.long)
        at = following = 0  # the next token, and its position
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            start, length = feature.mm_position.offset, feature.mm_position.length
            positions[:, at:start] = torch.arange(following, following + start - at)
            following += start - at
            data = {name: elem.data for name, elem in feature.data.items()}
            takes = int(self.vtc_positions(feature.modality, self._vtc_own(feature.modality, data)).max()) + 1
            positions[:, start : start + length] = following
            following += takes
            positions[:, start + length - 1] = following - 1
            at = start + length
        rest = len(input_tokens) - at
        positions[:, at:] = torch.arange(following, following + rest)
        return positions, following + rest - len(input_tokens)

    def _vtc_own(self, modality: str, data: Mapping[str, Any]) -> dict[str, Any]:
        one = {name: [value] for name, value in data.items()}
        return self.vtc_data(modality, 0, one)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
        **kwargs: Any,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Take the columns off the rows, and write the positions that they stand for.

        The rows are those of the items, or parts of items, that the prompt has behind `num_computed_tokens`.
        """
        if self.vtc_steps_aside:
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens, **kwargs
            )
        if not len(multimodal_embeddings):
            return (), mrope_positions, int(mrope_positions[:, -1].max()) + 1 - len(input_ids)
        ids = torch.as_tensor(input_ids).cpu()
        positions = mrope_positions.clone()
        delta = None
        tokens = (self.config.image_token_id, self.config.video_token_id)  # type: ignore[attr-defined]
        places = torch.isin(ids, torch.tensor(tokens)).nonzero()[:, 0]
        places = places[places >= num_computed_tokens]
        cleaned, used = [], 0
        for rows in multimodal_embeddings:
            cleaned.append(rows[:, :-_COLUMNS])
            here = places[used : used + len(rows)]
            used += len(rows)
            where, number, takes = _read_columns(rows[:, -_COLUMNS:])
            first = int(here[0] - number[0])  # of the whole item, which may have been read in part
            begins = int(positions[:, first - 1].max()) + 1 if first else 0
            positions[:, here.to(positions.device)] = (where.T + begins).to(positions)
            if int(here[-1]) == len(ids) - 1:
                delta = begins + int(takes[0]) - len(ids)
        if delta is None:
            delta = int(positions[:, len(ids) - 1].max()) + 1 - len(ids)
        return cleaned, positions, delta


def _with_columns(rows: Tensor, positions: Tensor, takes: int) -> Tensor:
    """Append to (K, D) rows where each lies (K, 3), its number, and how many positions the item takes."""
    number = torch.arange(len(rows))
    values = torch.cat([positions.cpu(), number[:, None], torch.full_like(number, takes)[:, None]], dim=1)
    digits = torch.cat([values // _BASE, values % _BASE], dim=1)
    return torch.cat([rows, digits.to(rows)], dim=1)


def _read_columns(digits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (K, 3) where each row lies, its number (K,), and how many positions its item takes (K,)."""
    high, low = digits.cpu().long().split(_VALUES, dim=1)
    values = high * _BASE + low
    return values[:, :3], values[:, 3], values[:, 4]


@with_processor()
class VtcQwen2VL(KeepsPositions, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@with_processor()
class VtcQwen2_5VL(KeepsPositions, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class Qwen3Processor(Processor):
    """Mixin over the processor of Qwen3-VL, whose videos have text between their frames.

    How many tokens a frame keeps depends on what it shows, so that the places of that text are not known yet: all of a
    video is one run of placeholders, and the encoder fills in the text as well.
    """

    def vtc_shortened(self, stage: PlannedStage | None, content: Any, modality: str, mm_items: Any, index: int) -> Any:
        if modality != "video":
            return super().vtc_shortened(stage, content, modality, mm_items, index)
        video = self.info.get_hf_config().video_token_id
        full = content.full if isinstance(content, PromptUpdateDetails) else content
        rows = full.count(video)
        kept = rows if stage is None else kept_count(stage, rows)
        return PromptUpdateDetails.from_seq([video] * (len(full) - rows + kept))


@with_processor(Qwen3Processor)
class VtcQwen3VL(KeepsPositions, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: behind the features of a row stand the planes of deepstack, which are not looked at."""

    def vtc_width(self, rows: Tensor) -> int:
        return int(self.visual_dim)

    def vtc_data(self, modality: str, index: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = super().vtc_data(modality, index, inputs)
        if modality == "video":
            found["timestamps"] = inputs["timestamps"][index]
        return found

    def vtc_tokens(self, modality: str, data: Mapping[str, Any]) -> list[int]:
        if modality != "video":
            return super().vtc_tokens(modality, data)
        t, h, w = (int(size) for size in data["video_grid_thw"])
        merge = int(self.config.vision_config.spatial_merge_size)
        return self._vtc_frames([h * w // merge**2] * t, data["timestamps"])

    def _vtc_frames(self, counts: Sequence[int], timestamps: Any) -> list[int]:
        """Return the tokens of a video whose frames have so many rows."""
        found: list[int] = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=list(counts),
            timestamps=timestamps,
            tokenizer=getattr(self, "_tokenizer"),  # noqa: B009  # vLLM's own model has it under no other name
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            video_token_id=self.config.video_token_id,
        ).full
        return found

    def vtc_item(
        self,
        modality: str,
        rows: Tensor,
        index: int,
        inputs: Mapping[str, Any],
        stage: PlannedStage | None,
        signals: Mapping[Signal, Tensor],
    ) -> Tensor:
        if modality != "video":
            return super().vtc_item(modality, rows, index, inputs, stage, signals)
        t, h, w = self.vtc_grid(modality, index, inputs)
        data = self.vtc_data(modality, index, inputs)
        kept = torch.arange(len(rows))
        if stage is not None:
            kept, rows = self.vtc_chosen(modality, rows, index, inputs, stage, signals, self.vtc_width(rows))
        counts = torch.bincount(kept.cpu() // (h * w), minlength=t).tolist()
        positions, tokens = self.vtc_positions(modality, data), torch.tensor(self.vtc_tokens(modality, data))
        stays = tokens != self.config.video_token_id
        stays[(~stays).nonzero()[:, 0][kept.cpu()]] = True
        final = self._create_final_video_embeddings(
            video_embeddings=rows,
            num_tokens_per_frame=counts,
            timestamps=data["timestamps"],
            video_grid_thw=inputs["video_grid_thw"][index].tolist(),
            retention_mask=None,
        )
        return _with_columns(final, positions[stays], int(positions.max()) + 1)
