"""Signals: what a method wants to know about the tokens, computed from observations.

A signal is a frozen dataclass. It names the observation that it reads, holds the parameters of its computation,
computes itself and knows the shape of its result, so that a package can define one without touching `vtc`:

    @dataclass(frozen=True)
    class KeyNorm(VisionSignal):
        name = "key_norm"
        reads = VisionAttention

        def compute(self, raw):
            return raw.keys.float().norm(dim=-1).mean(dim=1)  # (B, Hkv, M, d) -> (B, M)

A method lists signals in `requires` and reads them as ``ctx[KeyNorm]``. Equal signals of several stages are computed
once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .. import kernels
from ..errors import ConfigError, InputError
from .observations import (
    DecoderAttention,
    DecoderHidden,
    DecoderProbe,
    Observation,
    PromptText,
    TokenGrids,
    VisionAttention,
    VisionHidden,
)
from .regions import Region

__all__ = [
    "SHARED",
    "ClsAttention",
    "HiddenStates",
    "MeanKeys",
    "Origin",
    "PreProjector",
    "ProbeSignal",
    "ReceivedAttention",
    "RegionCells",
    "Signal",
    "TextAttention",
    "TextEmbeds",
    "VisionKeys",
    "VisionSignal",
    "named_signal",
    "resolve_layers",
]


@dataclass(frozen=True)
class Signal(ABC):
    """One quantity that methods choose by.

    Subclasses are frozen dataclasses; their fields are the parameters of the computation, each with a default.

    Class attributes
    ----------------
    name
        Short name: the keyword of `vtc.select`, and what messages say.
    reads
        The observation that `compute` is given.
    axes
        Names of the axes of what methods see; "N" are the tokens, and a number is the size itself.
    per_token
        False if there is one value for the whole image or video instead of one per token.
    needs_cls
        Whether the vision tower must have a [CLS] token.
    per_patch
        Whether `present` is given the values of the p patches of every token side by side, (N, p, ...), instead of
        their mean; that can only be read inside the tower.
    reads_regions
        Whether it reads what the user marked in the pictures, of `TokenGrids`.
    """

    name: ClassVar[str]
    reads: ClassVar[type[Observation]]
    axes: ClassVar[tuple[str, ...]] = ("N",)
    per_token: ClassVar[bool] = True
    needs_cls: ClassVar[bool] = False
    per_patch: ClassVar[bool] = False
    reads_regions: ClassVar[bool] = False

    @abstractmethod
    def compute(self, raw: Any) -> Tensor:
        """Compute the signal from one observation.

        Parameters
        ----------
        raw
            An instance of `reads`.

        Returns
        -------
        Tensor
            (B, M, ...) values of the patches, prefix tokens included, from a `VisionAttention` or `VisionHidden`;
            (B, M, ...) values of the patches, without prefix tokens, from `PatchPixels`; (B, T, ...) values of the
            current tokens from `DecoderAttention` or `DecoderHidden`, or (B, ...) if not `per_token`; (N, ...) from
            `TokenGrids`, and any shape from `PromptText`.
        """

    def present(self, values: Tensor) -> Tensor:
        """Bring the values of N tokens (N, ...) into the form that methods see, `axes`; by default they have it."""
        return values

    def check(self, value: Tensor, n: int) -> None:
        """Raise InputError unless `value` has the form of `axes` with N = `n`."""
        where = tuple(axis for axis, name in enumerate(self.axes) if name == "N")
        sizes = {axis: int(name) for axis, name in enumerate(self.axes) if name.isdecimal()} | dict.fromkeys(where, n)
        if value.ndim != len(self.axes) or any(value.shape[axis] != size for axis, size in sizes.items()):
            found = f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")
            expected = f" with N={n} at {where}" if where else ""
            named = f" ({', '.join(self.axes)})"
            raise InputError(f"{self.name} must have {len(self.axes)} axes{expected}{named}, got {found}.")

    @classmethod
    def count(cls, value: Tensor) -> int | None:
        """Return N as the shape of `value` has it; None if no axis is N."""
        if "N" not in cls.axes:
            return None
        if value.ndim == 0:
            raise InputError(f"{cls.name}: a scalar has no axis of N tokens.")
        return int(value.shape[cls.axes.index("N") - len(cls.axes)]) if value.ndim >= len(cls.axes) else value.shape[-1]

    def vision_layers(self, depth: int, feature_layer: int) -> tuple[int, ...]:
        """Return the layers of the vision tower that are read (0-based); none, unless it is a `VisionSignal`."""
        return ()

    def wanted_of(self, modality: str) -> bool:
        """Tell whether it is computed for images, or for videos."""
        return True


@dataclass(frozen=True)
class VisionSignal(Signal):
    """A signal of one or several layers of the vision tower.

    Values of patches are carried to the tokens that the patches become, the way the family carries features: averaged
    where patches are pooled or merged.

    Parameters
    ----------
    layers
        Layers to read, counted like Python indices; None: the one layer whose output feeds the projector.
    modalities
        For which it is computed.
    """

    layers: tuple[int, ...] | None = None
    modalities: tuple[str, ...] = field(default=("image", "video"), kw_only=True)

    def vision_layers(self, depth: int, feature_layer: int) -> tuple[int, ...]:
        """`layers`, from the front.

        Raises
        ------
        ConfigError
            The tower has no such layer.
        """
        return (feature_layer,) if self.layers is None else resolve_layers(self.layers, depth, self.name)

    def present(self, values: Tensor) -> Tensor:
        """From (N, L, ...), the values of L layers, to those of the last of them (N, ...)."""
        return values[:, -1]

    def wanted_of(self, modality: str) -> bool:
        """Tell whether `modalities` names it."""
        return modality in self.modalities


def resolve_layers(layers: Sequence[int], depth: int, who: str) -> tuple[int, ...]:
    """Convert Python-style indices into `depth` layers to layer numbers from 0.

    Raises
    ------
    ConfigError
        One of them is out of range.
    """
    found = tuple(layer + depth if layer < 0 else layer for layer in layers)
    for layer, place in zip(layers, found, strict=True):
        if not 0 <= place < depth:
            raise ConfigError(f"{who}: layer {layer} was asked for, but the tower has layers 0 to {depth - 1}.")
    return found


# -- of the vision tower ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClsAttention(VisionSignal):
    """Attention probability that [CLS] gives to every token, (layers, heads, N)."""

    name: ClassVar[str] = "cls_attention"
    reads: ClassVar[type[Observation]] = VisionAttention
    axes: ClassVar[tuple[str, ...]] = ("layers", "heads", "N")
    needs_cls: ClassVar[bool] = True

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M, H): softmax rows of the first query."""
        raw = raw.biased()
        first, mask, bounds = raw.queries[:, :, :1], raw.mask, raw.cu_seqlens
        if bounds is not None:
            first, mask = raw.queries[0, :, bounds[:-1].long()].transpose(0, 1)[:, :, None], None
        elif mask is not None:
            mask = mask[:, :, :1]
        return kernels.attention_rows(first, raw.keys, raw.scaling, mask, cu_seqlens=bounds)[:, :, 0].movedim(-1, 1)

    def present(self, values: Tensor) -> Tensor:
        """(N, L, H) to (L, H, N)."""
        return values.permute(1, 2, 0)


