"""Observations: the raw values of a running model that signals are computed from.

The list is closed: the engine supplies these, on every family, and nothing else. Letters: B crops or rows, H heads,
Hkv key heads, M patches of a crop (prefix tokens such as [CLS] in front), T current tokens of a decoder pass, P keys of
a decoder layer, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import InputError
from ..kernels.host import remembered
from .grids import Grid, grid_coords
from .regions import Region

__all__ = [
    "DecoderAttention",
    "DecoderCall",
    "DecoderHidden",
    "DecoderProbe",
    "DecoderUpdate",
    "EnteredAttention",
    "Observation",
    "PatchPixels",
    "Picture",
    "PromptText",
    "TokenGrids",
    "VisionAttention",
    "VisionHidden",
]


@dataclass(frozen=True, eq=False)
class Observation:
    """Base of all observations."""


# -- while images and videos are encoded -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VisionAttention(Observation):
    """One call of the attention of one layer of the vision tower, after normalisation and rotation.

    Attributes
    ----------
    queries, keys, values
        (B, H, M, d), (B, Hkv, M, d) and (B, Hkv, M, d).
    scaling
        Factor of the logits.
    mask
        (B, 1, M or 1, M) bool: which keys a query may attend to; None: all.
    cu_seqlens
        (S + 1,) int: borders of the sequences (images, windows) that are packed into one; None: a crop is a sequence.
    prefix
        How many leading tokens of a crop are no patches: [CLS], registers.
    bias
        (B, M): what the logits of every key are raised by, the logarithm of how many patches a merged token stands for;
        None: nothing. `biased` has it in queries and keys.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    prefix: int = 0
    bias: Tensor | None = None

    def biased(self) -> VisionAttention:
        """Return the same attention without `bias`, which becomes one more dimension of queries and keys."""
        if self.bias is None:
            return self
        ones = torch.ones_like(self.queries[..., :1])
        bias = (self.bias / self.scaling)[:, None, :, None].to(self.keys).expand_as(self.keys[..., :1])
        queries, keys = torch.cat([self.queries, ones], dim=-1), torch.cat([self.keys, bias], dim=-1)
        return replace(self, queries=queries, keys=keys, bias=None)

    def sequences(self) -> Iterator[VisionAttention]:
        """The packed sequences one by one, each as a call of its own."""
        if self.cu_seqlens is None:
            yield self
            return
        lengths = self.cu_seqlens.diff().tolist()
        parts = (x.split(lengths, dim=2) for x in (self.queries, self.keys, self.values))
        biases = [None] * len(lengths) if self.bias is None else self.bias.split(lengths, dim=1)
        for queries, keys, values, bias in zip(*parts, biases, strict=True):
            yield VisionAttention(queries, keys, values, self.scaling, prefix=self.prefix, bias=bias)


