"""Tiny random-weight vision-language models, built from their configs in milliseconds, with inputs to match.

Every test that needs a model takes it from here. A family is one `Family` line in `FAMILIES`: an architecture (how
the config is built and what its images and videos look like) and the modality that this line exercises. A batch is
described once, as rows of text runs and visuals, and collated from there, so that a test can ask for the same rows
singly, padded on the other side or in another order and be sure that ids and pixels are the same.

The weights are large on purpose (standard deviation 0.2, logits of about 5): an error of one token or one position
moves the logits by whole units, while float32 rounding stays below 1e-5.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, PAD, BOS, VISION_START, VISION_END, VIDEO, IMAGE = 300, 0, 1, 296, 297, 298, 299
VIDEO_START, VIDEO_END = 292, 293
"""Token ids shared by all tiny models; ordinary text is drawn from 3..289."""

HIDDEN = 64
WINDOW = 24
INIT = 0.2

Inputs = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Row:
    """One prompt: `lead` text tokens, then the visuals with three text tokens after each, then `tail` text tokens.

    A visual is `(modality or None for the family's own, size index)`; `name` seeds the text and the pixels of the row.
    """

    name: int
    lead: int
    visuals: tuple[tuple[str | None, int], ...]
    tail: int


def _own(*sizes: int) -> tuple[tuple[str | None, int], ...]:
    return tuple((None, size) for size in sizes)


_RAGGED = (Row(0, 4, _own(0), 9), Row(1, 7, _own(1, 2), 5))

ROWS: dict[str, tuple[Row, ...]] = {
    "single": (Row(0, 4, _own(0), 9),),
    "ragged": _RAGGED,
    "right_padded": _RAGGED,
    "two_images": (Row(2, 5, _own(0, 1), 7), Row(3, 3, _own(2, 0), 6)),
    # The text row stands first, so that the first visual does not belong to the first row.
    "no_image_row": (Row(4, 9, (), 12), Row(5, 6, _own(1), 5)),
    "text_only": (Row(6, 5, (), 6), Row(7, 9, (), 6)),
    "mixed": (Row(8, 4, (("image", 0), ("video", 0)), 6), Row(9, 6, (("video", 1),), 5)),
}
"""Batch kinds. Every family has all of them but "mixed", which needs an image and a video encoder."""

KINDS: tuple[str, ...] = tuple(kind for kind in ROWS if kind != "mixed")


# ---------------------------------------------------------------------------------------------- kinds of visuals


_COUNTS: dict[tuple[Any, ...], int] = {}
"""What models answered to `ProbedVisuals`."""


class Visuals:
    """How one modality of an architecture turns into placeholder tokens and into processor tensors."""

    def layout(self, model: Any, size: int, alone: bool, text: Callable[[int], list[int]]) -> list[int]:
        """Token ids that stand for one visual of this size; `alone`: no other of this modality in its row."""
        raise NotImplementedError

    def tensors(self, size: int, generator: torch.Generator) -> Inputs:
        """Processor output for one visual, with a leading axis to concatenate along."""
        raise NotImplementedError

    def collate(self, rows: Sequence[Sequence[Inputs]]) -> Inputs:
        """Join the tensors of all visuals, in row order."""
        flat = [tensors for row in rows for tensors in row]
        return {key: torch.cat([tensors[key] for tensors in flat]) for key in (flat[0] if flat else ())}


@dataclass(frozen=True)
class FixedVisuals(Visuals):
    """Images (or videos of `frames` frames) that always make the same number of tokens, perhaps in several tiles."""

    tokens: int
    side: int = 32
    tiles: tuple[int, ...] = (1,)
    frames: tuple[int, ...] = ()
    token_id: int = IMAGE

    def layout(self, model: Any, size: int, alone: bool, text: Callable[[int], list[int]]) -> list[int]:
        return [self.token_id] * (self.tokens * self._units(size))

    def tensors(self, size: int, generator: torch.Generator) -> Inputs:
        pixels = torch.randn(self._units(size), 3, self.side, self.side, generator=generator)
        return {"pixel_values_videos": pixels[None]} if self.frames else {"pixel_values": pixels}

    def _units(self, size: int) -> int:
        counts = self.frames or self.tiles
        return counts[size % len(counts)]


@dataclass(frozen=True)
class NestedVisuals(FixedVisuals):
    """Idefics3 and SmolVLM: `(rows, images, 3, H, W)` with all-zero padding images."""

    def collate(self, rows: Sequence[Sequence[Inputs]]) -> Inputs:
        stacks = [torch.cat([v["pixel_values"] for v in row]) if row else None for row in rows]
        width = max(len(stack) for stack in stacks if stack is not None)
        out = torch.zeros(len(rows), width, 3, self.side, self.side)
        for row, stack in enumerate(stacks):
            if stack is not None:
                out[row, : len(stack)] = stack
        return {"pixel_values": out}


@dataclass(frozen=True)
class ProbedVisuals(Visuals):
    """Visuals whose token count only the model knows (anyres tiling, resampling): it is asked once per size."""

    shapes: tuple[tuple[int, ...], ...]
    image_sizes: tuple[tuple[int, int], ...] = ()
    token_id: int = IMAGE
    batch_num_images: bool = False

    def layout(self, model: Any, size: int, alone: bool, text: Callable[[int], list[int]]) -> list[int]:
        key = (self, type(model), size, alone)
        if key not in _COUNTS:
            _COUNTS[key] = self._count(model, size, alone)
        return [self.token_id] * _COUNTS[key]

    def _count(self, model: Any, size: int, alone: bool) -> int:
        tensors = self.tensors(size, torch.Generator().manual_seed(0))
        tensors = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        if self.batch_num_images and not alone:
            # Two copies in one "row": the model then leaves out the tiles of both.
            tensors = {key: torch.cat([value, value]) for key, value in tensors.items()}
            tensors["batch_num_images"] = torch.tensor([2])
        encode = model.model.get_image_features if self.token_id == IMAGE else model.model.get_video_features
        with torch.no_grad():
            features = encode(**tensors, return_dict=True).pooler_output
        return features[0].reshape(-1, HIDDEN).shape[0]

    def tensors(self, size: int, generator: torch.Generator) -> Inputs:
        pixels = torch.randn(1, *self.shapes[size % len(self.shapes)], generator=generator)
        if self.token_id == VIDEO:
            return {"pixel_values_videos": pixels}
        return {"pixel_values": pixels, "image_sizes": torch.tensor([self.image_sizes[size % len(self.image_sizes)]])}

    def collate(self, rows: Sequence[Sequence[Inputs]]) -> Inputs:
        out = super().collate(rows)
        if self.batch_num_images and out:
            out["batch_num_images"] = torch.tensor([len(row) for row in rows if row])
        return out


@dataclass(frozen=True)
class GridVisuals(Visuals):
    """Qwen-VL: a packed patch list and one `(t, h, w)` grid per visual.

    `split`: two text tokens before each frame; `ends`: tokens around the visual.
    """

    grids: tuple[tuple[int, int, int], ...]
    video: bool = False
    token_id: int = IMAGE
    merge: int = 2
    patch_dim: int = 3 * 2 * 4 * 4
    split: bool = False
    ends: tuple[int, ...] = ()

    def layout(self, model: Any, size: int, alone: bool, text: Callable[[int], list[int]]) -> list[int]:
        frames, height, width = self.grids[size % len(self.grids)]
        per_frame = [self.token_id] * (height * width // self.merge**2)
        ids: list[int] = []
        for _ in range(frames):
            ids += (text(2) if self.split else []) + per_frame
        return [*self.ends[:1], *ids, *self.ends[1:]]

    def tensors(self, size: int, generator: torch.Generator) -> Inputs:
        grid = torch.tensor([self.grids[size % len(self.grids)]])
        patches = torch.randn(int(grid.prod()), self.patch_dim, generator=generator)
        if self.video:
            return {"pixel_values_videos": patches, "video_grid_thw": grid}
        return {"pixel_values": patches, "image_grid_thw": grid}


@dataclass(frozen=True)
class SizedVisuals(Visuals):
    """Pixtral: pictures of any size, padded to the largest of a batch, with a text token behind every row of tokens."""

    sizes: tuple[tuple[int, int], ...]
    cell: int

    def layout(self, model: Any, size: int, alone: bool, text: Callable[[int], list[int]]) -> list[int]:
        height, width = self.sizes[size % len(self.sizes)]
        rows = [[IMAGE] * (width // self.cell) + text(1) for _ in range(height // self.cell)]
        return [token for row in rows for token in row]

    def tensors(self, size: int, generator: torch.Generator) -> Inputs:
        height, width = self.sizes[size % len(self.sizes)]
        pixels = torch.randn(1, 3, height, width, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}

    def collate(self, rows: Sequence[Sequence[Inputs]]) -> Inputs:
        flat = [tensors for row in rows for tensors in row]
        sizes = torch.cat([tensors["image_sizes"] for tensors in flat])
        pixels = torch.zeros(len(flat), 3, *sizes.amax(dim=0).tolist())
        for padded, tensors, (height, width) in zip(pixels, flat, sizes.tolist(), strict=True):
            padded[:, :height, :width] = tensors["pixel_values"][0]
        return {"pixel_values": pixels, "image_sizes": sizes}


# ------------------------------------------------------------------------------------------------- architectures


@dataclass(frozen=True)
class Architecture:
    """A config and the visuals it understands.

    `extras(ids)` adds the tensors that the family's processor would make from the token ids.
    """

    model_class: str
    config: Callable[[], Any]
    visuals: dict[str, Visuals]
    extras: Callable[[Tensor], Inputs] = lambda ids: {}
    images_first: bool = False
    prepare: Callable[[Any], None] = lambda model: None


def _text(layers: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": 2,
        "initializer_range": INIT,
        **changes,
    }


def _tower(layers: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        **changes,
    }


def _clip(image_size: int = 32) -> Any:
    return transformers.CLIPVisionConfig(**_tower(4, projection_dim=32, initializer_range=INIT, image_size=image_size))


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**_tower(vision_use_head=False))


def _pixtral() -> Any:
    return transformers.PixtralVisionConfig(**_tower(4, patch_size=4, initializer_range=INIT))


def _dinov2() -> Any:
    shape = {key: value for key, value in _tower(4).items() if key != "intermediate_size"}
    return transformers.Dinov2Config(mlp_ratio=2, initializer_range=INIT, **shape)


_PINPOINTS = [[32, 64], [64, 32], [64, 64]]
_ANYRES_SIZES = ((60, 60), (30, 64), (64, 40))
_PLACEHOLDERS = {"image_token_index": IMAGE}
_BOTH_PLACEHOLDERS = {"image_token_index": IMAGE, "video_token_index": VIDEO}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _llava(tower: Callable[[], Any]) -> Any:
    return transformers.LlavaConfig(
        vision_config=tower(), text_config=transformers.LlamaConfig(**_text()), image_seq_length=16, **_PLACEHOLDERS
    )


def _llava_pixtral() -> Any:
    config = _llava(_pixtral)
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    return config


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        vision_config=_pixtral(),
        text_config=transformers.MistralConfig(sliding_window=None, **_text()),
        spatial_merge_size=2,
        **_PLACEHOLDERS,
    )


def _llava_next(sliding_window: int | None = None) -> Any:
    return transformers.LlavaNextConfig(
        vision_config=_clip(),
        text_config=transformers.MistralConfig(sliding_window=sliding_window, **_text()),
        image_seq_length=16,
        image_grid_pinpoints=_PINPOINTS,
        **_PLACEHOLDERS,
    )


def _llava_next_video() -> Any:
    return transformers.LlavaNextVideoConfig(
        vision_config=_clip(),
        text_config=transformers.LlamaConfig(**_text()),
        image_seq_length=16,
        video_seq_length=8,
        image_grid_pinpoints=_PINPOINTS,
        **_BOTH_PLACEHOLDERS,
    )


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=transformers.Qwen2Config(**_text()),
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        **_BOTH_PLACEHOLDERS,
    )


def _video_llava() -> Any:
    return transformers.VideoLlavaConfig(
        vision_config=_clip(),
        text_config=transformers.LlamaConfig(**_text()),
        image_seq_length=16,
        video_seq_length=8,
        **_BOTH_PLACEHOLDERS,
    )


def _qwen_tower(**changes: Any) -> dict[str, Any]:
    return {"num_heads": 4, "patch_size": 4, "initializer_range": INIT, **changes}


def _qwen_rope(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **changes}


def _qwen2_vl() -> Any:
    return transformers.Qwen2VLConfig(
        text_config=_text(rope_parameters=_qwen_rope()),
        vision_config=_qwen_tower(depth=3, embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2),
        **_QWEN_IDS,
    )


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(rope_parameters=_qwen_rope()),
        vision_config=_qwen_tower(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=HIDDEN,
            window_size=16,
            fullatt_block_indexes=[2],
        ),
        **_QWEN_IDS,
    )


def _qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config=_text(5, head_dim=16, rope_parameters=_qwen_rope(mrope_interleaved=True)),
        vision_config=_qwen_tower(
            depth=4,
            hidden_size=32,
            intermediate_size=48,
            out_hidden_size=HIDDEN,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1, 2],
        ),
        **_QWEN_IDS,
    )


def _qwen3_5(config_class: str = "Qwen3_5Config", **text: Any) -> Any:
    return getattr(transformers, config_class)(
        text_config=_text(
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            rope_parameters=_qwen_rope(mrope_section=[1, 1, 2], mrope_interleaved=True, partial_rotary_factor=0.5),
            **text,
        ),
        vision_config=_qwen_tower(
            depth=2, hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN, num_position_embeddings=64
        ),
        **_QWEN_IDS,
    )


def _glm4v(config_class: str = "Glm4vConfig", sections: Sequence[int] = (2, 3, 3), **text: Any) -> Any:
    return getattr(transformers, config_class)(
        text_config=_text(rope_parameters=_qwen_rope(mrope_section=list(sections)), **text),
        vision_config=_qwen_tower(depth=3, hidden_size=32, intermediate_size=48, out_hidden_size=HIDDEN, image_size=32),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


def _internvl(image_size: int = 32) -> Any:
    return transformers.InternVLConfig(
        vision_config=_tower(4, image_size=[image_size] * 2, patch_size=[4, 4], initializer_range=INIT),
        text_config=transformers.Qwen2Config(**_text()),
        image_token_id=IMAGE,
        image_seq_length=(image_size // 8) ** 2,
    )


def _idefics3(config_class: str) -> Any:
    return getattr(transformers, config_class)(
        vision_config=_tower(patch_size=4, initializer_range=INIT),
        text_config=transformers.LlamaConfig(**_text()),
        image_token_id=IMAGE,
        scale_factor=2,
    )


def _cohere(config_class: str) -> Any:
    return getattr(transformers, config_class)(
        vision_config=transformers.SiglipVisionConfig(**_tower(vision_use_head=False, patch_size=4)),
        text_config=transformers.Cohere2Config(**_text()),
        downsample_factor=2,
        alignment_intermediate_size=96,
        image_token_id=IMAGE,
    )


def _gemma3(sliding_window: int = 256) -> Any:
    text = transformers.Gemma3TextConfig(
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **_text(),
    )
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=_siglip(),
        mm_tokens_per_image=16,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        **_PLACEHOLDERS,
    )


def _paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(head_dim=16, **_text()),
        vision_config={"model_type": "siglip_vision_model", **_tower(vision_use_head=False, projection_dim=HIDDEN)},
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        **_PLACEHOLDERS,
    )


def _fill_gemma3_projector(model: Any) -> None:
    # The projection starts at zero, which would make all visual tokens equal.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)


def _route_in_any_precision(model: Any) -> None:
    model.set_experts_implementation("eager")  # the others know no float64


def _mm_token_types(ids: Tensor) -> Inputs:
    return {"mm_token_type_ids": ((ids == IMAGE) + 2 * (ids == VIDEO)).int()}


def _glm_token_types(ids: Tensor) -> Inputs:
    inside = (ids == VIDEO_START).cumsum(dim=1) > (ids == VIDEO_END).cumsum(dim=1)
    return {"mm_token_type_ids": ((ids == IMAGE) * (1 + inside.int())).int()}


_QWEN_IMAGES = GridVisuals(((1, 8, 8), (1, 4, 8), (1, 8, 6)))
_QWEN_LARGE = GridVisuals(((1, 36, 36),))
_QWEN_VIDEOS = GridVisuals(((2, 4, 8), (3, 4, 4), (2, 4, 4)), video=True, token_id=VIDEO)
_GLM_VIDEOS = dataclasses.replace(_QWEN_VIDEOS, token_id=IMAGE, split=True, ends=(VIDEO_START, VIDEO_END))


def _anyres(**changes: Any) -> ProbedVisuals:
    return ProbedVisuals(shapes=((5, 3, 32, 32),), image_sizes=_ANYRES_SIZES, **changes)


_QWEN_BOTH: dict[str, Visuals] = {"image": _QWEN_IMAGES, "video": _QWEN_VIDEOS}
_QWEN_SPLIT: dict[str, Visuals] = {"image": _QWEN_IMAGES, "video": dataclasses.replace(_QWEN_VIDEOS, split=True)}

_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        "LlavaForConditionalGeneration", functools.partial(_llava, _clip), {"image": FixedVisuals(16)}
    ),
    "llava_dinov2": Architecture(
        "LlavaForConditionalGeneration", functools.partial(_llava, _dinov2), {"image": FixedVisuals(16)}
    ),
    "llava_siglip": Architecture(
        "LlavaForConditionalGeneration", functools.partial(_llava, _siglip), {"image": FixedVisuals(15)}
    ),
    "llava_pixtral": Architecture(
        "LlavaForConditionalGeneration", _llava_pixtral, {"image": SizedVisuals(((16, 16), (12, 20), (8, 16)), 4)}
    ),
    "mistral3": Architecture(
        "Mistral3ForConditionalGeneration", _mistral3, {"image": SizedVisuals(((32, 32), (24, 40), (16, 32)), 8)}
    ),
    "aya_vision": Architecture(
        "AyaVisionForConditionalGeneration",
        functools.partial(_cohere, "AyaVisionConfig"),
        {"image": FixedVisuals(16, tiles=(2, 1))},
    ),
    "cohere2_vision": Architecture(
        "Cohere2VisionForConditionalGeneration",
        functools.partial(_cohere, "Cohere2VisionConfig"),
        {"image": FixedVisuals(16, tiles=(2, 1))},
    ),
    "llava_next": Architecture("LlavaNextForConditionalGeneration", _llava_next, {"image": _anyres()}),
    "llava_next_video": Architecture(
        "LlavaNextVideoForConditionalGeneration",
        _llava_next_video,
        # The resampler wants one frame count per batch.
        {"image": _anyres(), "video": ProbedVisuals(shapes=((5, 3, 32, 32),), token_id=VIDEO)},
    ),
    "llava_onevision": Architecture(
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        {
            "image": _anyres(batch_num_images=True),
            "video": ProbedVisuals(shapes=((4, 3, 32, 32),), token_id=VIDEO),
        },
    ),
    "video_llava": Architecture(
        "VideoLlavaForConditionalGeneration",
        _video_llava,
        {"image": FixedVisuals(16), "video": FixedVisuals(17, frames=(3,), token_id=VIDEO)},
    ),
    "qwen2_vl": Architecture("Qwen2VLForConditionalGeneration", _qwen2_vl, _QWEN_BOTH, _mm_token_types),
    "qwen2_5_vl": Architecture("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, _QWEN_BOTH, _mm_token_types),
    "qwen3_vl": Architecture("Qwen3VLForConditionalGeneration", _qwen3_vl, _QWEN_SPLIT, _mm_token_types),
    "qwen3_5": Architecture("Qwen3_5ForConditionalGeneration", _qwen3_5, _QWEN_SPLIT, _mm_token_types),
    "qwen3_5_moe": Architecture(
        "Qwen3_5MoeForConditionalGeneration",
        functools.partial(_qwen3_5, "Qwen3_5MoeConfig", shared_expert_intermediate_size=32, num_experts=4, **_EXPERTS),
        _QWEN_SPLIT,
        _mm_token_types,
        prepare=_route_in_any_precision,
    ),
    "glm4v_moe": Architecture(
        "Glm4vMoeForConditionalGeneration",
        functools.partial(_glm4v, "Glm4vMoeConfig", (1, 1, 2), n_routed_experts=4, head_dim=16, **_EXPERTS),
        {"image": _QWEN_IMAGES},
        _glm_token_types,
        prepare=_route_in_any_precision,
    ),
    "glm46v": Architecture(
        "Glm46VForConditionalGeneration",
        functools.partial(_glm4v, "Glm46VConfig"),
        {"image": _QWEN_IMAGES},
        _glm_token_types,
    ),
    # Two architectures, as transformers refuses images and videos in one batch: they have one placeholder.
    "glm4v": Architecture("Glm4vForConditionalGeneration", _glm4v, {"image": _QWEN_IMAGES}, _glm_token_types),
    "glm4v_video": Architecture("Glm4vForConditionalGeneration", _glm4v, {"video": _GLM_VIDEOS}, _glm_token_types),
    "internvl": Architecture("InternVLForConditionalGeneration", _internvl, {"image": FixedVisuals(16)}),
    "llava_large": Architecture(
        "LlavaForConditionalGeneration",
        functools.partial(_llava, functools.partial(_clip, 144)),
        {"image": FixedVisuals(324, side=144)},
    ),
    "llava_next_window": Architecture(
        "LlavaNextForConditionalGeneration", functools.partial(_llava_next, WINDOW), {"image": _anyres()}
    ),
    "gemma3_window": Architecture(
        "Gemma3ForConditionalGeneration",
        functools.partial(_gemma3, WINDOW),
        {"image": FixedVisuals(16)},
        extras=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
        prepare=_fill_gemma3_projector,
    ),
    "internvl_large": Architecture(
        "InternVLForConditionalGeneration",
        functools.partial(_internvl, 144),
        {"image": FixedVisuals(324, side=144)},
    ),
    "qwen2_5_vl_large": Architecture(
        "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, {"image": _QWEN_LARGE}, _mm_token_types
    ),
    "internvl_tiles": Architecture(
        "InternVLForConditionalGeneration", _internvl, {"image": FixedVisuals(16, tiles=(3, 2, 1))}
    ),
    "idefics3": Architecture(
        "Idefics3ForConditionalGeneration",
        functools.partial(_idefics3, "Idefics3Config"),
        {"image": NestedVisuals(16, tiles=(2, 1))},
    ),
    "smolvlm": Architecture(
        "SmolVLMForConditionalGeneration",
        functools.partial(_idefics3, "SmolVLMConfig"),
        {"image": NestedVisuals(16, tiles=(2, 1))},
    ),
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        {"image": FixedVisuals(16)},
        extras=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
        prepare=_fill_gemma3_projector,
    ),
    "paligemma": Architecture(
        "PaliGemmaForConditionalGeneration",
        _paligemma,
        {"image": FixedVisuals(16)},
        extras=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        images_first=True,
    ),
}


# ------------------------------------------------------------------------------------------------------ families


@dataclass(frozen=True)
class Family:
    """One line of the test matrices.

    Parameters
    ----------
    name : str
        Test id, and the argument of `build`.
    architecture : str
        Key of `ARCHITECTURES`.
    modality : {"image", "video"}
        What the batches of this line show the model.
    cls : bool
        Whether the vision tower has a [CLS] token, so that CLS-attention methods apply.
    hybrid : bool
        Whether the decoder has linear-attention layers, for which masking a token differs from dropping it.
    routed : bool
        Whether experts are weighted in float32 even in a model in float64, which then rounds as one in float32.
    like : str, optional
        A line with the same adapter and a decoder of the same kind: the laws are tried with few methods here.
    """

    name: str
    architecture: str
    modality: str = "image"
    cls: bool = False
    hybrid: bool = False
    routed: bool = False
    like: str | None = None

    @property
    def any_size(self) -> bool:
        """Whether the vision tower takes pictures of any size."""
        return isinstance(ARCHITECTURES[self.architecture].visuals[self.modality], GridVisuals)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Batch kinds that this family can be asked for."""
        return KINDS + (("mixed",) if len(ARCHITECTURES[self.architecture].visuals) == 2 else ())

    def __str__(self) -> str:
        return self.name


