"""Adaptive Sparse ViT: patches leave the vision tower where [CLS] gives them less than a threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .. import kernels
from ..core.context import VisualContext
from ..core.observations import Observation, VisionAttention
from ..core.ranges import Float, Range
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import Signal, VisionSignal
from ..core.sites import Site, VisionLayer
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError
from ..registry import register_selector
from .schedule import check_layer, check_number

__all__ = [
    "AdaptiveSparseVitSelector",
    "arithmetic_share",
    "masked_attention",
    "straight_through",
    "token_scores",
]

_RELEASED = (4, 7, 10)  # of 12 blocks: tokens leave before these
_THRESHOLDS = (0.2, 0.4, 0.6)  # 0.001, 0.002 and 0.003 at 196 tokens
_EPSILON = 1e-6


@dataclass(frozen=True)
class HeadWeightedAttention(VisionSignal):
    """Attention that [CLS] gives to every token, heads weighted by their importance for that token, (N,).

    A token of several patches gets the sum of theirs.
    """

    name: ClassVar[str] = "head_weighted_attention"
    reads: ClassVar[type[Observation]] = VisionAttention
    needs_cls: ClassVar[bool] = True
    per_patch: ClassVar[bool] = True

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M)."""
        raw = raw.biased()
        mask = None if raw.mask is None else raw.mask[:, :, :1]
        given = kernels.attention_rows(raw.queries[:, :, :1], raw.keys, raw.scaling, mask)[:, :, 0]
        return _weighted(given, raw)

    def present(self, values: Tensor) -> Tensor:
        """(N, p, L) to (N,): of the last layer."""
        return values[..., -1].float().sum(dim=1)


@dataclass(frozen=True)
class HeadWeightedReceived(HeadWeightedAttention):
    """The same of the attention that every token receives from all, relative to the mean of its sequence, (N,)."""

    name: ClassVar[str] = "head_weighted_received"
    needs_cls: ClassVar[bool] = False

    def compute(self, raw: VisionAttention) -> Tensor:
        """(B, M)."""
        parts = []
        for one in raw.biased().sequences():
            received = kernels.attention_received(one.queries, one.keys, one.scaling, one.mask)
            there = one.keys.shape[2] if one.mask is None else one.mask.any(dim=2)[:, 0].sum(dim=1, keepdim=True)
            parts.append(_weighted(received, one) * there)
        return torch.cat(parts, dim=1)

    def present(self, values: Tensor) -> Tensor:
        """(N, p, L) to (N,): of the last layer, averaged over patches."""
        return values[..., -1].float().mean(dim=1)


def _weighted(given: Tensor, raw: VisionAttention) -> Tensor:
    """(B, M): attention `given` (B, H, M), averaged over heads with the weight of what every token takes up in them."""
    queries = raw.queries.float()
    groups = queries.shape[1] // raw.keys.shape[1]
    keys, values = (x.float().repeat_interleave(groups, dim=1) for x in (raw.keys, raw.values))
    context = functional.scaled_dot_product_attention(queries, keys, values, raw.mask, scale=raw.scaling)
    return _by_importance(given, context)


def _by_importance(given: Tensor, context: Tensor) -> Tensor:
    importance = context.norm(dim=-1)
    return (importance / (importance.sum(dim=1, keepdim=True) + 1e-8) * given).sum(dim=1)