@dataclass(frozen=True, eq=False)
class VisionHidden(Observation):
    """What one layer of the vision tower returned: `hidden` (B, M, D)."""

    hidden: Tensor
    prefix: int = 0


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture or video whose patches enter the tower in another order than that of their places.

    Attributes
    ----------
    frames
        (t, C, H, W) pixels as the processor normalised them; of frames that share their patches the first.
    grid
        (rows, columns) of patches in a frame.
    order
        (M,) long: place of every patch, as it enters the tower, in raster order among the t * rows * columns.
    """

    frames: Tensor
    grid: tuple[int, int]
    order: Tensor


@dataclass(frozen=True, eq=False)
class PatchPixels(Observation):
    """The pixels that the vision tower was given, crop by crop, as the processor normalised them.

    Attributes
    ----------
    crops
        (C, H, W) each, with the patch size in `size`; or (M, C, P) each, patches of P pixels in the order in which they
        enter the tower, with `size` None.
    size
        (height, width) of a patch, or None.
    packed
        Whether the crops enter the tower as one sequence.
    pictures
        Where `size` is None: puts the patches of each picture or video together again, if that is known; see
        `Picture`.
    """

    crops: tuple[Tensor, ...]
    size: tuple[int, int] | None
    packed: bool
    pictures: Callable[[], Sequence[Picture] | None] | None = None


# -- once it is known which tokens of a prompt are visual ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenGrids(Observation):
    """Views (t, rows, columns) of one image or video, in token order, before any stage dropped tokens.

    `region` is the part of the picture that the user marked, the whole of it if None, where `marked` says that regions
    were given; `fit` is how the family brings a picture to its tower.
    """

    grids: tuple[Grid, ...]
    device: torch.device | str | None = None
    region: Region | None = None
    marked: bool = False
    fit: str = "stretch"

    def origin(self) -> Tensor:
        """(N, 6) long: (view, t, row, column) of every token, and the rows and columns of its view."""
        return remembered(_origin(self.grids).clone(), self.device)


@lru_cache(maxsize=32)
def _origin(grids: tuple[Grid, ...]) -> Tensor:
    """Return `TokenGrids.origin` on the host."""
    coords = grid_coords(grids)
    sizes = torch.tensor([(h, w) for _, h, w in grids])
    return torch.cat([coords, sizes[coords[:, 0]]], dim=1)


@dataclass(frozen=True, eq=False)
class PromptText(Observation):
    """The text tokens of the prompt that an image or video stands in, when it comes to the language model.

    Attributes
    ----------
    ids, embeddings
        (T,) and input embeddings (T, D).
    behind
        (T,) bool: those behind the first visual token of the prompt; the engine always says.
    visual
        (N, D) input embeddings of the tokens of the image or video that are left there; the engine always says.
    """

    ids: Tensor
    embeddings: Tensor
    behind: Tensor | None = None
    visual: Tensor | None = None


# -- while the language model runs -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DecoderAttention(Observation):
    """The attention of a decoder layer when a whole prompt is read: the one in front of a site; at the cache, each.

    Attributes
    ----------
    queries, keys, values
        (B, H, T, d), (B, Hkv, P', d) and (B, Hkv, P', d) with P' >= P: static
        caches are longer than the keys that exist.
    scaling
        Factor of the logits.
    visibility
        Which of the P keys each query may attend to.
    key_length
        P: keys that exist; the last T of them belong to the current tokens.
    valid
        (B, T) bool: current tokens that are no padding.
    text, visual
        (B, T) bool: tokens of the prompt that are text, and those that are visual.
    last
        (B,) long: place of the last token of the prompt among the current tokens.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    visibility: kernels.VisibilityMask
    key_length: int
    valid: Tensor
    text: Tensor
    visual: Tensor
    last: Tensor

    @property
    def past(self) -> int:
        """Keys of earlier turns, which stand before those of the current tokens."""
        return self.key_length - self.queries.shape[2]

    def rows(self, chosen: slice) -> DecoderAttention:
        """Return some rows of the batch."""
        blocks = self.visibility.blocks
        visibility = kernels.VisibilityMask(
            self.visibility.query_positions[chosen],
            self.visibility.key_positions[chosen],
            self.visibility.window,
            None if blocks is None else blocks[chosen],
        )
        parts = (self.valid, self.text, self.visual, self.last)
        queries, keys, values = (x[chosen] for x in (self.queries, self.keys, self.values))
        masks = (x[chosen] for x in parts)
        return DecoderAttention(queries, keys, values, self.scaling, visibility, self.key_length, *masks)

    def per_row(self, compute: Callable[[DecoderAttention], Tensor]) -> Tensor:
        """Compute values of the prompt's tokens row by row, so that a batch equals its rows.

        Parameters
        ----------
        compute
            Given one row without padding and without tokens outside the prompt, returns (n, ...).

        Returns
        -------
        Tensor (B, T, ...)
            0 for padding and other tokens.
        """
        prompt = self.valid & (self.text | self.visual)
        return _by_rows(prompt, lambda row, own: compute(self._row(row, own)))

    def each_row(self) -> Iterator[DecoderAttention]:
        """Yield the rows one by one, each without padding and without tokens outside the prompt."""
        for row, own in enumerate(self.valid & (self.text | self.visual)):
            yield self._row(row, own.nonzero()[:, 0])

    def _row(self, row: int, own: Tensor) -> DecoderAttention:
        """Return one row of the batch with the tokens `own` (n,) and the keys of earlier turns alone."""
        queries, keys, values = (x[row : row + 1] for x in (self.queries, self.keys, self.values))
        positions, blocks = self.visibility.key_positions[row], self.visibility.blocks
        keys, values = keys[:, :, : self.key_length], values[:, :, : self.key_length]
        known = torch.cat([(positions[: self.past] >= 0).nonzero()[:, 0], own + self.past])
        if len(known) < self.key_length:
            queries, keys, values = queries[:, :, own], keys[:, :, known], values[:, :, known]
        visibility = kernels.VisibilityMask(
            self.visibility.query_positions[row : row + 1, own],
            positions[None, known],
            self.visibility.window,
            None if blocks is None else blocks[row : row + 1, own],
        )
        valid, text, visual = (mask[row : row + 1, own] for mask in (self.valid, self.text, self.visual))
        last = torch.full_like(self.last[:1], len(own) - 1)
        return DecoderAttention(queries, keys, values, self.scaling, visibility, len(known), valid, text, visual, last)

    def text_and_visual(self, text: str) -> Tensor:
        """(B, 2, T) bool: the text that counts, and the visual tokens.

        Parameters
        ----------
        text
            "after": what stands behind the first visual token; "all": the whole prompt's.

        Raises
        ------
        InputError
            A row with visual tokens has no such text.
        """
        chosen = self.text & (self.visual.cumsum(dim=1) > 0) if text == "after" else self.text
        silent = (self.visual.any(dim=1) & ~chosen.any(dim=1)).nonzero()[:, 0]
        if len(silent):
            lacks = (
                'text behind its first image; put the question there, or give text="all"' if text == "after" else "text"
            )
            raise InputError(f"row {int(silent[0])} of the prompt has no {lacks}")
        return torch.stack([chosen, self.visual], dim=1)


