"""DART: a few pivots, and what each of them resembles least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..core.context import VisualContext
from ..core.observations import DecoderAttention, DecoderHidden, Observation
from ..core.selection import Selection
from ..core.selector import Selector
from ..core.signals import HiddenStates, Signal, TextEmbeds
from ..core.sites import BeforeDecoder, DecoderLayer
from ..core.stage import ModelShape, Stage
from ..errors import InputError
from ..registry import register_selector
from .schedule import check_layer

__all__ = ["DartSelector", "unlike"]


@dataclass(frozen=True)
class KeyLength(Signal):
    """L1 norm of the key of every token in the decoder layer in front of the site, heads concatenated, (N,)."""

    name: ClassVar[str] = "key_length"
    reads: ClassVar[type[Observation]] = DecoderAttention

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, T)."""
        return _key_lengths(raw)


@dataclass(frozen=True)
class TextPivots(Signal):
    """The text tokens behind the first visual token whose keys have the largest L1 norm, the largest first, (P,) long.

    They are places among the tokens of `PromptStates`, -1 where there are not so many.

    Parameters
    ----------
    most
        P.
    """

    name: ClassVar[str] = "pivot_places"
    reads: ClassVar[type[Observation]] = DecoderAttention
    axes: ClassVar[tuple[str, ...]] = ("pivots",)
    per_token: ClassVar[bool] = False

    most: int = 4

    def compute(self, raw: DecoderAttention) -> Tensor:
        """(B, P)."""
        later = raw.text & raw.valid & (raw.visual.cumsum(dim=1) > 0)
        length, place = _key_lengths(raw).masked_fill(~later, -torch.inf).sort(dim=1, descending=True, stable=True)
        place = place.masked_fill(length == -torch.inf, -1)[:, : self.most]
        return torch.nn.functional.pad(place, (0, self.most - place.shape[1]), value=-1)


@dataclass(frozen=True)
class PromptStates(Signal):
    """Hidden states of all tokens, text and padding too, on entering the decoder layer of the site, (T, D)."""

    name: ClassVar[str] = "prompt_states"
    reads: ClassVar[type[Observation]] = DecoderHidden
    axes: ClassVar[tuple[str, ...]] = ("T", "D")
    per_token: ClassVar[bool] = False

    def compute(self, raw: DecoderHidden) -> Tensor:
        """(B, T, D)."""
        return raw.hidden.nan_to_num()  # what stands in padding is nobody's fault


def _key_lengths(raw: DecoderAttention) -> Tensor:
    current = raw.keys[:, :, raw.key_length - raw.queries.shape[2] : raw.key_length]
    return current.float().abs().sum(dim=(1, 3))


@register_selector
@dataclass(frozen=True)
class DartSelector(Selector):
    """Keep pivots, and for each of them the tokens least similar to it, so that few are duplicates.

    Before the decoder, pivots are the `image_pivots` visual and the `text_pivots` text tokens whose embeddings have the
    largest L1 norm. Visual pivots are kept. Then every pivot in turn, visual ones first, the largest norms first, takes
    its part of what is left of the budget, ``ceil(left / pivots left)``, of the tokens with the lowest cosine to it
    that are still there. This is the form of NVIDIA's TensorRT-Edge-LLM, but for the budget and for its limit below
    which nothing is dropped.

    With `layer` it is the method of the paper: tokens leave on entering that layer of the decoder, norms are of the
    keys of the layer before, and cosines of the hidden states; text pivots stand behind the first picture of the
    prompt. Three differences from the released code: it passes hidden states through the model's last norm first, whose
    weights change cosines a little; it visits pivots in the order in which Python iterates over a set of their places;
    and it keeps 4 tokens more than asked for, 132 for 128, where the budget here includes the visual pivots. Equal
    cosines go to the lower index.

    Parameters
    ----------
    layer
        Decoder layer (0-based) on entering which tokens leave, at least 1, 2 in the paper; None: before the decoder.
    image_pivots, text_pivots
        Number of pivots; the first is at least 1.

    Raises
    ------
    ConfigError
        An option is invalid.
    InputError
        Text and features are not equally wide, which only `vtc.select` allows.

    References
    ----------
    "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", arXiv 2502.11494.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "DART, arXiv 2502.11494"
    cost: ClassVar[str] = "N d"
    sites: ClassVar[tuple[type, ...]] = ()

    layer: int | None = None
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_layer("dart", "layer", self.layer, least=1)
        check_layer("dart", "image_pivots", self.image_pivots, least=1)
        check_layer("dart", "text_pivots", self.text_pivots)

    def stages(self, shape: ModelShape | None = None, keep_ratio: float | None = None) -> tuple[Stage, ...]:
        """Once, before the language model or on entering `layer`."""
        if self.layer is None:
            return (Stage(BeforeDecoder(), (TextEmbeds(),) if self.text_pivots else ()),)
        text: tuple[Signal, ...] = (TextPivots(self.text_pivots), PromptStates()) if self.text_pivots else ()
        return (Stage(DecoderLayer(self.layer), (HiddenStates(), KeyLength(), *text)),)

    def select(self, ctx: VisualContext) -> Selection:
        """Choose ``min(ctx.budget, N)`` tokens."""
        if ctx.budget >= ctx.n:
            return Selection.full(ctx.n, ctx.features.device)
        if self.layer is None:
            x, length = ctx.features.float(), ctx.features.float().abs().sum(dim=1)
            text = ctx[TextEmbeds].float() if self.text_pivots else x[:0]
            text = text[_largest(text.abs().sum(dim=1), self.text_pivots)]
        else:
            x, length = ctx[HiddenStates].float(), ctx[KeyLength].float()
            text = x[:0]
            if self.text_pivots:
                places = ctx[TextPivots].long()
                text = ctx[PromptStates][places[places >= 0]].float()
        if text.shape[1] != x.shape[1]:
            raise InputError(f"the text is {text.shape[1]} wide and the visual tokens {x.shape[1]}; give both alike.")
        pivots = _largest(length, min(self.image_pivots, ctx.budget))
        return Selection.from_indices(ctx.n, unlike(x, pivots, torch.cat([x[pivots], text]), ctx.budget))


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest values, the largest first, the lower place first among equals."""
    return values.sort(descending=True, stable=True).indices[:count]


def unlike(x: Tensor, kept: Tensor, pivots: Tensor, count: int) -> Tensor:
    """Add to the tokens `kept` those least similar to `pivots` (P, D), in their order, until there are `count`.

    Parameters
    ----------
    x
        (N, D), with N at least `count`.
    kept
        (M,) long.

    Returns
    -------
    Tensor
        (count,) long.
    """
    normalize = torch.nn.functional.normalize
    likeness = normalize(pivots.float(), dim=1, eps=1e-12) @ normalize(x.float(), dim=1, eps=1e-12).T
    parts = [kept]
    left = count - len(kept)
    for turn, similarity in enumerate(likeness):
        share = -(-left // (len(pivots) - turn))
        parts.append(kernels.topk_indices(-similarity.index_fill(0, torch.cat(parts), torch.inf), share))
        left -= share
    return torch.cat(parts)
