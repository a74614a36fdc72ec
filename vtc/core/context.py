"""What a selector is told: where the visual tokens stand, and what is known about those of one image or video."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError, InputError

__all__ = ["Grid", "Need", "Stage", "VisualContext", "VisualSegment", "grid_coords", "grid_origin"]

Grid = tuple[int, int, int]
"""One view as (t, rows, columns) of language-model tokens, in raster order."""

MODALITIES = ("image", "video")


class Need(str, enum.Enum):
    """Something a selector may ask for beyond the features; the value is the name of the `VisualContext` field."""

    CLS_ATTENTION = "cls_attention"
    RECEIVED_ATTENTION = "received_attention"
    ATTENTION = "attention"
    KEYS = "keys"
    PRE_PROJECTOR = "pre_projector"
    PIXELS = "pixels"
    TEXT_EMBEDS = "text_embeds"
    CLIP_RELEVANCE = "clip_relevance"
    TEXT_ATTENTION = "text_attention"
    HIDDEN_STATES = "hidden_states"
    CONTEXT_RELEVANCE = "context_relevance"
    ENTROPY = "entropy"
    MODALITY_ATTENTION = "modality_attention"
    ATTENTION_EXCHANGE = "attention_exchange"
    PAGERANK = "pagerank"
    ORIGIN = "origin"


@dataclass(frozen=True)
class Stage:
    """One place where tokens are removed.

    Attributes
    ----------
    layer
        None: before the language model. k: on entering decoder layer k (0-based), so that layers before k see
        everything. `Need.TEXT_ATTENTION` of a stage at layer k are attention rows of layer k - 1, the last one that
        ran.
    requires
        What the selector wants to be given at this stage. Values of the vision tower are there at every stage, for the
        tokens that are still alive.
    keep
        Fraction of the tokens entering this stage that is its budget; None: what the configuration says.
    images_only
        Those of `requires` that it wants of images and does without for videos.
    """

    layer: int | None = None
    requires: frozenset[Need] = frozenset()
    keep: float | None = None
    images_only: frozenset[Need] = frozenset()

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ConfigError(f"A stage keeps a fraction between 0 and 1 of what enters it, got {self.keep}.")
        if self.layer is not None and self.layer < 0:
            raise ConfigError(
                f"A stage's decoder layer is 0 or more (or None: before the language model), got {self.layer}."
            )


@dataclass(frozen=True, eq=False)
class VisualSegment:
    """One image or one video as the language model sees it.

    Attributes
    ----------
    row
        Batch row.
    index
        Order among the segments of that row.
    modality
        "image" or "video".
    span
        (n_tokens,) long: ascending positions in the row's sequence. Other tokens (timestamps) may stand between them.
    grids
        Views in token order, each (t, h, w) after any merging; together they cover the non-structural tokens.
    structural
        (n_tokens,) bool: newline and separator tokens inside the segment, which no selector scores.

    Raises
    ------
    InputError
        The parts contradict each other.
    """

    row: int
    index: int
    modality: str
    span: Tensor
    grids: tuple[Grid, ...]
    structural: Tensor

    def __post_init__(self) -> None:
        where = f"Visual segment {self.index} of row {self.row}"
        if self.modality not in MODALITIES:
            raise InputError(f"{where}: modality must be one of {MODALITIES}, got {self.modality!r}.")
        if self.span.ndim != 1 or self.span.dtype != torch.long:
            raise InputError(f"{where}: span must be (n_tokens,) long, got {_describe(self.span)}.")
        if self.structural.shape != self.span.shape or self.structural.dtype != torch.bool:
            raise InputError(
                f"{where}: structural must be {tuple(self.span.shape)} bool, got {_describe(self.structural)}."
            )
        scored = self.n_tokens - int(self.structural.sum())
        if scored != self.n_scored:
            raise InputError(
                f"{where}: grids {self.grids} hold {self.n_scored} tokens, but {scored} are non-structural."
            )

    @property
    def n_tokens(self) -> int:
        """All tokens of the segment, structural ones included."""
        return self.span.numel()

    @property
    def n_scored(self) -> int:
        """Tokens that selectors see: those of the grids."""
        return _count(self.grids)

    @property
    def grid_thw(self) -> Grid:
        """The grid if there is one view, else (1, 1, n_scored)."""
        return self.grids[0] if len(self.grids) == 1 else (1, 1, self.n_scored)


@dataclass(eq=False)
class VisualContext:
    """What a selector sees for one segment: its N scorable (non-structural) tokens.

    The optional fields are filled only for selectors that declare the `Need`. Shapes: N tokens, D width of the language
    model, T text tokens, M patches before merging.

    Attributes
    ----------
    features
        (N, D) as the language model will see them.
    budget
        How many tokens to keep.
    generator
        CPU generator, the only source of randomness a selector may use.
    grids
        Views in token order, each (t, h, w).
    modality
        "image" or "video".
    layer_idx
        Decoder layer of the stage; None before the language model.
    keep_ratio
        Fraction that `budget` was rounded from, for methods that round in their own way; None if a count was asked for.
    structural
        How many structural tokens of the segment stay beside the N, for methods that count them in their budget.
    companions
        How many other images and videos the prompt has; tiles that stand apart in the prompt count as images.
    entered
        N when the segment entered the language model, for schedules that refer to it; None: this very N.
    cls_attention
        (layers, heads, N): attention of the vision tower's [CLS] query, in the layers that the selector named.
    received_attention
        (layers, heads, N): attention that each token receives, averaged over queries.
    attention
        (N, N): attention of one tower layer, averaged over heads.
    keys
        (N, d): keys of one tower layer, heads concatenated.
    pre_projector, group
        (M, Dv) patch features before the projector, and (M,) long, the token that each patch became part of.
    pixels
        The pixels behind the tokens, as the processor made them.
    text_embeds
        (T, D): input embeddings of the text.
    text_attention
        (heads, queries, N): attention of text queries to the visual tokens in a decoder layer.
    clip_relevance
        (N,): similarity of each token to the text in the space of a contrastive model.
    hidden_states
        (N, D): hidden states of the visual tokens on entering decoder layer `layer_idx`.
    context_relevance
        (N,): attention that each token receives from the tokens that receive most, `kernels.context_relevance`.
    entropy
        (N,): share of each token in the pixel entropy of its crop, `kernels.patch_entropy` through a softmax.
    modality_attention
        (2, N): attention that each token receives from the text and from the visual tokens of its prompt, averaged over
        heads and over those tokens, in decoder layer `layer_idx` - 1. For selectors that ask so, the second row is the
        mean of a token's own logits for the visual tokens.
    attention_exchange
        (2,): which part of its attention the text gives to the visual tokens, and they to the text, over the whole
        prompt, in decoder layer `layer_idx` - 1.
    pagerank
        (N,): stationary importance of each token in decoder layer `layer_idx` - 1, `kernels.pagerank`.
    origin
        (N, 6) long: (view, t, row, column) of each token before any stage dropped some, and the rows and columns of its
        view, `grid_origin`.
    """

    features: Tensor
    budget: int
    generator: torch.Generator
    grids: tuple[Grid, ...]
    modality: str = "image"
    layer_idx: int | None = None
    keep_ratio: float | None = None
    structural: int = 0
    companions: int = 0
    entered: int | None = None
    cls_attention: Tensor | None = field(default=None, repr=False)
    received_attention: Tensor | None = field(default=None, repr=False)
    attention: Tensor | None = field(default=None, repr=False)
    keys: Tensor | None = field(default=None, repr=False)
    pre_projector: Tensor | None = field(default=None, repr=False)
    group: Tensor | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    text_embeds: Tensor | None = field(default=None, repr=False)
    text_attention: Tensor | None = field(default=None, repr=False)
    clip_relevance: Tensor | None = field(default=None, repr=False)
    hidden_states: Tensor | None = field(default=None, repr=False)
    context_relevance: Tensor | None = field(default=None, repr=False)
    entropy: Tensor | None = field(default=None, repr=False)
    modality_attention: Tensor | None = field(default=None, repr=False)
    attention_exchange: Tensor | None = field(default=None, repr=False)
    pagerank: Tensor | None = field(default=None, repr=False)
    origin: Tensor | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        """N, the number of scorable tokens."""
        return self.features.shape[0]

    def need(self, need: Need) -> Tensor:
        """The field that `need` names.

        Raises
        ------
        InputError
            It was not supplied.
        """
        value = getattr(self, need.value)
        if value is None:
            raise InputError(f"This selection needs {need.value}, which was not supplied; declare it in `requires`.")
        return value

    def coords(self) -> Tensor:
        """(N, 4) long: (view, t, row, column) of every token, on the features' device."""
        return grid_coords(self.grids, self.features.device)

    def check(self) -> VisualContext:
        """Check shapes against N and that every number is finite; returns the context itself.

        Raises
        ------
        InputError
            Naming the field and what is wrong with it.
        """
        n = self.n
        if n == 0:
            raise InputError("features are empty: there are no visual tokens to select from.")
        if _count(self.grids) != n:
            raise InputError(f"grids {self.grids} hold {_count(self.grids)} tokens, but features have {n} rows.")
        for name, (ndim, axes) in _TOKEN_AXES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.ndim != ndim or any(value.shape[axis] != n for axis in axes):
                raise InputError(f"{name} must have {ndim} axes with N={n} at {axes}, got {_describe(value)}.")
        if self.pre_projector is not None and (self.group is None or self.group.shape != self.pre_projector.shape[:1]):
            raise InputError(
                f"pre_projector {_describe(self.pre_projector)} needs group (M,), got {_describe(self.group)}."
            )
        self._check_finite()
        return self

    def _check_finite(self) -> None:
        names = ["features", *(need.value for need in Need)]
        present = {name: value for name in names if (value := getattr(self, name)) is not None and value.numel()}
        # A tensor is finite exactly if its extremes are (NaN wins both), and finding them allocates nothing.
        device = self.features.device
        extremes = [torch.stack(value.aminmax()).to(device, torch.float32) for value in present.values()]
        if not extremes:
            return
        finite = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()  # one transfer: a GPU is waited for once
        bad = [name for name, good in zip(present, finite, strict=True) if not good]
        if bad:
            raise InputError(
                f"{', '.join(bad)}: NaN or infinite values. Check the image, and the precision of the vision tower."
            )


