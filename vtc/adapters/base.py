"""The facts that an adapter states about one family of models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from vtc.core.grids import Grid
from vtc.core.observations import Picture
from vtc.core.signals import Signal
from vtc.errors import UnsupportedModelError


@dataclass
class Layout:
    """How the feature rows of one encoder call divide into images or videos.

    Attributes
    ----------
    lengths : list of int, or None
        Rows per image or video, in order. None where the call does not say: then each unbroken run of placeholders in
        the prompt is one segment, a whole number of `unit` rows long.
    grids : list of tuple of (t, h, w)
        Views per segment (or, without `lengths`, the one view of a unit), without structural rows.
    structural : BoolTensor (total,)
        Rows that are no patches: newlines, separators, a [CLS] kept among the patches.
    unit : int
        Rows of one tile or frame.
    """

    lengths: list[int] | None
    grids: list[tuple[Grid, ...]]
    structural: torch.Tensor
    unit: int = 1

    @classmethod
    def tiles(cls, count: int, side: tuple[int, int], device: torch.device) -> Layout:
        """Describe `count` equal tiles that runs of placeholders join into segments."""
        rows = side[0] * side[1]
        return cls(None, [((1, *side),)], torch.zeros(count * rows, dtype=torch.bool, device=device), rows)


@dataclass(frozen=True)
class TowerUnit:
    """What a selection inside a vision tower is made of: a crop, or an image or video in a packed sequence.

    Attributes
    ----------
    crop : int
        Its row in the batch of the tower.
    cells : LongTensor (N, p)
        Places, without prefix tokens, of the patches that become one token, which leave together; tokens in raster
        order.
    inputs : LongTensor (N, p)
        The same in the order in which patches enter the tower.
    grid : (t, h, w)
        Of the N tokens.
    """

    crop: int
    cells: torch.Tensor
    inputs: torch.Tensor
    grid: Grid


class Adapter(ABC):
    """All that `vtc` knows about a family: where its towers are and how patches become tokens.

    Subclasses are registered with `@register_adapter(model_type, ...)`. Everything else, the language model above all,
    is the same for all families and belongs to the engine.

    Parameters
    ----------
    model : PreTrainedModel
        The whole model; `model.base_model` holds tower and language model.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image",)
    #: The processor takes videos and the model encodes their frames as images.
    video_as_images: ClassVar[bool] = False
    #: Positions are (t, h, w) triples, which have no compact form.
    multi_axis_positions: ClassVar[bool] = False
    #: Why decoder stages are refused, if they are.
    decoder_stages_refused: ClassVar[str | None] = None
    #: Why the tower cannot be given smaller pictures, if it cannot.
    resampling_refused: ClassVar[str | None] = "its tower takes pictures of one size"
    #: The outer model builds 4-D masks with bidirectional image blocks.
    builds_masks: ClassVar[bool] = False
    #: What the views of an image show: the image itself; a thumbnail and one large unpadded grid; tiles in raster order
    #: and a thumbnail; or the same with every tile in a segment of its own.
    view_layout: ClassVar[Literal["single", "anyres", "tiles", "separate tiles"]] = "single"
    #: How lmms-eval runs the family: a name for the model, and below `lmms_eval.models` the paths of the class without
    #: and of the class with a chat template.
    lmms_eval: ClassVar[tuple[str, str | None, str | None] | None] = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Any = model.base_model
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        self.text_model: Any = getattr(decoder, "_orig_mod", decoder)  # replaced by torch.compile(decoder)
        self.config: Any = model.config

    # -- towers ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def tower(self, modality: str) -> nn.Module:
        """Return the vision tower that encodes `modality`."""

    def tower_width(self, modality: str) -> int | None:
        """Return the width of the hidden states of the tower; None where its configuration does not say."""
        return getattr(getattr(self.tower(modality), "config", None), "hidden_size", None)

    def tower_attentions(self, modality: str) -> list[nn.Module]:
        """Return the tower's attention modules, first layer first.

        Raises
        ------
        UnsupportedModelError
            The tower has none that can be recognised.
        """
        found = [
            module
            for module in self.tower(modality).modules()
            if type(module).__name__.endswith("Attention") and (hasattr(module, "q_proj") or hasattr(module, "qkv"))
        ]
        if not found:
            raise UnsupportedModelError(
                f"no attention layers found in {type(self.tower(modality)).__name__}; choose a method that needs no "
                "attention scores (vtc.list_methods(model) names them)"
            )
        return found

    def prefix_tokens(self, modality: str) -> int:
        """Count the leading tokens of the tower's sequence that are no patches ([CLS], registers)."""
        for module in self.tower(modality).modules():
            for name in ("class_embedding", "cls_token"):
                if isinstance(getattr(module, name, None), torch.Tensor):
                    registers = getattr(module, "register_tokens", None)
                    return 1 + (registers.shape[1] if isinstance(registers, torch.Tensor) else 0)
        return 0

    def feature_layer(self, modality: str, call: Mapping[str, Any]) -> int:
        """Return the 0-based tower layer whose output feeds the projector.

        That is `vision_feature_layer`, of the call or else of the configuration, or the last where neither has it.
        """
        depth, index = len(self.tower_attentions(modality)), call.get("vision_feature_layer")
        index = getattr(self.config, "vision_feature_layer", None) if index is None else index
        return depth - 1 if index is None else hidden_state_layer(index, depth)

    def tower_blocks(self, modality: str) -> list[nn.Module]:
        """Return the tower's layers, first layer first: the modules around its `tower_attentions`.

        Raises
        ------
        UnsupportedModelError
            The tower has none that can be recognised.
        """
        return layers_around(self.tower(modality), self.tower_attentions(modality))

    def why_not(self, signal: Signal, modality: str) -> str | None:
        """Say in one clause why `signal` cannot be supplied for `modality`; None if it can."""
        if signal.needs_cls and not self.prefix_tokens(modality):
            return f"{type(self.tower(modality)).__name__} has no [CLS] token"
        return None

    # -- one encoder call -----------------------------------------------------------------------------------------

    @abstractmethod
    def layout(self, modality: str, call: Mapping[str, Any], output: Any) -> Layout:
        """Divide the rows of `output.pooler_output` into images or videos.

        Parameters
        ----------
        modality : str
        call : mapping
            Arguments of the call of `get_image_features` or `get_video_features`.
        output : ModelOutput
            Its result.
        """

    @abstractmethod
    def patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        """Carry values of patches to the tokens that the patches become.

        Parameters
        ----------
        modality, call
            As in `layout`.
        patches : Tensor (crops, M, C)
            Values per patch in the order in which they leave the tower, without prefix tokens.

        Returns
        -------
        Tensor (total, C)
            Values per feature row, in the order of `layout`; averaged where patches are pooled, 0 on structural rows.
        """

    def input_patches_to_tokens(self, modality: str, call: Mapping[str, Any], patches: torch.Tensor) -> torch.Tensor:
        """Do as `patches_to_tokens`, for values in the order in which patches enter the tower."""
        return self.patches_to_tokens(modality, call, patches)

    def cell(self, modality: str, call: Mapping[str, Any]) -> int:
        """Count the patches along the edge of the square of patches that becomes one token."""
        return 1

    def tower_units(self, modality: str, call: Mapping[str, Any], crops: int, patches: int) -> list[TowerUnit]:
        """Divide what a tower sees, `crops` of so many `patches` each, into units of selection.

        Raises
        ------
        UnsupportedModelError
            The patches do not fall into cells.
        """
        edge, side = self.cell(modality, call), math.isqrt(patches)
        if edge == 1:
            table = torch.arange(patches)[:, None]
        elif side**2 == patches and side % edge == 0:
            table = torch.arange(patches).view(side // edge, edge, side // edge, edge).transpose(1, 2).flatten(2)
            table = table.flatten(0, 1)
        else:
            raise UnsupportedModelError(
                f"{patches} patches do not fall into cells of {edge} x {edge} that become one token, so that none can "
                "leave inside the tower; use at='decoder'"
            )
        grid: Grid = (1, side // edge, side // edge) if side**2 == patches else (1, 1, len(table))
        return [TowerUnit(crop, table, table, grid) for crop in range(crops)]

    def tower_outlets(self, modality: str) -> list[nn.Module]:
        """Return the modules behind which there is one row per cell; none where the tower itself returns patches."""
        return []

    def packed_lengths(self, modality: str, call: Mapping[str, Any]) -> list[int] | None:
        """Count the patches of every picture, where all pictures are one sequence that a mask divides; else None."""
        return None

    def pictures(self, modality: str, call: Mapping[str, Any], crops: Sequence[torch.Tensor]) -> list[Picture] | None:
        """Put the patches (M, C, P) of every crop together again, as `patch_pixels` gives them; None: it cannot."""
        return None

    def patch_pixels(
        self, modality: str, call: Mapping[str, Any], pixels: torch.Tensor
    ) -> tuple[list[torch.Tensor], tuple[int, int] | None]:
        """Say where the pixels of every patch are in the tower's input.

        Parameters
        ----------
        modality, call
            As in `layout`.
        pixels : Tensor (crops, C, H, W)

        Returns
        -------
        list of Tensor (C, H, W), and (int, int)
            The crops, and the size of their patches, which enter the tower in raster order; or
        list of Tensor (M, C, P), and None
            The patches of every crop, in the order in which they enter the tower.
        """
        config: Any = self.tower(modality).config
        size = config.patch_size
        return list(pixels), tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def token_grids(self, modality: str, call: Mapping[str, Any]) -> list[Grid]:
        """Return the grid of tokens of every image or video of the call, where the tower takes pictures of any size."""
        raise NotImplementedError

    def resampled(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[tuple[torch.Tensor, int, int]]
    ) -> dict[str, Any]:
        """Return the call's arguments with smaller pictures, where the tower takes pictures of any size.

        Parameters
        ----------
        modality, call
            As in `layout`.
        sizes : sequence of (LongTensor (t,), int, int)
            Of every image or video the steps of time that stay, and the rows and columns of tokens that it is to have.
        """
        raise NotImplementedError

    def tower_sequences(self, modality: str, call: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return for every tower layer the lengths of the sequences that attention is computed in.

        Only where the tower takes pictures of any size.
        """
        raise NotImplementedError

    def blocks(self, call: Mapping[str, Any]) -> torch.Tensor | None:
        """Number the tokens that see each other in both directions, where the family `builds_masks`.

        `call` holds the arguments of the base model's forward. In the result, (B, L), the tokens of a block share a
        number >= 0; all others have -1.
        """
        return None

    # -- prompt and language model --------------------------------------------------------------------------------

    def token_id(self, modality: str) -> int | None:
        """Return the placeholder id of `modality` in the prompt, None where the configuration has none."""
        return getattr(self.config, f"{modality}_token_id", None)

    def ids_of(self, embeds: torch.Tensor) -> torch.Tensor:
        """Read placeholder ids (B, T) back from embeddings, as transformers does; -1 elsewhere."""
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.full(embeds.shape[:2], -1, dtype=torch.long, device=embeds.device)
        for modality in self.modalities:
            token = self.token_id(modality)
            if token is not None:
                ids[(embeds == table(torch.tensor(token, device=embeds.device))).all(dim=-1)] = token
        return ids

    def placeholders(self, ids: torch.Tensor, modality: str) -> torch.Tensor:
        """Mark the placeholders of `modality` among the ids (S, P) of a prompt, as (S, P) bool."""
        token = self.token_id(modality)
        return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token

    def decoder_attention(self, layer: int) -> nn.Module:
        """Return the attention module of decoder layer `layer`."""
        return self.text_model.layers[layer].self_attn

    def norm_after_attention(self, layer: int) -> nn.Module:
        """Return the norm of decoder layer `layer` that is given the residual stream with the attention added."""
        return self.text_model.layers[layer].post_attention_layernorm

    def before_attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the attention module of decoder layer `layer` is given, of what enters the layer."""
        normed: torch.Tensor = self.text_model.layers[layer].input_layernorm(hidden)
        return normed

    # -- pictures -------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, modality: str) -> Literal["crop", "pad", "stretch"]:
        """Say how the family's processor brings an image or a frame to the shape of the tower's input."""
        return "stretch"

    @classmethod
    def tile_grid(cls, count: int, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) in which the processor cuts an image of (width, height) into `count` tiles.

        By default those closest to the image's own shape.
        """
        width, height = size
        return min(tile_grids(count), key=lambda grid: abs(grid[1] / grid[0] - width / height))


def layers_around(tower: nn.Module, attentions: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers that these attention modules of a tower belong to, one each.

    Raises
    ------
    UnsupportedModelError
        The tower has no list of such layers.
    """
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attentions):
            pairs = zip(module, attentions, strict=True)
            if all(any(part is attention for part in block.modules()) for block, attention in pairs):
                return list(module)
    raise UnsupportedModelError(f"no list of layers found in {type(tower).__name__}")


def tile_grids(count: int) -> Iterator[tuple[int, int]]:
    """Yield the (rows, columns) that make `count` tiles, few rows first."""
    return ((rows, count // rows) for rows in range(1, count + 1) if count % rows == 0)


def rows_of(output: Any) -> torch.Tensor:
    """Return the feature rows (total, D) of an encoder's output, whatever container the family uses."""
    pooled = output.pooler_output
    return pooled.flatten(0, -2) if isinstance(pooled, torch.Tensor) else torch.cat(parts_of(output))


def parts_of(output: Any) -> list[torch.Tensor]:
    """Return the images, tiles or videos of an encoder's output, (n, D) each; the container depends on the release."""
    return [part.flatten(0, -2) for part in output.pooler_output]


def hidden_state_layer(index: int | list[int], depth: int) -> int:
    """Return the 0-based layer that produced `hidden_states[index]` of a tower with `depth` layers."""
    last = index[-1] if isinstance(index, (list, tuple)) else index
    return (last + depth if last < 0 else last - 1) if last != 0 else 0