@register_selector
@dataclass(frozen=True)
class AdaptiveSparseVitSelector(Selector):
    """Keep the patches that [CLS] gives more attention than a threshold, before a few layers of the vision tower.

    In the layer before, with A the attention and O its output per head, the weight of head h for token j is
    ``|O[h, j]| / sum over heads of |O[h, j]|``, and the score of j is the sum over heads of this weight times A from
    [CLS] to j. Tokens above the threshold stay, which may be many or few: at least one.

    The budget is a ceiling for the last place: if more tokens are above their thresholds, the best stay. With
    ``keep_ratio=1`` everything stays; a `keep_tokens` of more than there are leaves the thresholds alone.

    Where this differs from the released code: every picture of a batch keeps its own number of tokens, where theirs
    takes the mean of the batch; at least one token stays, where theirs may keep none; thresholds are relative to the
    number of tokens, so that they serve pictures of any size (theirs are absolute, for 196 tokens); registers stay like
    [CLS]. Where several patches become one token, their scores add up. `multiplier`, the ceiling and other depths than
    12 layers are additions.

    Parameters
    ----------
    thresholds
        One for each of `layers`, or one for all, as multiples of 1 / N, about the mean score at N tokens that enter the
        tower; None: 0.2, 0.4 and 0.6. `vtc.tuning.tower.fit_multiplier` scales them to a cost, and
        `python -m eval.train_asvit` trains them.
    multiplier
        By which all thresholds are multiplied.
    layers
        Tower layers (0-based) before which tokens leave; None: 4, 7 and 10 of 12, in proportion for other depths.
    score_source
        "cls", the method; or "received", a stand-in for towers without a [CLS] token: the attention that a token
        receives, relative to the mean of the image, frame or window within which a layer attends. Never chosen
        silently.

    Raises
    ------
    ConfigError
        An option is invalid, or the tower has no such layers.

    References
    ----------
    "Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention", arXiv
    2209.13802, and github.com/Cydia2018/AS-ViT at ea7ccdbc.
    """

    name: ClassVar[str] = "adaptive-sparse-vit"
    paper: ClassVar[str] = "Adaptive Sparse ViT, arXiv 2209.13802"
    cost: ClassVar[str] = "N d"
    requires: ClassVar[tuple[Signal, ...]] = (HeadWeightedAttention(),)
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True
    instead: ClassVar[Mapping[type[Signal], str]] = {HeadWeightedAttention: 'score_source="received"'}

    thresholds: float | tuple[float, ...] | None = None
    multiplier: float = 1.0
    layers: tuple[int, ...] | None = None
    score_source: str = "cls"

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return the range of the multiplier: from nearly everything to nearly nothing."""
        return {"multiplier": Float(0.1, 4.0, log=True)}

    def __post_init__(self) -> None:
        for option in ("thresholds", "layers"):  # JSON has lists only
            if isinstance(getattr(self, option), list):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        if self.score_source not in _SOURCES:
            allowed = sorted(_SOURCES)
            raise ConfigError(f"adaptive-sparse-vit: score_source must be one of {allowed}, got {self.score_source!r}.")
        given = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        for value in given if self.thresholds is not None else ():
            check_number("adaptive-sparse-vit", "thresholds", value, 0)
        check_number("adaptive-sparse-vit", "multiplier", self.multiplier, 0)
        if self.layers is not None:
            if not isinstance(self.layers, tuple):
                raise ConfigError(f"adaptive-sparse-vit: layers must be tower layers, got {self.layers!r}.")
            for layer in self.layers:
                check_layer("adaptive-sparse-vit", "layers", layer, least=1)
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ConfigError(f"adaptive-sparse-vit: layers must be ascending tower layers, got {self.layers}.")

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> AdaptiveSparseVitSelector:
        """Set `layers` for this tower, and one threshold for each."""
        depth = 12 if shape is None or shape.vision_layers is None else shape.vision_layers
        last = depth - 1 if shape is None or shape.feature_layer is None else shape.feature_layer
        layers, thresholds = self.layers, self.thresholds
        if layers is None:
            # In a tower of few layers places fall together: the last of them, with its threshold, stands for all.
            scaled = {min(max(1, at * depth // 12), max(1, last)): place for place, at in enumerate(_RELEASED)}
            layers = tuple(sorted(scaled))
            if thresholds is None:
                thresholds = tuple(_THRESHOLDS[scaled[layer]] for layer in layers)
        if layers[-1] > last and shape is not None:
            raise ConfigError(f"adaptive-sparse-vit: layers={layers}, but the features come from tower layer {last}.")
        if thresholds is None:
            if len(layers) != len(_THRESHOLDS):
                raise ConfigError(f"adaptive-sparse-vit: give thresholds, one for each of the layers {layers}.")
            thresholds = _THRESHOLDS
        if not isinstance(thresholds, tuple):
            thresholds = (thresholds,) * len(layers)
        if len(thresholds) != len(layers):
            raise ConfigError(
                f"adaptive-sparse-vit: thresholds has {len(thresholds)} values for the {len(layers)} layers {layers}."
            )
        return dataclasses.replace(self, layers=layers, thresholds=thresholds)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Drop tokens before each of `layers`; without a model once, by the last threshold."""
        if shape is not None and keep_ratio == 1:
            return ()
        layers = self.resolve(shape, keep_ratio).layers or ()
        signal = _SOURCES[self.score_source]()
        return tuple(Stage(VisionLayer(layer), (signal,)) for layer in (layers[-1:] if shape is None else layers))

    def select(self, ctx: VisualContext) -> Selection:
        """Keep what is above the threshold of this place."""
        it = self if isinstance(self.thresholds, tuple) and self.layers else self.resolve(None, ctx.keep_ratio)
        layers, thresholds = it.layers or (), it.thresholds if isinstance(it.thresholds, tuple) else ()
        if not isinstance(ctx.site, VisionLayer) or ctx.site.layer not in layers:
            raise ConfigError(f"adaptive-sparse-vit: drops tokens before tower layers {layers}, asked at {ctx.site}.")
        place, before = layers.index(ctx.site.layer), ctx.tokens_at_input or ctx.n
        score = ctx[_SOURCES[self.score_source]].float()
        if self.score_source == "received":  # from multiples of the mean
            score = score / ctx.n
        count = max(1, int((score > thresholds[place] * self.multiplier / before).sum()))
        if place == len(layers) - 1:
            count = min(count, ctx.budget if ctx.keep_ratio is None else max(1, round(ctx.keep_ratio * before)))
        return Selection.best(score, count)


