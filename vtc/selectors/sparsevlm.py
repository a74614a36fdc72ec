"""SparseVLM: words that see the picture rate its tokens inside the decoder, and some of what leaves is recycled."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.actions import Action
from ..core.context import VisualContext
from ..core.observations import DecoderAttention, Observation, PromptText
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import HiddenStates, Signal
from ..core.sites import DecoderLayer, Site
from ..core.stage import ModelShape, Stage
from ..errors import ConfigError, InputError
from ..registry import register_selector
from .schedule import check_layer, check_layers, check_number, layers_at_depth

__all__ = ["Raters", "SparseVlmRankSelector", "SparseVlmSelector", "TextRows", "clustered", "raters_of", "score_text"]

_BLOCK = 4096
_LAYERS = (3, 7, 16)  # of 32: entered behind the layers 2, 6 and 15 of the released code
_OF = 576  # tokens that the released settings are for
_SETTINGS = {
    "recycled": {
        1 / 9: (82, 32, 18),
        1 / 6: (249, 55, 27),
        2 / 9: (312, 117, 39),
        1 / 3: (309, 204, 113),
    },
    "plain": {
        1 / 9: (66, 34, 20),
        1 / 6: (246, 54, 28),
        2 / 9: (238, 108, 60),
        1 / 3: (300, 200, 118),
    },
}
"""Tokens behind each stage at 64, 96, 128 and 192 of 576.

"recycled" is version 1.5: its 66, 30 and 17 tokens, and so on, and the clusters that it adds; "plain" is version 2.0.
"""


@dataclass(frozen=True)
class Raters(Signal):
    """Which text tokens rate the picture, (T,): 1 for raters, 0 for the others, of the text that counts.

    With the input embeddings v of the N visual tokens and t of the text, a text token's score is

        M_t = 1/N sum over v of softmax over t of (v . t),

    and those above the mean score are raters; all if they are equal.

    Parameters
    ----------
    text
        "after": the text behind the first visual token counts; "all": the whole prompt's.
    """

    name: ClassVar[str] = "raters"
    reads: ClassVar[type[Observation]] = PromptText
    axes: ClassVar[tuple[str, ...]] = ("T",)
    per_token: ClassVar[bool] = False

    text: str = "after"

    def compute(self, raw: PromptText) -> Tensor:
        """(T,)."""
        if raw.visual is None or raw.behind is None:
            raise InputError("raters are chosen by the visual tokens and by where the text stands, which is not known.")
        text = raw.embeddings[raw.behind] if self.text == "after" else raw.embeddings
        return raters_of(score_text(raw.visual, text))


@dataclass(frozen=True)
class TextRows(Signal):
    """Attention that every text token gives to the visual tokens in the decoder layer in front of the site, (N, T).

    The text is that of `Raters`, in its order; shorter texts of a batch are followed by zeros.

    Parameters
    ----------
    text
        As in `Raters`.
    """

    name: ClassVar[str] = "text_rows"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("N", "T")

    text: str = "after"
    reduce: ClassVar[str] = "mean"

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T, Q), averaged over heads."""
        chosen = raw.text_and_visual(self.text)[:, 0]
        most = int(chosen.sum(dim=1).max())
        index = (~chosen).int().argsort(dim=1, stable=True)[:, :most]
        shape = (-1, raw.queries.shape[1], -1, raw.queries.shape[3])
        queries = raw.queries.gather(2, index[:, None, :, None].expand(shape))
        allowed = raw.visibility.rows(index, raw.keys.shape[2]) & chosen.gather(1, index)[:, None, :, None]
        rows = kernels.attention_rows(queries, raw.keys, raw.scaling, allowed, reduce=self.reduce)
        return rows[..., raw.key_length - raw.queries.shape[2] : raw.key_length].movedim(-1, 1)