@dataclass(frozen=True, eq=False)
class EnteredAttention(DecoderAttention):
    """The attention that the decoder layer of a site would compute if no token left on entering it.

    Keys, and the query of the last token of the prompt, are computed once more than the model does; values, and the
    queries of the others, may be zeros.
    """


@dataclass(frozen=True, eq=False)
class DecoderProbe(DecoderAttention):
    """The attention of a decoder layer in a pass that reads the prompt for this alone, before any token has left.

    The pass ends where the layer attends. Earlier turns of a conversation are not part of it.
    """


@dataclass(frozen=True, eq=False)
class DecoderHidden(Observation):
    """Hidden states of all current tokens on entering the decoder layer of a site: `hidden` (B, T, D)."""

    hidden: Tensor


@dataclass(frozen=True, eq=False)
class DecoderUpdate(Observation):
    """What the attention of a decoder layer does to the hidden states.

    Attributes
    ----------
    before, after
        (B, T, D): the residual stream on entering the layer, and with the output of its attention added.
    prompt
        (B, T) bool: tokens of the prompt.
    """

    before: Tensor
    after: Tensor
    prompt: Tensor


@dataclass(frozen=True, eq=False)
class DecoderCall(Observation):
    """One call of the attention module of a decoder layer, for code that was written against the module itself.

    Attributes
    ----------
    model, module
        The language model, and the module that was called.
    hidden
        (B, T, D) that it was given.
    keys, values
        (B, Hkv, T, d) of these tokens, as the cache has them.
    tables
        Cosines and sines (B, T, d) of their positions.
    rotary
        Computes such tables: ``rotary(x, position_ids)`` with positions (1, n) of text.
    attention
        (B, H, T, T) probabilities, where the implementation tells them.
    prompt
        (B, T) bool: tokens of the prompt.
    """

    model: Any
    module: Any
    hidden: Tensor
    keys: Tensor
    values: Tensor
    tables: tuple[Tensor, Tensor]
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    attention: Tensor | None
    prompt: Tensor

    def per_row(self, compute: Callable[[DecoderCall], Tensor]) -> Tensor:
        """Compute values of the prompt's tokens row by row, as `DecoderAttention.per_row` does."""
        return _by_rows(self.prompt, lambda row, own: compute(self._row(row, own)))

    def _row(self, row: int, own: Tensor) -> DecoderCall:
        keys, values = (x[row : row + 1, :, own] for x in (self.keys, self.values))
        cos, sin = (table[row : row + 1, own] for table in self.tables)
        attention = self.attention
        if attention is not None:
            attention = attention[row : row + 1][:, :, own][..., own]
        hidden, prompt = self.hidden[row : row + 1, own], self.prompt[row : row + 1, own]
        return replace(
            self, hidden=hidden, keys=keys, values=values, tables=(cos, sin), attention=attention, prompt=prompt
        )


def _by_rows(prompt: Tensor, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Put the values (n, ...) of each row's own tokens at their places in (B, T, ...), 0 elsewhere."""
    rows = [compute(row, own.nonzero()[:, 0]) for row, own in enumerate(prompt)]
    values = rows[0].new_zeros(*prompt.shape, *rows[0].shape[1:])
    values[prompt] = torch.cat(rows)
    return values