@dataclass(frozen=True)
class ReceivedAttention(VisionSignal):
    """Attention probability that every token receives, averaged over the queries, (layers, heads, N)."""

    name: ClassVar[str] = "received_attention"
    reads: ClassVar[type[Observation]] = VisionAttention
    axes: ClassVar[tuple[str, ...]] = ("layers", "heads", "N")

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M, H)."""
        raw = raw.biased()
        received = kernels.attention_received(raw.queries, raw.keys, raw.scaling, raw.mask, cu_seqlens=raw.cu_seqlens)
        return received.movedim(-1, 1)

    def present(self, values: Tensor) -> Tensor:
        """(N, L, H) to (L, H, N)."""
        return values.permute(1, 2, 0)


@dataclass(frozen=True)
class VisionKeys(VisionSignal):
    """Keys of one layer with heads concatenated, (N, d)."""

    name: ClassVar[str] = "keys"
    reads: ClassVar[type[Observation]] = VisionAttention
    axes: ClassVar[tuple[str, ...]] = ("N", "d")

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M, H * d)."""
        return raw.keys.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class MeanKeys(VisionSignal):
    """Keys of one layer of the vision tower, averaged over heads, (N, d)."""

    name: ClassVar[str] = "mean_keys"
    reads: ClassVar[type[Observation]] = VisionAttention
    axes: ClassVar[tuple[str, ...]] = ("N", "d")

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M, d)."""
        return raw.keys.float().mean(dim=1)


@dataclass(frozen=True)
class PreProjector(VisionSignal):
    """Output of one layer of the tower, before the projector, (N, D)."""

    name: ClassVar[str] = "pre_projector"
    reads: ClassVar[type[Observation]] = VisionHidden
    axes: ClassVar[tuple[str, ...]] = ("N", "D")

    def compute(self, raw: VisionHidden) -> Tensor:
        """(B, M, D)."""
        return raw.hidden


# -- of the prompt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin(Signal):
    """Where every token stood before any stage dropped some, (N, 6) long.

    Columns: view, t, row, column, and the rows and columns of the view.
    """

    name: ClassVar[str] = "origin"
    reads: ClassVar[type[Observation]] = TokenGrids
    axes: ClassVar[tuple[str, ...]] = ("N", "6")

    def compute(self, raw: TokenGrids) -> Tensor:
        """(N, 6)."""
        return raw.origin()


@dataclass(frozen=True)
class RegionCells(Signal):
    """Which tokens show the region that the user marked in the picture with `vtc.regions`, (N, 3).

    Columns: the share of the token's cell that is inside, and x and y of its upper left corner, from 0 to 1. Pictures
    that are cut into tiles, and videos, have no single grid that a region could be laid on.
    """

    name: ClassVar[str] = "region_cells"
    reads: ClassVar[type[Observation]] = TokenGrids
    axes: ClassVar[tuple[str, ...]] = ("N", "3")
    reads_regions: ClassVar[bool] = True

    def compute(self, raw: TokenGrids) -> Tensor:
        """(N, 3).

        Raises
        ------
        InputError
            No regions were given, the tokens are no single grid, or none of them shows any of the region.
        """
        if not raw.marked:
            raise InputError("which part of each picture is meant? Run the model inside vtc.regions([...])")
        if len(raw.grids) != 1 or raw.grids[0][0] != 1:
            raise InputError(f"regions are of pictures that are one grid of tokens; this one has the views {raw.grids}")
        grid = raw.grids[0][1:]
        whole = Region(grid[::-1], (0.0, 0.0, float(grid[1]), float(grid[0])))
        cells = (raw.region or whole).cells(grid, raw.fit if raw.region is not None else "stretch", raw.device)
        if not bool((cells[:, 0] > 0).any()):
            raise InputError(
                "a region lies in the margin of its picture that the model crops away, so no token shows it"
            )
        return cells


@dataclass(frozen=True)
class TextEmbeds(Signal):
    """Input embeddings of the text of the prompt, (T, D).

    Parameters
    ----------
    text
        "all": the whole prompt's; "after": what stands behind the first visual token, so that what stands before it
        counts as the system's.
    """

    name: ClassVar[str] = "text_embeds"
    reads: ClassVar[type[Observation]] = PromptText
    axes: ClassVar[tuple[str, ...]] = ("T", "D")
    per_token: ClassVar[bool] = False

    text: str = "all"

    def compute(self, raw: PromptText) -> Tensor:
        """(T, D)."""
        return raw.embeddings if self.text == "all" or raw.behind is None else raw.embeddings[raw.behind]


# -- of the language model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeSignal(Signal):
    """A signal of a pass over the prompt by the first decoder layers, made for its sake.

    Parameters
    ----------
    layer
        The decoder layer (0-based) whose attention is read; those before it run over the whole prompt.
    """

    reads: ClassVar[type[Observation]] = DecoderProbe

    layer: int = 1


@dataclass(frozen=True)
class TextAttention(Signal):
    """Attention probability that the last token of the prompt gives to every visual token, (heads, queries, N)."""

    name: ClassVar[str] = "text_attention"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("heads", "queries", "N")

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, H, 1): one query."""
        heads, current = raw.queries.shape[1:3]
        row = raw.last[:, None, None, None].expand(-1, heads, 1, raw.queries.shape[-1])
        width, past = raw.keys.shape[2], raw.key_length - current
        allowed = raw.visibility.rows(raw.last[:, None], width)
        attention = kernels.attention_rows(raw.queries.gather(2, row), raw.keys, raw.scaling, allowed)
        return attention[..., past : raw.key_length].permute(0, 3, 1, 2)

    def present(self, values: Tensor) -> Tensor:
        """(N, H, 1) to (H, 1, N)."""
        return values.permute(1, 2, 0)