FAMILIES: tuple[Family, ...] = (
    Family("llava", "llava", cls=True),
    Family("llava_dinov2", "llava_dinov2", cls=True),
    Family("llava_siglip", "llava_siglip"),
    Family("llava_next", "llava_next", cls=True),
    Family("llava_next_video", "llava_next_video", "video", cls=True),
    Family("llava_onevision", "llava_onevision"),
    Family("llava_onevision_video", "llava_onevision", "video"),
    Family("video_llava", "video_llava", "video", cls=True),
    Family("video_llava_image", "video_llava", cls=True),
    Family("qwen2_vl", "qwen2_vl"),
    Family("qwen2_vl_video", "qwen2_vl", "video"),
    Family("qwen2_5_vl", "qwen2_5_vl"),
    Family("qwen2_5_vl_video", "qwen2_5_vl", "video"),
    Family("qwen3_vl", "qwen3_vl"),
    Family("qwen3_vl_video", "qwen3_vl", "video"),
    Family("glm4v", "glm4v"),
    Family("glm4v_video", "glm4v_video", "video"),
    Family("internvl", "internvl", cls=True),
    Family("internvl_tiles", "internvl_tiles", cls=True),
    Family("idefics3", "idefics3"),
    Family("smolvlm", "smolvlm", like="idefics3"),
    Family("gemma3", "gemma3"),
    Family("paligemma", "paligemma"),
    Family("qwen3_5", "qwen3_5", hybrid=True),
    Family("llava_pixtral", "llava_pixtral", like="mistral3"),
    Family("mistral3", "mistral3"),
    Family("aya_vision", "aya_vision"),
    Family("cohere2_vision", "cohere2_vision", like="aya_vision"),
    Family("glm4v_moe", "glm4v_moe", routed=True, like="glm4v"),
    Family("glm46v", "glm46v", like="glm4v"),
    Family("qwen3_5_moe", "qwen3_5_moe", hybrid=True, like="qwen3_5"),
)

