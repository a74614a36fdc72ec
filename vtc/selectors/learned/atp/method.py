"""ATP-LLaVA: at a few decoder layers, every image keeps the tokens above its own thresholds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .... import kernels
from ....core.context import VisualContext
from ....core.observations import DecoderAttention, Observation
from ....core.ranges import Choice, Each, Float, Range
from ....core.selection import Selection
from ....core.selector import Selector
from ....core.signals import Origin, Signal
from ....core.sites import DecoderLayer, Site
from ....core.stage import ModelShape, Stage
from ....errors import ConfigError
from ....registry import register_selector
from ...schedule import at_depth, check_fraction, check_layer, check_number
from ..folder import Modules, load_module
from .module import AtpModules, relative

__all__ = [
    "AtpSelector",
    "ModalityAttention",
    "TextValues",
    "load_modules",
    "mean_logits",
    "redundancy_score",
    "soft_mask",
    "spatial_score",
]

_RELEASED = (4, 14, 24)  # of 32 layers: the modules stand behind these


@dataclass(frozen=True)
class ModalityAttention(Signal):
    """Attention that every token receives from the text and from the visual tokens of its prompt, (2, N).

    Averaged over heads and over the tokens that give it, in one decoder layer.

    Parameters
    ----------
    text
        "after": the text behind the first visual token counts; "all": the whole prompt's.
    self_score
        "received"; or "logits": the second row is the mean of a token's own logits for the visual tokens.
    """

    name: ClassVar[str] = "modality_attention"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("text, visual", "N")

    text: str = "after"
    self_score: str = "received"

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, 2)."""
        groups = raw.text_and_visual(self.text)
        received = kernels.received_from(
            raw.queries, raw.keys, raw.scaling, raw.visibility, groups, known=raw.key_length
        )
        if self.self_score == "logits":
            current = raw.keys[:, :, raw.key_length - raw.queries.shape[2] : raw.key_length]
            received[:, 1] = mean_logits(raw.queries, current, raw.scaling, groups[:, 1])
        return received.transpose(1, 2)

    def present(self, values: Tensor) -> Tensor:
        """(N, 2) to (2, N)."""
        return values.T