@dataclass(frozen=True)
class TextRowsOfHeads(TextRows):
    """`TextRows` of every head, (N, H, T)."""

    name: ClassVar[str] = "text_rows_of_heads"
    axes: ClassVar[tuple[str, ...]] = ("N", "heads", "T")
    reduce: ClassVar[str] = "none"


def score_text(visual: Tensor, text: Tensor) -> Tensor:
    """Compute the scores (T,) of text tokens (T, D) by their similarity to visual ones (N, D), see `Raters`."""
    score = text.new_zeros(len(text), dtype=torch.float32)
    for part in visual.split(_BLOCK):
        score += (part.float() @ text.float().T).softmax(dim=1).sum(dim=0)
    return score / max(1, len(visual))


def raters_of(score: Tensor) -> Tensor:
    """Mark the scores (T,) above the mean with 1, the others with 0; all with 1 if they are equal."""
    raters = score > score.mean()
    return (raters if bool(raters.any()) else torch.ones_like(raters)).float()


@register_selector
@dataclass(frozen=True)
class SparseVlmSelector(Selector):
    """Keep the visual tokens that raters attend to, and recycle some of the others, behind three decoder layers.

    **Raters** are chosen once, among the text behind the first picture: the tokens whose input embeddings resemble the
    visual ones more than the mean (`Raters`). **Scores**: the attention that raters give to a visual token in the layer
    in front of the stage, averaged over heads and raters. **Recycling**: of the p tokens that are not kept, the
    ``floor(0.3 p) + 1`` with the best scores form ``floor(m / 10) + 1`` clusters, m being their number, by density
    peaks of their hidden states with as many neighbours (`vtc.kernels.density_peaks`); the mean of a cluster stays at
    the place of its centre. The rest leave.

    The stages are on entering layers 3, 7 and 16 of 32, as many tokens being left behind each as in the released
    settings: `keep_ratio` 1/3, 2/9, 1/6 and 1/9 are those for 192, 128, 96 and 64 of 576 tokens, which name the average
    over the layers of a decoder of 32. Between them the shares are interpolated, from 0 at 0 to 1 at 1; `vtc.report`
    has the average of a model. The number of a stage contains what is recycled, which takes at most half of it.

    Where this differs from the released code: clusters stand at their centres among the kept tokens, instead of behind
    them, and positions stay as they were, while theirs are numbered anew; equal densities are told apart by the index
    instead of noise; it always drops a token, while here ``keep_ratio=1`` drops none; if no text token is above the
    mean, all rate. In `vtc.select` it is the first stage, with the budget that is asked for.

    Parameters
    ----------
    layers
        Decoder layers (0-based) on entering which tokens leave, ascending, at least 1; None: those above, in proportion
        to the depth.
    recycle
        Whether to recycle. Without, the settings are those of version 2.0 ("SparseVLM+").
    heads
        How many heads count: those in which the raters give most attention to the visual tokens, 14 in version 2.0;
        None: all. Version 2.0 also divides attention by what the rotary positions alone would give, which is left out.
    text
        Which text can rate. "after": all behind the first visual token of the prompt; "all": the whole prompt's.

    Raises
    ------
    ConfigError
        An option is invalid, the decoder has no such layer, or a count of tokens is asked for of a model: the budget is
        shared among layers.

    References
    ----------
    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417, and
    github.com/Gumpest/SparseVLMs at 26a5f488.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"
    cost: ClassVar[str] = "T N d + (0.3 N)^2 d"
    sites: ClassVar[tuple[type[Site], ...]] = ()
    reads_features: ClassVar[bool] = False

    layers: tuple[int, ...] | None = None
    recycle: bool = True
    heads: int | None = None
    text: str = "after"
    _most_layers: ClassVar[int | None] = len(_LAYERS)  # the settings have no more

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.name, self.layers, self._most_layers))
        if not isinstance(self.recycle, bool):
            raise ConfigError(f"{self.name}: recycle must be True or False, got {self.recycle!r}.")
        if self.heads is not None:
            check_layer(self.name, "heads", self.heads, least=1)
        if self.text not in ("after", "all"):
            raise ConfigError(f'{self.name}: text must be "after" or "all", got {self.text!r}.')

    def resolve(self, shape: ModelShape | None, keep_ratio: float | None) -> SparseVlmSelector:
        """Set `layers` for a decoder of this depth."""
        if self.layers is not None:
            return self
        depth = 32 if shape is None else shape.decoder_layers
        return dataclasses.replace(self, layers=layers_at_depth(_LAYERS, 32, depth))

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Select, and recycle, on entering each of `layers`."""
        if shape is not None and keep_ratio == 1:
            return ()
        layers = self.resolve(shape, keep_ratio).layers or ()
        rows = TextRows(self.text) if self.heads is None else TextRowsOfHeads(self.text)
        requires: tuple[Signal, ...] = (Raters(self.text), rows, *((HiddenStates(),) if self.recycle else ()))
        action = Action.MERGE if self.recycle else Action.KEEP
        shares = self._shares(shape, keep_ratio, len(layers))
        return tuple(
            Stage(DecoderLayer(layer), requires, keep=share, action=action)
            for layer, share in zip(layers, shares, strict=True)
        )

    def _shares(self, shape: ModelShape | None, keep_ratio: float | None, stages: int) -> list[float | None]:
        """Return what each stage keeps of what enters it; None: what the configuration says."""
        if shape is None:
            return [None] * stages
        if keep_ratio is None:
            raise ConfigError(f"{self.name} shares its budget among decoder layers: give keep_ratio, not keep_tokens.")
        left = [1.0, *self.shares_of(keep_ratio)[-stages:]]  # where the depth has room for fewer stages, the last ones
        return [min(1.0, after / before) for before, after in itertools.pairwise(left)]

    def shares_of(self, keep_ratio: float) -> tuple[float, ...]:
        """Return the shares of all tokens that are left behind each of three stages."""
        settings = _SETTINGS["recycled" if self.recycle else "plain"]
        known = [0.0, *settings, 1.0]
        tables = [(0.0,) * 3, *(tuple(count / _OF for count in counts) for counts in settings.values()), (1.0,) * 3]
        at = next(i for i, ratio in enumerate(known) if keep_ratio <= ratio)
        part = (keep_ratio - known[at - 1]) / (known[at] - known[at - 1])
        return tuple(low + part * (high - low) for low, high in zip(tables[at - 1], tables[at], strict=True))

    def score(self, ctx: VisualContext) -> Tensor:
        """(N,) mean attention of the raters."""
        raters = ctx[Raters].float()
        if self.heads is None:
            return _of_raters(ctx[TextRows], raters)
        rows = _of_raters(ctx[TextRowsOfHeads], raters)  # (N, H)
        best = rows.sum(dim=0).sort(descending=True, stable=True).indices[: self.heads]
        return rows[:, best].mean(dim=1)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose, and recycle."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        budget = max(1, ctx.budget)
        return self.keep(ctx, self.score(ctx), self.kept_of(ctx.n, budget), budget)

    def kept_of(self, n: int, budget: int) -> int:
        """Return how many of `budget` tokens are kept as they are, so that recycling fills the rest."""
        clusters = 0
        if self.recycle:
            half = budget // 2
            clusters = next((c for c in range(1, half + 1) if recycled(n - budget + c)[1] == c), half)
        return budget - clusters

    def keep(self, ctx: VisualContext, score: Tensor, count: int, budget: int) -> Selection:
        """Keep the `count` best of more, and recycle some of the others, up to the budget."""
        keep = kernels.topk_indices(score, count)
        size, clusters = recycled(ctx.n - count)
        clusters = min(clusters, budget - count)
        if not self.recycle or not clusters:
            return Selection(ctx.n, keep)
        pool = kernels.topk_indices(score.index_fill(0, keep, -torch.inf), size)
        centres, cluster = clustered(ctx[HiddenStates][pool], clusters)
        places, order = torch.cat([keep, pool[centres]]).sort()
        slot = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
        assign = torch.full((ctx.n,), -1, device=keep.device)
        assign[keep], assign[pool] = slot[: len(keep)], slot[len(keep) :][cluster]
        return Selection(ctx.n, places, assign)