@dataclass(frozen=True)
class HiddenStates(Signal):
    """Hidden states of the visual tokens on entering the decoder layer of the site, (N, D)."""

    name: ClassVar[str] = "hidden_states"
    reads: ClassVar[type[Observation]] = DecoderHidden
    axes: ClassVar[tuple[str, ...]] = ("N", "D")

    def compute(self, raw: DecoderHidden) -> Tensor:
        """(B, T, D)."""
        return raw.hidden


def named_signal(signals: Mapping[Signal, Tensor], signal: type[Signal] | Signal) -> Tensor:
    """Return the value of a signal, named by its type or, where there are several of the type, by itself.

    Raises
    ------
    InputError
        It was not supplied, or the type does not say which of several is meant.
    """
    if not isinstance(signal, type):
        found = [value for known, value in signals.items() if known == signal]
    else:
        found = [value for known, value in signals.items() if isinstance(known, signal)]
    if not found:
        raise InputError(f"This selection needs {signal.name}, which was not supplied; declare it in `requires`.")
    if len(found) > 1:
        raise InputError(f"There are {len(found)} signals {signal.name}; name one by its parameters.")
    return found[0]


SHARED: tuple[type[Signal], ...] = (
    ClsAttention,
    ReceivedAttention,
    VisionKeys,
    MeanKeys,
    PreProjector,
    Origin,
    TextEmbeds,
    TextAttention,
    HiddenStates,
)
"""The signals of this file; those that one method invented stand beside that method."""