@dataclass(frozen=True)
class TextValues(Signal):
    """Mean value vector of the text in one decoder layer, all key heads side by side, (W,): what the question is.

    Parameters
    ----------
    text
        As of `ModalityAttention`.
    """

    name: ClassVar[str] = "text_values"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("W",)
    per_token: ClassVar[bool] = False

    text: str = "after"

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, W)."""
        group = raw.text_and_visual(self.text)[:, 0]
        values = raw.values[:, :, raw.past : raw.key_length].transpose(1, 2).flatten(2).float()
        counted = values.masked_fill(~group[..., None], 0)  # what stands in padding need not be finite
        return counted.sum(dim=1) / group.sum(dim=1, keepdim=True).clamp(min=1)


def mean_logits(query: Tensor, key: Tensor, scaling: float, group: Tensor) -> Tensor:
    """(B, Q): logits of queries (B, H, Q, d) for keys (B, Hkv, Q, d), averaged over heads and the `group` (B, Q)."""
    weights = group / group.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (weights[:, None, None] @ key.float())[:, :, 0].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query.float() @ mean[..., None])[..., 0].mean(dim=1) * scaling


@register_selector
@dataclass(frozen=True)
class AtpSelector(Selector):
    """Keep what is important or stands on a coarse grid, each above a threshold.

    A token stays if its redundancy score, the mean of the attention it receives from visual tokens and from the text,
    is above `theta_r`, or its spatial score, which tokens on a sub-grid of every `stride`-th row and column have, is
    above `theta_s`. How many that are depends on the image and on the layer. At least one stays.

    Thresholds are options (training-free), or come from trained modules, one per place, that read the scores. The
    budget is a ceiling for the first place: if more tokens are above their thresholds, those furthest above stay. With
    ``keep_ratio=1`` everything stays; a `keep_tokens` of more than there are leaves the thresholds alone.

    Modules are trained by ``vtc train atp``, with the model frozen. They say how many tokens of an image should be
    above the redundancy threshold, as a factor of a planned number whose mean over the samples they keep, and the
    threshold lies just below that many scores; `theta_s` is then not read, and no token stays for its place alone.

    Differences from the paper: there, two sigmoids give both thresholds, a soft mask in the attention has the
    gradients, and the modules read scores in the order of the image, and nothing else. Modules of that form, trained
    with a penalty on the mean count as well, did not keep more of full scenes than of plain ones here. Here the number
    of tokens that a question needs is measured, and the modules predict it, `AtpModule`; they read the value vectors of
    the text, too, because scores hardly tell what is asked. ``--option layout=raster`` of ``vtc train`` gives modules
    that read scores in the paper's order.

    The paper's sources are second hand and disagree in places. Here both scores are attention after the softmax, and
    received, which is what the text says of them; `scale` makes them comparable with a threshold between 0 and 1, which
    raw probabilities of about 1/N are not. `self_score` has the other reading.

    Parameters
    ----------
    layers
        Decoder layers (0-based) behind which tokens are dropped, by that layer's attention; None: 4, 14 and 24 of 32,
        in proportion for other depths.
    theta_r, theta_s
        Thresholds, one for all stages or one each.
    stride
        Of the sub-grid, over the grid that the image had before anything was dropped; one for all stages or one each.
    lambda_sample
        A token on the sub-grid has the spatial score ``1 - lambda_sample / stride ** 2``, others 0.
    scale
        "relative": a redundancy score s becomes ``s / (s + mean)``, so that a token of average attention has 1/2.
        "none": as it is.
    self_score
        "received": attention from visual tokens. "logits": as one of the sources, what a token gives to the visual
        tokens on average, before the softmax; with ``scale="none"``, and without modules, which read the former.
    modules
        Folder made by ``vtc train atp``; how many tokens stay then comes from it.
    factor
        With modules: keep so many times the planned number of every image, one for all places or one each, instead of
        what the modules choose. What they are compared with.
    text
        Which text counts. "after": all behind the first visual token of the prompt; "all": the whole prompt's.

    Raises
    ------
    ConfigError
        An option is invalid; the folder cannot be read, or its modules were made for another model.

    References
    ----------
    "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models", arXiv 2412.00447.
    """

    name: ClassVar[str] = "atp"
    paper: ClassVar[str] = "ATP-LLaVA, arXiv 2412.00447"
    cost: ClassVar[str] = "N^2 d"
    requires: ClassVar[tuple[Signal, ...]] = (ModalityAttention(), Origin())
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    theta_r: float | tuple[float, ...] = 0.5
    theta_s: float | tuple[float, ...] = 0.2
    stride: int | tuple[int, ...] = 2
    lambda_sample: float = 3.0
    scale: str = "relative"
    self_score: str = "received"
    modules: str | None = None
    factor: float | tuple[float, ...] | None = None
    text: str = "after"
    module: AtpModules | None = field(default=None, init=False, repr=False, compare=False)
    made_for: Modules | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def search_space(cls, depth: int, keep_ratio: float) -> dict[str, Range]:
        """Return ranges of the thresholds without modules: of redundancy one per stage, of the grid one for all."""
        return {
            "theta_r": Each(Float(0.3, 0.8), len(cls().resolve(ModelShape(depth), keep_ratio).layers or ())),
            "theta_s": Float(0.0, 1.0),
            "stride": Choice((2, 3, 4)),
            "lambda_sample": Float(0.5, 6.0),
        }

    def __post_init__(self) -> None:
        for option in ("layers", "theta_r", "theta_s", "stride", "factor"):  # JSON has lists only
            if isinstance(getattr(self, option), list):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        if self.scale not in ("relative", "none"):
            raise ConfigError(f'atp: scale must be "relative" or "none", got {self.scale!r}.')
        if self.text not in ("after", "all"):
            raise ConfigError(f'atp: text must be "after" or "all", got {self.text!r}.')
        if self.self_score not in ("received", "logits"):
            raise ConfigError(f'atp: self_score must be "received" or "logits", got {self.self_score!r}.')
        if self.self_score == "logits" and (self.scale != "none" or self.modules is not None):
            raise ConfigError(
                'atp: self_score="logits" has no mean to compare with: give scale="none", and no modules.'
            )
        for option in ("theta_r", "theta_s"):
            for value in _each(getattr(self, option)):
                check_fraction("atp", option, value)
        for value in _each(self.stride):
            check_layer("atp", "stride", value, least=1)
        check_number("atp", "lambda_sample", self.lambda_sample, 0)
        for value in () if self.factor is None else _each(self.factor):
            check_number("atp", "factor", value, 0)
        if self.factor is not None and self.modules is None:
            raise ConfigError("atp: factor multiplies what modules plan; give modules= as well.")
        for layer in self.layers or ():
            check_layer("atp", "layers", layer)
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ConfigError(f"atp: layers must be ascending decoder layers, got {self.layers}.")
        if self.modules is not None:
            if not isinstance(self.modules, str):
                raise ConfigError(f"atp: modules must be the path of a folder, got {self.modules!r}.")
            made_for, module = load_modules(self.modules)
            object.__setattr__(self, "made_for", made_for)
            object.__setattr__(self, "module", module)

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> AtpSelector:
        """Set `layers` for a decoder of this depth, and check the number of thresholds and what the modules fit."""
        if self.made_for is not None and shape is not None and shape.family is not None:
            self.made_for.check_fit(shape, str(self.modules))
        layers = self.layers
        if layers is None:
            depth = 32 if shape is None else shape.decoder_layers
            scaled = {at_depth(layer + 1, 32, depth) - 1 for layer in _RELEASED}
            layers = tuple(sorted({max(0, min(layer, depth - 2)) for layer in scaled}))
        for option in ("theta_r", "theta_s", "stride", "factor"):
            value = getattr(self, option)
            if isinstance(value, tuple) and len(value) != len(layers):
                raise ConfigError(f"atp: {option} has {len(value)} values for the {len(layers)} layers {layers}.")
        if self.module is not None and len(self.module.places) != len(layers):
            found = len(self.module.places)
            raise ConfigError(f"atp: {self.modules} holds {found} modules for the {len(layers)} layers {layers}.")
        return self if layers == self.layers else dataclasses.replace(self, layers=layers)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Drop tokens behind each of `layers`."""
        if shape is not None and keep_ratio == 1:
            return ()
        layers = self.resolve(shape, keep_ratio).layers or ()
        requires: tuple[Signal, ...] = (ModalityAttention(self.text, self.self_score), Origin())
        if self.module is not None:
            requires += (TextValues(self.text),)
        return tuple(
            Stage(DecoderLayer(layer + 1), requires, keep=1.0 if place else None) for place, layer in enumerate(layers)
        )

    def select(self, ctx: VisualContext) -> Selection:
        """Keep what is above a threshold."""
        place = self._place(ctx.site)
        s_cross, s_self = ctx[ModalityAttention].float()
        origin = ctx[Origin]
        redundancy = redundancy_score(s_self, s_cross, scale=self.scale)
        if self.module is not None:
            factor = None if self.factor is None else float(_at(self.factor, place))
            module = self.module.to(s_self.device)
            count = module.count(place, s_self, s_cross, origin, ctx[TextValues], factor)
            return Selection.best(redundancy, min(count, ctx.budget))
        spatial = spatial_score(origin, _at(self.stride, place), self.lambda_sample)
        above = torch.maximum(redundancy - _at(self.theta_r, place), spatial - _at(self.theta_s, place))
        count = min(max(1, int((above > 0).sum())), ctx.budget)
        return Selection.best(above, count)

    def _place(self, site: Site) -> int:
        """Return the index of the thresholds that belong to this site."""
        layers = self.layers or self.resolve(None, None).layers or ()
        if not isinstance(site, DecoderLayer) or site.layer - 1 not in layers:
            raise ConfigError(f"atp: drops tokens behind decoder layers {layers}, asked at {site}.")
        return layers.index(site.layer - 1)