def clustered(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the centres (C,) long, ascending, of clusters by density peaks, and the cluster of every row of x (N, D).

    There are as many neighbours as clusters, and at most as many as rows.
    """
    count, together = min(clusters, len(x)), x.new_zeros(len(x), dtype=torch.long)
    centres = kernels.topk_indices(kernels.density_peaks(x.float(), together, count), count)
    cluster = kernels.nearest_in_group(x.float(), together, centres, "euclidean")
    return centres, cluster.index_copy(0, centres, torch.arange(count, device=x.device))


def recycled(pruned: int) -> tuple[int, int]:
    """Return how many of `pruned` tokens are recycled, and into how many clusters."""
    pool = int(0.3 * pruned) + 1
    return pool, int(pool / 10) + 1


def _of_raters(rows: Tensor, raters: Tensor) -> Tensor:
    """Average rows (N, ..., T') over the raters (T,), of which T' is at least as many."""
    return (rows[..., : len(raters)].float() * raters).sum(dim=-1) / raters.sum().clamp(min=1)


@register_selector
@dataclass(frozen=True)
class SparseVlmRankSelector(SparseVlmSelector):
    """SparseVLM with the paper's number of tokens: as many as the attention from raters has independent directions.

    Behind every stage ``floor(scale * rank + bias)`` tokens stay, rank being that of the matrix of attention, averaged
    over heads, from the raters to the visual tokens; at most all but one. That is the rule of version 1.0 of the
    released code, which version 1.5 left for lists. The budget is a ceiling for what the first stage leaves, clusters
    included. Everything else is as in `SparseVlmSelector`.

    Parameters
    ----------
    scale, bias
        (13.5, 0), (9, 6) and (0.8, 0) in the released code, for 192, 128 and 64 tokens.
    layers
        As in `SparseVlmSelector`, but any number of them. Version 1.0 works behind layer 19 of 32, too, which is
        ``layers=(3, 7, 16, 20)``.
    recycle, text
        As in `SparseVlmSelector`.
    heads
        None.

    Raises
    ------
    ConfigError
        An option is invalid, or the decoder has no such layer.

    References
    ----------
    arXiv 2410.04417, section 3.3, and github.com/Gumpest/SparseVLMs at 91fb6d98.
    """

    name: ClassVar[str] = "sparsevlm-rank"
    adaptive: ClassVar[bool] = True

    scale: float = 13.5
    bias: float = 0.0
    _most_layers: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.name, "scale", self.scale, 0)
        check_number(self.name, "bias", self.bias, 0)
        if self.heads is not None:
            raise ConfigError(f"{self.name}: the rank is that of the mean over all heads; leave heads out.")

    def _shares(self, shape: ModelShape | None, keep_ratio: float | None, stages: int) -> list[float | None]:
        return [None, *[1.0] * (stages - 1)]

    def select(self, ctx: VisualContext) -> Selection:
        """Count, choose, and recycle."""
        whole = ctx.keep_ratio == 1 and ctx.tokens_at_input is None  # in `vtc.select`
        if whole or ctx.n == 1:
            return Selection.full(ctx.n, ctx.features.device)
        raters = ctx[Raters].float()
        rows = ctx[TextRows][:, : len(raters)].float()[:, raters > 0]
        rank = int(torch.linalg.matrix_rank(rows)) if rows.numel() else 0
        budget = max(1, min(ctx.budget, ctx.n))
        most = self.kept_of(ctx.n, budget) if budget < ctx.n else ctx.n - 1
        return self.keep(ctx, self.score(ctx), max(1, min(int(rank * self.scale + self.bias), most)), budget)
