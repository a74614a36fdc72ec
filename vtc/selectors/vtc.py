"""The library's own method: a subset of large volume in features and places, the rest merged into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.grids import Grid
from ..core.observations import Observation, TokenGrids
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.signals import ClsAttention, Signal, TextEmbeds
from ..core.sites import BeforeDecoder, DecoderLayer, Pixels, Site, VisionLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_fraction, check_number
from .text_relevance import TextRelevance, quality_of

__all__ = ["Place", "VtcSelector"]

_LAYERS = 8  # of the vision tower, whose [CLS] attention is summed
_RIDGE = 1e-4
_WIDTHS = {"image": 0.5, "video": 0.25}
_SPARSE = 1 / 8  # share of a video up to which the width is that of the table


@dataclass(frozen=True)
class Place(Signal):
    """Where every token lies in its picture or video, (N, 3): time, row and column as fractions of the whole.

    Two views are two looks at the whole picture. Of more, the last is a thumbnail of the whole and the others are its
    tiles, in the squarest arrangement that their number allows, if need be wider than high: how they really lie depends
    on the size of the picture, which no model is told. A single row of tokens has no known shape: all lie at 0.
    """

    name: ClassVar[str] = "place"
    reads: ClassVar[type[Observation]] = TokenGrids
    axes: ClassVar[tuple[str, ...]] = ("N", "3")

    def compute(self, raw: TokenGrids) -> Tensor:
        """(N, 3)."""
        views = len(raw.grids)
        tiles = views - 1 if views > 2 else 0
        high = max((rows for rows in range(1, tiles + 1) if tiles % rows == 0 and rows * rows <= tiles), default=1)
        parts = []
        for view, grid in enumerate(raw.grids):
            part = self._within(grid, raw.device)
            if view < tiles:
                wide = tiles // high
                part[:, 1] = (part[:, 1] + view // wide) / high
                part[:, 2] = (part[:, 2] + view % wide) / wide
            parts.append(part)
        places = torch.cat(parts)
        return torch.zeros_like(places) if views == 1 and raw.grids[0][:2] == (1, 1) else places

    def _within(self, grid: Grid, device: torch.device | str | None) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(size, device=device) / size for size in grid))


@register_selector
@dataclass(frozen=True)
class VtcSelector(TextRelevance):
    """Keep tokens that differ in what they show and where, and merge the others into the kept ones they resemble.

    Three parts. **Choice**: greedy MAP inference of a determinantal point process with the kernel ``q_i S_ij q_j``,

        S_ij = cosine(x_i, x_j) * exp(-|p_i - p_j|^2 / (2 width^2)) + 1e-4 [i = j],

    x the features and p the places in the picture or video, each axis from 0 to 1. Negative cosines stay, since without
    them the kernel would be indefinite. A token is the less redundant the farther it lies from tokens that look like
    it. The width is 0.5 in pictures. In videos it depends on the share K / N that is kept,

        width = 0.25 / max(1, 8 K / N),

    since a few tokens should go to what differs, wherever it is, and many should also be spread over time and space: a
    narrow Gaussian makes tokens redundant in their vicinity only, so that what lasts is seen all the time. **Quality**:
    q_i is ``(rank_i / N) ** exponent``, where rank_i of the N tokens get at most the [CLS] attention of token i,
    averaged over heads and summed over the last eight layers of the tower up to the one that makes the features; 1 in
    videos and where the tower has no [CLS] token. With w the `relevance_weight` it is multiplied by ``1 - w + w r_i``,
    r_i being the relevance to the question as `cdpruner` has it, from 0 to 1 over the tokens; by default the text does
    not count. **Merging**: every other token is added to the kept one with the largest cosine; kept token a with n_a
    followers becomes

        (x_a + merge_weight * sum of the followers) / (1 + merge_weight * n_a).

    Merging works before the decoder. At other places (``at=``) the others are dropped; at the pixels and on entering
    the tower's first layer there is no [CLS] attention yet. Of a video that is read in windows, every window counts as
    a video.

    Parameters
    ----------
    width
        Of the Gaussian of places, whatever is kept; None: as above.
    exponent
        How much [CLS] attention counts; 0: not at all.
    merge_weight
        Weight of a merged token beside the kept one's 1; 0: the others are dropped.
    quality
        "cls" asks for [CLS] attention and refuses towers without it; "none" does without; None: as the model has it
        (in `vtc.select`: if `cls_attention` is given).
    relevance_weight
        w, from 0 to 1; above 0 only before the decoder and inside it, where the text is known.
    similarity, relevance
        As in `cdpruner`; without `relevance`, relevance is that to the text behind the first visual token.

    Raises
    ------
    ConfigError
        An option is invalid.

    References
    ----------
    This library; docs/measurements.md. The point process is that of CDPruner, arXiv 2506.10967, whose quality is
    relevance to the question.
    """

    name: ClassVar[str] = "vtc"
    paper: ClassVar[str] = "vtc, this library's own"
    cost: ClassVar[str] = "K N (d + K)"
    sites: ClassVar[tuple[type[Site], ...]] = (Pixels, VisionLayer, BeforeDecoder, DecoderLayer)
    instead: ClassVar[Mapping[type[Signal], str]] = {ClsAttention: 'quality="none"'}

    width: float | None = None
    exponent: float = 0.25
    merge_weight: float = 0.5
    quality: str | None = None
    relevance_weight: float = 0.0

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the width, of the exponent and of the weight."""
        return {
            "width": Float(0.1, 2.0, log=True),
            "exponent": Float(0.0, 1.0),
            "merge_weight": Float(0.0, 1.0),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("vtc", "relevance_weight", self.relevance_weight)
        if not self.relevance_weight and (self.relevance is not None or self.similarity != "direct"):
            raise ConfigError("vtc: relevance and similarity have no effect with relevance_weight=0.")
        if self.width is not None:
            check_number("vtc", "width", self.width, 1e-3)
        check_number("vtc", "exponent", self.exponent, 0, 10)
        check_number("vtc", "merge_weight", self.merge_weight, 0, 10)
        if self.quality not in ("cls", "none", None):
            raise ConfigError(f'vtc: quality must be "cls", "none" or None, got {self.quality!r}.')

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model."""
        action = Action.MERGE if self.merge_weight else Action.KEEP
        text = self.text_signals(TextEmbeds("after")) if self.relevance_weight else ()
        return (Stage(requires=(Place(), *self._quality(shape), *text), action=action),)

    def moved(self, stage: Stage, site: Site) -> Stage:
        """Drop at the other sites; inside the tower, a layer has to have run before [CLS] looks at anything."""
        if isinstance(site, BeforeDecoder):
            return stage
        before_layers = isinstance(site, Pixels) or site == VisionLayer(0)
        if before_layers and self.quality == "cls":
            raise ConfigError(
                f"vtc: quality='cls' reads the attention of [CLS], and no layer has run at {str(site)!r}."
            )
        requires = tuple(
            signal for signal in stage.requires if not (before_layers and isinstance(signal, ClsAttention))
        )
        return dataclasses.replace(stage, site=site, requires=requires, action=Action.KEEP)

    def _quality(self, shape: ModelShape | None) -> tuple[Signal, ...]:
        if self.quality == "none" or not self.exponent:
            return ()
        if self.quality is None and (shape is None or not shape.cls):
            return ()
        layers = None
        if shape is not None and shape.vision_layers is not None and shape.feature_layer is not None:
            layers = tuple(
                range(max(0, min(shape.vision_layers - _LAYERS, shape.feature_layer)), shape.feature_layer + 1)
            )
        return (ClsAttention(layers, modalities=("image",)),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose, and before the language model merge."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        return self.chosen(ctx, self._weights(ctx))

    def chosen(self, ctx: VisualContext, quality: Tensor | None) -> Selection:
        """Choose fewer than N tokens by a quality (N,) of each, None: all 1; before the language model merge."""
        places = ctx[Place].float() / self._width(ctx)
        keep = kernels.dpp_greedy(ctx.features, ctx.budget, quality, places, _RIDGE).sort().values
        if not self.merge_weight or not isinstance(ctx.site, BeforeDecoder):
            return Selection(ctx.n, keep)
        assign = kernels.nearest_slots(ctx.features, keep)
        followers = torch.zeros_like(keep).index_add_(0, assign, torch.ones_like(assign)) - 1
        weight = torch.full_like(assign, self.merge_weight, dtype=torch.float32).index_fill(0, keep, 1.0)
        return Selection(ctx.n, keep, assign, weight / (1 + self.merge_weight * followers)[assign])

    def _width(self, ctx: VisualContext) -> float:
        if self.width is not None:
            return self.width
        width = _WIDTHS[ctx.modality]
        return width if ctx.modality == "image" else width / max(1.0, ctx.budget / (_SPARSE * ctx.n))

    def _weights(self, ctx: VisualContext) -> Tensor | None:
        """(N,) quality of every token; None: all 1."""
        quality = self._saliency(ctx)
        if not self.relevance_weight:
            return quality
        relevance = 1 - self.relevance_weight + self.relevance_weight * quality_of(self.relevance_of(ctx))
        return relevance if quality is None else quality * relevance

    def _saliency(self, ctx: VisualContext) -> Tensor | None:
        known = any(isinstance(signal, ClsAttention) for signal in ctx.signals)
        if not known or self.quality == "none" or not self.exponent or ctx.modality != "image":
            return None
        attention = ctx[ClsAttention].float().mean(dim=1).sum(dim=0)
        rank = torch.searchsorted(attention.sort().values, attention, right=True)
        return (rank / ctx.n) ** self.exponent