# --- scores and masks ------------------------------------------------------------------------------------------------


def redundancy_score(s_self: Tensor, s_cross: Tensor, scale: str = "none") -> Tensor:
    """Average the attention received from visual tokens and from the text.

    Parameters
    ----------
    s_self, s_cross
        (..., N) attention probability, averaged over heads and over the visual or the text queries.
    scale
        As in `AtpSelector`.

    Returns
    -------
    Tensor
        (..., N).
    """
    score = (s_self + s_cross) / 2
    if scale == "none":
        return score
    return relative(score)


def spatial_score(origin: Tensor, stride: int, lambda_sample: float = 3.0) -> Tensor:
    """(N,): ``1 - lambda_sample / stride ** 2`` on every `stride`-th row and column, 0 elsewhere.

    `origin` (N, 4 or more) long begins with (view, t, row, column).
    """
    sampled = (origin[:, 2:4] % stride == 0).all(dim=1)
    return sampled.float() * (1 - lambda_sample / stride**2)


def soft_mask(
    redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, temperature: float = 10.0
) -> Tensor:
    """Compute what the paper trains with in place of the choice: the larger of two sigmoids, above 1/2 where one stays.

    Parameters
    ----------
    redundancy, spatial
        (..., N) scores.
    theta_r, theta_s
        (...) thresholds.
    temperature
        Steepness; the paper's sources have 10 and 100.

    Returns
    -------
    Tensor
        (..., N) in 0..1.
    """
    by_redundancy = torch.sigmoid(temperature * (redundancy - theta_r[..., None]))
    by_place = torch.sigmoid(temperature * (spatial - theta_s[..., None]))
    return torch.maximum(by_redundancy, by_place)


def load_modules(folder: str) -> tuple[Modules, AtpModules]:
    """Read the modules of a folder, for one method: no two share a module.

    Raises
    ------
    ConfigError
        It holds none.
    """
    return load_module(folder, AtpSelector.name, AtpModules)


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _at(value: Any, place: int) -> Any:
    """Return the value of one stage, where each may have its own."""
    return value[place] if isinstance(value, tuple) else value