_SOURCES: dict[str, type[HeadWeightedAttention]] = {"cls": HeadWeightedAttention, "received": HeadWeightedReceived}


# --- training --------------------------------------------------------------------------------------------------------


def masked_attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Compute attention in which some keys are masked, differentiably in the mask; a token always sees itself.

    With l the logits and ``e[i, j] = exp(l[i, j] - max l[i])`` times the mask of j, 1 where i = j, it is
    ``(e + 1e-6 / N) / (sum of e + 1e-6)``.

    Parameters
    ----------
    query, key
        (B, H, N, d).
    scaling
        Factor of the logits.
    mask
        (B, N), 1 where a token stays; None: the plain softmax.

    Returns
    -------
    Tensor
        (B, H, N, N).
    """
    logits = query @ key.transpose(-2, -1) * scaling
    if mask is None:
        return logits.softmax(dim=-1)
    own = torch.eye(mask.shape[1], dtype=mask.dtype, device=mask.device)
    kept = mask[:, None, None, :] + (1 - mask[:, None, None, :]) * own
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * kept
    return (weights + _EPSILON / mask.shape[1]) / (weights.sum(dim=-1, keepdim=True) + _EPSILON)


def token_scores(attention: Tensor, values: Tensor, prefix: int = 1) -> Tensor:
    """Compute the scores (B, N - prefix) of patches from attention (B, H, N, N) and values (B, H, N, d)."""
    return _by_importance(attention[:, :, 0], attention @ values)[:, prefix:]


def straight_through(score: Tensor, theta: Tensor, tau: float = 1e-4) -> Tensor:
    """Return 1 where a score is above the threshold and 0 elsewhere, with the slope of ``sigmoid((s - theta) / tau)``.

    Parameters
    ----------
    score
        (..., N).
    theta
        Threshold, a scalar.
    tau
        Temperature: only tokens within a few of it move the threshold.
    """
    soft = ((score - theta) / tau).sigmoid()
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def arithmetic_share(tokens: Sequence[Tensor | float], width: int, full: float) -> Tensor:
    """Compute the arithmetic of a tower with fewer tokens as a share of that with all.

    A block with m tokens takes ``12 width ** 2 m + 2 width m ** 2`` multiply-adds, the MLP being four times as wide.

    Parameters
    ----------
    tokens
        Of every block, [CLS] included; numbers or (B,) tensors.
    width
    full
        Tokens of a block without pruning.

    Returns
    -------
    Tensor
        Of the shape of `tokens`.
    """
    macs = [block_macs(torch.as_tensor(m, dtype=torch.float32), width) for m in tokens]
    return torch.stack(torch.broadcast_tensors(*macs)).mean(dim=0) / block_macs(torch.tensor(float(full)), width)


def block_macs(tokens: Tensor, width: int) -> Tensor:
    """Multiply-adds of one block."""
    return 12 * width**2 * tokens + 2 * width * tokens**2