LARGE: tuple[Family, ...] = (
    Family("llava_large", "llava_large", cls=True),
    Family("internvl_large", "internvl_large", cls=True),
    Family("qwen2_5_vl_large", "qwen2_5_vl_large"),
)
"""324 tokens per image, more than any width of these models: its shape identifies a tensor of tokens x tokens."""

WINDOWED: tuple[Family, ...] = (
    Family("llava_next_window", "llava_next_window", cls=True),
    Family("gemma3_window", "gemma3_window"),
)
"""Layers that look back `WINDOW` tokens, less than a picture is long."""


def family(name: str) -> Family:
    """The line of `FAMILIES`, `LARGE` or `WINDOWED` with this name."""
    for candidate in FAMILIES + LARGE + WINDOWED:
        if candidate.name == name:
            return candidate
    raise KeyError(f"no tiny family {name!r}; there are {', '.join(f.name for f in FAMILIES)}")


@dataclass(frozen=True, eq=False)
class TinyCase:
    """A tiny model and the batches that go with it."""

    family: Family
    model: Any
    seed: int

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.family.architecture]

    def batch(self, kind: str = "ragged") -> Inputs:
        """Model inputs of this kind (`ROWS`), as the family's processor would make them.

        Left-padded, but for "right_padded". Always the same for the same family, seed and kind.
        """
        return self.collate(ROWS[kind], side="right" if kind == "right_padded" else "left")

    def rows(self, kind: str = "ragged") -> list[Inputs]:
        """The rows of `batch(kind)` as batches of one, without padding."""
        return [self.collate((row,)) for row in ROWS[kind]]

    def collate(self, rows: Sequence[Row], *, side: str = "left") -> Inputs:
        """Inputs for any rows, padded on `side`."""
        built = [self._row(row) for row in rows]
        length = max(len(ids) for ids, _ in built)
        ids = torch.full((len(built), length), PAD)
        mask = torch.zeros_like(ids)
        for b, (row_ids, _) in enumerate(built):
            columns = slice(length - len(row_ids), None) if side == "left" else slice(0, len(row_ids))
            ids[b, columns] = torch.tensor(row_ids)
            mask[b, columns] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, **self.architecture.extras(ids)}
        for modality, visuals in self.architecture.visuals.items():
            tensors = [[t for name, t in row_tensors if name == modality] for _, row_tensors in built]
            if any(tensors):
                inputs |= visuals.collate(tensors)
        parameters = inspect.signature(self.model.forward).parameters
        if "pixel_values" in inputs and "pixel_values" not in parameters:
            # The older name of Video-LLaVA's images.
            inputs["pixel_values_images"] = inputs.pop("pixel_values")
        dtype = self.model.dtype
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def _row(self, row: Row) -> tuple[list[int], list[tuple[str, Inputs]]]:
        # One generator per row, not per batch: a row must be the same whichever batch it stands in.
        generator = torch.Generator().manual_seed(1000 * self.seed + row.name)

        def text(n: int) -> list[int]:
            return torch.randint(3, 290, (n,), generator=generator).tolist()

        ids = [BOS, *text(row.lead)]
        shown: list[int] = []
        tensors: list[tuple[str, Inputs]] = []
        for modality, size in row.visuals:
            name = modality or self.family.modality
            visuals = self.architecture.visuals[name]
            alone = sum((other or self.family.modality) == name for other, _ in row.visuals) == 1
            layout = visuals.layout(self.model, size, alone, text)
            shown += layout if self.architecture.images_first else layout + text(3)
            tensors.append((name, visuals.tensors(size, generator)))
        ids = shown + ids if self.architecture.images_first else ids + shown
        return ids + text(row.tail), tensors


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyCase:
    """Build the tiny model of a family.

    Parameters
    ----------
    name : str
        A name of `FAMILIES`.
    seed : int
        Seed of weights, texts and pixels. The global random state is left alone.
    dtype : torch.dtype
        Of the weights and the pixels; the same numbers, rounded.

    Returns
    -------
    TinyCase
        Model in evaluation mode, and its batches.
    """
    line = family(name)
    architecture = ARCHITECTURES[line.architecture]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = getattr(transformers, architecture.model_class)(architecture.config())
        with torch.no_grad():
            architecture.prepare(model)
    model.eval().to(dtype)
    # Random models sample the end token like any other; sequences of known length are easier to compare.
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = None
    return TinyCase(line, model, seed)
