"""VFlowOpt: context relevance and pixel entropy decide, before the language model and twice inside it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.observations import Observation, PatchPixels, VisionAttention
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Signal, VisionSignal
from ..core.sites import BeforeDecoder, DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import average_kept, check_fraction, check_layer, check_number, stretches

__all__ = ["PRESETS", "VFlowOptSelector"]


# The released 50 % setting keeps 0.50077 on average.
_BUDGET_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Preset:
    """Result of the authors' calibration for one budget, on LLaVA-OneVision-7B; `alpha` was 0 throughout."""

    t: float
    cell: float
    r1: float
    r2: float
    r3: float


PRESETS: dict[float, Preset] = {
    0.5: Preset(28.683047941520474, 11.756787150848968, 0.7233201448753168, 0.748747637472693, 0.487),
    0.25: Preset(34.759552803070484, 15.580797034937687, 0.2651026358526424, 0.9833433139039235, 0.8773258179532721),
    0.1: Preset(39.26492840997221, 17.386981849158786, 0.11661529508161146, 1.0, 0.6011),
}
"""Average fraction of tokens kept to the released settings for it."""


@dataclass(frozen=True)
class ContextRelevance(VisionSignal):
    """Attention that every token receives from the context set, the tokens that receive most, (N,).

    Parameters
    ----------
    t, reduction
        As in `kernels.context_relevance`.
    """

    name: ClassVar[str] = "context_relevance"
    reads: ClassVar[type[Observation]] = VisionAttention

    t: float = 1.0
    reduction: str = "sum"

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M)."""
        parts = [
            kernels.context_relevance(
                one.queries,
                one.keys,
                one.scaling,
                one.mask,
                t=self.t,
                reduction=self.reduction,
                prefix=one.prefix,
            )
            for one in raw.biased().sequences()
        ]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class PixelEntropy(Signal):
    """Share of every token in the pixel entropy of its crop, (N,): `kernels.patch_entropy` through a softmax.

    Parameters
    ----------
    mean, std
        How the processor normalised pixels, one number or one per channel.
    """

    name: ClassVar[str] = "entropy"
    reads: ClassVar[type[Observation]] = PatchPixels

    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def compute(self, raw: PatchPixels) -> Tensor:
        """(B, M): B crops, or all crops as one where they enter the tower as one sequence."""
        first = raw.crops[0]
        mean, std = (
            torch.as_tensor(value, dtype=torch.float32, device=first.device).expand(first.shape[-3 if raw.size else -2])
            for value in (self.mean, self.std)
        )
        shares = [kernels.patch_entropy(crop, mean, std, size=raw.size).softmax(dim=0) for crop in raw.crops]
        return torch.cat(shares)[None] if raw.packed else torch.stack(shares)


@register_selector
@dataclass(frozen=True)
class VFlowOptSelector(Selector):
    """Rank tokens once, by the vision tower and the pixels, and keep the best at three stages.

    The importance of a token is the attention that it receives from the context set, the tokens that receive more than
    `t` times the average attention, plus `alpha` times its share of the pixel entropy of its crop. Before the language
    model the lowest tokens of every grid cell of an image are merged into the best of them, weighted by importance,
    which then stays; video frames are ranked together and not merged. On entering the decoder layers `layers` the same
    map drops more. `keep_ratio` is the average over the decoder's layers.

    Parameters
    ----------
    t, cell, r1, r2, r3
        Threshold of the context set, edge of a cell in tokens (any real number), and what the three stages keep of what
        enters them. None: the released setting of the nearest budget in `PRESETS`, with r1 scaled to the budget asked
        for and r3 as what it leaves (and r2, where it leaves more than everything).
    alpha
        Weight of the entropy; the released settings do without.
    layers
        The two decoder layers (0-based); None: a third and two thirds into the decoder, 9 and 18 of 28.
    vision_layer
        Tower layer whose attention counts; None: the one that makes the features.
    recycle
        Whether images are merged by cells; None: as released, if there is no other image or video in the prompt.
    variant
        "paper": relevance is the sum over the context set, every stage keeps exactly its share of the patches (cells
        included), and r3 follows from the budget and the decoder at hand. "released": the mean over the set; a stage
        drops ``round(n * (1 - r))`` tokens, newlines counted in n (but for one of several images), and merging drops
        another ``int(n / cell ** 2)`` before it returns one token per cell, so that counts come out a little different;
        the constants as they are.
    mean, std
        How pixels were normalised, one number or one per channel; the default is SigLIP's. Only read if alpha is not 0.

    Raises
    ------
    ConfigError
        An option is invalid, or no r3 meets the budget.

    References
    ----------
    "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", arXiv 2508.05211.
    """

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "VFlowOpt, arXiv 2508.05211"
    cost: ClassVar[str] = "N^2 d"
    requires: ClassVar[tuple[Signal, ...]] = (ContextRelevance(),)
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False

    t: float | None = None
    cell: float | None = None
    r1: float | None = None
    r2: float | None = None
    r3: float | None = None
    alpha: float = 0.0
    layers: tuple[int, int] | None = None
    vision_layer: int | None = None
    recycle: bool | None = None
    variant: str = "paper"
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return the authors' bounds, those of r1 and r2 in proportion to the budget; r3 follows."""
        return {
            "t": Float(0.0, 50.0),
            "cell": Float(3.0, 24.0),
            "alpha": Float(-1.0, 1.0),
            "r1": Float(keep_ratio, min(1.0, 1.5 * keep_ratio)),
            "r2": Float(0.2 / 0.375, 1.0),
        }

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ConfigError(f'vflowopt: variant must be "paper" or "released", got {self.variant!r}.')
        if self.recycle is not None and not isinstance(self.recycle, bool):
            raise ConfigError(f"vflowopt: recycle must be True, False or None, got {self.recycle!r}.")
        check_number("vflowopt", "alpha", self.alpha)
        if self.t is not None:
            check_number("vflowopt", "t", self.t, 0)
        if self.cell is not None:
            check_number("vflowopt", "cell", self.cell, 1)
        for option in ("r1", "r2", "r3"):
            if getattr(self, option) is not None:
                check_fraction("vflowopt", option, getattr(self, option))
        for option in ("mean", "std"):
            value = getattr(self, option)
            value = tuple(value) if isinstance(value, (list, tuple)) else value
            object.__setattr__(self, option, value)
            for part in value if isinstance(value, tuple) else (value,):
                check_number("vflowopt", option, part)
        if self.vision_layer is not None:
            check_layer("vflowopt", "vision_layer", self.vision_layer)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            if len(self.layers) != 2 or not self.layers[0] < self.layers[1]:
                raise ConfigError(f"vflowopt: layers must be two ascending decoder layers, got {self.layers}.")
            for layer in self.layers:
                check_layer("vflowopt", "layers", layer, least=1)

    # -- where and how many -------------------------------------------------------------------------------------------

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> VFlowOptSelector:
        """Set `t` and `cell`, and on a model also `layers` and the r's."""
        _, preset = _nearest(keep_ratio)
        settled: dict[str, Any] = {"t": preset.t if self.t is None else self.t}
        settled["cell"] = preset.cell if self.cell is None else self.cell
        if shape is not None:
            depth = shape.decoder_layers
            layers = self.layers or (max(1, depth // 3), max(2, depth // 3 * 2))
            if layers[1] >= depth:
                raise ConfigError(f"vflowopt: layers={layers}, but the decoder has layers 0 to {depth - 1}.")
            settled["layers"] = layers
            settled["r1"], settled["r2"], settled["r3"] = self._ratios(keep_ratio, stretches(layers, depth))
        return dataclasses.replace(self, **settled)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Work before the language model and on entering `layers`; all stages read the same map."""
        requires = self._signals(shape)
        if shape is None:
            return (Stage(requires=requires, action=Action.MERGE),)
        settled = None not in (self.layers, self.r1, self.r2, self.r3)
        it = self if settled else self.resolve(shape, keep_ratio)
        kept = zip(it.layers or (), (it.r2, it.r3), strict=True)
        inside = (Stage(DecoderLayer(layer), requires, keep=ratio) for layer, ratio in kept if ratio != 1)
        return Stage(requires=requires, keep=it.r1, action=Action.MERGE), *inside

    def _ratios(self, keep_ratio: float | None, lengths: list[int]) -> tuple[float, float, float]:
        """Compute r1, r2, r3 whose average over the layers is `keep_ratio`."""
        given = (self.r1, self.r2, self.r3)
        if keep_ratio is None:
            raise ConfigError(
                "vflowopt shares its budget among decoder layers, so it needs keep_ratio, not keep_tokens."
            )
        if self.variant == "released" and given == (None, None, None) and keep_ratio in PRESETS:
            preset = PRESETS[keep_ratio]
            return preset.r1, preset.r2, preset.r3
        before, between, behind = lengths
        total = keep_ratio * sum(lengths)  # in layers that see everything
        budget, near = _nearest(keep_ratio)
        r1 = min(1.0, near.r1 * keep_ratio / budget) if self.r1 is None else self.r1
        r2 = near.r2 if self.r2 is None else self.r2
        r3 = self.r3
        if r3 is None:
            r3 = (total / r1 - before - between * r2) / (behind * r2) if r1 and r2 else math.inf
            if r3 > 1 and self.r2 is None and r1:  # the second stage would drop more than the third can make up for
                r2, r3 = (total / r1 - before) / (between + behind), 1.0
        average = average_kept((r1, r2, r3), lengths)
        if not (0 < r3 < 1 + 1e-9 and 0 < r2 < 1 + 1e-9) or abs(average - keep_ratio) > _BUDGET_TOLERANCE:
            raise ConfigError(
                f"vflowopt: r1={r1:.4g}, r2={r2:.4g} and r3={r3:.4g} do not keep {keep_ratio:g} of the tokens on "
                f"average over {before} + {between} + {behind} layers; leave r3 open, and choose r1 and r2 so that it "
                "can be above 0 and at most 1."
            )
        return r1, min(r2, 1.0), min(r3, 1.0)

    # -- what is read -------------------------------------------------------------------------------------------------

    def _signals(self, shape: ModelShape | None) -> tuple[Signal, ...]:
        """Require the map, and the entropy of the pixels if it counts."""
        layer = self.vision_layer
        if shape is not None and shape.vision_layers is not None and layer is not None and layer >= shape.vision_layers:
            raise ConfigError(
                f"vflowopt: vision_layer={layer}, but the tower has layers 0 to {shape.vision_layers - 1}."
            )
        reduction = "mean" if self.variant == "released" else "sum"
        relevance = ContextRelevance(None if layer is None else (layer,), t=self._or_preset("t"), reduction=reduction)
        return (relevance, PixelEntropy(self.mean, self.std)) if self.alpha else (relevance,)

    def score(self, ctx: VisualContext) -> Tensor:
        """Compute (N,) importance of every token."""
        scores = ctx[ContextRelevance].float()
        return scores + self.alpha * ctx[PixelEntropy].float() if self.alpha else scores

    def _or_preset(self, option: str) -> float:
        """`t` or `cell`, of 25 % if it was left open and nobody called `resolve`."""
        value = getattr(self, option)
        return getattr(PRESETS[0.25], option) if value is None else value

    # -- what is kept -------------------------------------------------------------------------------------------------

    def select(self, ctx: VisualContext) -> Selection:
        """Keep the most important tokens; before the language model, one more for every cell of an image."""
        scores = self.score(ctx)
        budget = max(1, ctx.n - self._dropped(ctx))
        recycle = not ctx.other_visuals if self.recycle is None else self.recycle
        if isinstance(ctx.site, BeforeDecoder) and ctx.modality == "image" and recycle and budget < ctx.n:
            return self._recycle(ctx, scores, budget)
        return Selection.best(scores, budget)

    def _dropped(self, ctx: VisualContext) -> int:
        """Count the tokens that a stage drops, if it merges none."""
        if self.variant == "paper" or ctx.keep_ratio is None:
            return ctx.n - min(ctx.budget, ctx.n)
        return round(self._counted(ctx) * (1 - ctx.keep_ratio))

    def _counted(self, ctx: VisualContext) -> int:
        """Tokens that the released code counts; where several images come in one prompt it gives them no newlines."""
        several = isinstance(ctx.site, BeforeDecoder) and ctx.modality == "image" and ctx.other_visuals
        return ctx.n if several else ctx.n + ctx.structural

    def _recycle(self, ctx: VisualContext, scores: Tensor, budget: int) -> Selection:
        cell = self._cells(ctx)
        # Among equals the later token goes first.
        lowest = scores.sort(descending=True, stable=True).indices.flip(0)
        if self.variant == "released":
            count: int | None = ctx.n - budget + int(self._counted(ctx) / self._or_preset("cell") ** 2)
        else:
            count = _count_for(cell[lowest], budget)
            if count is None:  # fewer tokens than cells: nothing can be returned to them
                return Selection.from_indices(ctx.n, lowest.flip(0)[:budget])
        keep, assign, weight = kernels.recycle_cells(scores, lowest[:count], cell)
        return Selection(ctx.n, keep, assign, weight)

    def _cells(self, ctx: VisualContext) -> Tensor:
        """(N,) number of the cell of every token; the cells of different views are different."""
        edge = self._or_preset("cell")
        view, frame, row, column = ctx.coords().unbind(1)
        cells = torch.stack([view, frame, (row / edge).floor().long(), (column / edge).floor().long()], dim=1)
        return cells.unique(dim=0, return_inverse=True)[1]


def _count_for(cell: Tensor, budget: int) -> int | None:
    """Count the lowest tokens to recycle, whose `cell` comes in ascending order of importance.

    With every further one, one token less is left, unless it opens a new cell: so there is a count that leaves exactly
    `budget`, but for budgets of less than one token per cell: None.
    """
    n = cell.numel()
    first = torch.full((n,), n, device=cell.device).scatter_reduce_(
        0, cell, torch.arange(n, device=cell.device), reduce="amin"
    )
    opens = torch.zeros(n, dtype=torch.long, device=cell.device)
    opens[first[first < n]] = 1
    left = n - torch.arange(1, n + 1, device=cell.device) + opens.cumsum(0)
    reached = (left <= budget).nonzero()
    return int(reached[0, 0]) + 1 if len(reached) else None


def _nearest(keep_ratio: float | None) -> tuple[float, Preset]:
    """The released budget that is nearest in proportion, with its setting; 25 % if there is none to compare with."""
    budget = 0.25 if keep_ratio is None else min(PRESETS, key=lambda known: abs(math.log(known / keep_ratio)))
    return budget, PRESETS[budget]