# Field -> (number of axes, axes that must be N long).
_TOKEN_AXES: dict[str, tuple[int, tuple[int, ...]]] = {
    "features": (2, (0,)),
    "cls_attention": (3, (2,)),
    "received_attention": (3, (2,)),
    "attention": (2, (0, 1)),
    "keys": (2, (0,)),
    "text_attention": (3, (2,)),
    "clip_relevance": (1, (0,)),
    "hidden_states": (2, (0,)),
    "context_relevance": (1, (0,)),
    "entropy": (1, (0,)),
    "modality_attention": (2, (1,)),
    "pagerank": (1, (0,)),
    "origin": (2, (0,)),
}


def grid_coords(grids: tuple[Grid, ...], device: torch.device | str | None = None) -> Tensor:
    """(N, 4) long: (view, t, row, column) of every token of these views, in their order."""
    parts = []
    for view, (t, h, w) in enumerate(grids):
        thw = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (t, h, w)))
        parts.append(torch.cat([thw.new_full((thw.shape[0], 1), view), thw], dim=1))
    return torch.cat(parts)


def _count(grids: tuple[Grid, ...]) -> int:
    return sum(math.prod(grid) for grid in grids)


def _describe(value: Tensor | None) -> str:
    return "None" if value is None else f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")


def grid_origin(grids: tuple[Grid, ...], device: torch.device | str | None = None) -> Tensor:
    """(N, 6) long: `grid_coords`, and the rows and columns of the token's view."""
    coords = grid_coords(grids, device)
    sizes = torch.tensor([(h, w) for _, h, w in grids], device=coords.device)
    return torch.cat([coords, sizes[coords[:, 0]]], dim=1)
