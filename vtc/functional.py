"""`vtc.select`: every method as a function of tensors, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .budget import resolve_budget
from .core.context import Grid, Need, VisualContext, grid_origin
from .core.selection import Selection
from .errors import ConfigError, InputError
from .registry import get_selector
from .selectors.base import Selector

__all__ = ["select"]

# Inputs that tell N, and the axis that does.
_TOKEN_AXIS = {
    "features": 0,
    "cls_attention": -1,
    "received_attention": -1,
    "attention": -1,
    "text_attention": -1,
    "keys": 0,
    "clip_relevance": 0,
    "hidden_states": 0,
    "context_relevance": 0,
    "entropy": 0,
    "modality_attention": -1,
    "pagerank": 0,
    "origin": 0,
}


@torch.no_grad()
def select(
    method: str,
    *,
    keep_tokens: int | None = None,
    keep_ratio: float | None = None,
    features: Tensor | None = None,
    grid_thw: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    cls_attention: Tensor | None = None,
    received_attention: Tensor | None = None,
    attention: Tensor | None = None,
    text_attention: Tensor | None = None,
    keys: Tensor | None = None,
    text_embeds: Tensor | None = None,
    pre_projector: Tensor | None = None,
    group: Tensor | None = None,
    pixels: Tensor | None = None,
    clip_relevance: Tensor | None = None,
    hidden_states: Tensor | None = None,
    context_relevance: Tensor | None = None,
    entropy: Tensor | None = None,
    modality_attention: Tensor | None = None,
    attention_exchange: Tensor | None = None,
    pagerank: Tensor | None = None,
    origin: Tensor | None = None,
    structural: int = 0,
    companions: int = 0,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Run one method on the tensors of one image or video.

    What a method does to layers and heads is the method's business: it is given the layers it is to use, and all heads.
    A method of several stages is run at its first.

    Parameters
    ----------
    method
        Method id, e.g. "divprune".
    keep_tokens, keep_ratio
        How many of the N tokens to keep, or which fraction: exactly one of the two.
    features
        (N, D) visual tokens as the language model would see them. Optional for methods that only score attention.
    grid_thw
        (t, h, w) of the tokens, or one such triple per view; default (1, 1, N).
    cls_attention
        (layers, heads, N): the [CLS] rows of the layers to use, without the [CLS] column.
    received_attention
        (layers, heads, N): attention each token receives.
    attention
        (N, N): attention of one layer, averaged over heads.
    text_attention
        (heads, queries, N): rows of the chosen text queries over the visual tokens.
    keys
        (N, d): keys of one layer.
    text_embeds
        (T, D): input embeddings of the text.
    pre_projector, group
        (M, Dv) patch features, and (M,) long, the token that each patch belongs to.
    pixels
        The pixels behind the tokens.
    clip_relevance
        (N,): similarity of each token to the text.
    hidden_states
        (N, D): hidden states inside the language model.
    context_relevance
        (N,): from `kernels.context_relevance`.
    entropy
        (N,): softmax of `kernels.patch_entropy` over the patches of a crop.
    modality_attention
        (2, N): attention that each token receives on average from the text and from the visual tokens.
    attention_exchange
        (2,): which part of its attention the text gives to the visual tokens, and they to the text.
    pagerank
        (N,): from `kernels.pagerank`.
    origin
        (N, 6) long: (view, t, row, column, rows, columns) of each token; default: those of `grid_thw`.
    structural
        How many newline tokens stay beside the N, for methods that count them in their budget.
    companions
        How many other images and videos the prompt has, for methods that treat an image in company differently.
    seed
        Seed of the method's randomness, if it has any.
    **options
        The method's own options.

    Returns
    -------
    Selection
        ``.keep`` is (K,) long and ascending, on the device of the inputs.

    Raises
    ------
    UnsupportedMethodError
        There is no such method.
    ConfigError
        An option or the budget is invalid, or an input that the method needs is missing.
    InputError
        The inputs disagree about N, have the wrong shape, or are not finite.
    """
    selector = get_selector(method, **options).resolve(None, keep_ratio)
    inputs = {
        "features": features,
        "cls_attention": cls_attention,
        "received_attention": received_attention,
        "attention": attention,
        "text_attention": text_attention,
        "keys": keys,
        "text_embeds": text_embeds,
        "pre_projector": pre_projector,
        "group": group,
        "pixels": pixels,
        "clip_relevance": clip_relevance,
        "hidden_states": hidden_states,
        "context_relevance": context_relevance,
        "entropy": entropy,
        "modality_attention": modality_attention,
        "attention_exchange": attention_exchange,
        "pagerank": pagerank,
        "origin": origin,
    }
    given: dict[str, Any] = {name: value for name, value in inputs.items() if value is not None}
    stage = selector.stages()[0]
    views = _grids(grid_thw)
    modality = "video" if any(t > 1 for t, _, _ in views) else "image"
    needed = stage.requires - {Need.ORIGIN} - (stage.images_only if modality == "video" else frozenset())
    _check_given(selector, needed, given)
    n = _count_tokens(given, views)
    some = next(iter(given.values()), torch.empty(0))
    if Need.ORIGIN in stage.requires:
        given.setdefault("origin", grid_origin(views or ((1, 1, n),), some.device))
    context = VisualContext(
        features=given.pop("features", torch.empty(n, 0, device=some.device)),
        budget=resolve_budget(n, keep_ratio, keep_tokens),
        generator=torch.Generator().manual_seed(seed),
        grids=views or ((1, 1, n),),
        modality=modality,
        layer_idx=stage.layer,
        keep_ratio=keep_ratio,
        structural=structural,
        companions=companions,
        **given,
    )
    return selector.select(context.check())


def _check_given(selector: Selector, requires: frozenset[Need], given: Mapping[str, Tensor]) -> None:
    wanted = [*(["features"] if selector.reads_features else []), *sorted(need.value for need in requires)]
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ConfigError(f"{selector.name} needs {', '.join(missing)}; got {', '.join(given) or 'no tensors'}.")


def _grids(grid_thw: Tensor | Sequence[int] | Sequence[Sequence[int]] | None) -> tuple[Grid, ...]:
    """Views as triples; empty if none were given."""
    if grid_thw is None:
        return ()
    try:
        views = torch.as_tensor(grid_thw)
    except (TypeError, ValueError) as error:
        raise InputError(f"grid_thw must be (t, h, w) or one such triple per view, got {grid_thw!r}.") from error
    if views.ndim not in (1, 2) or views.shape[-1] != 3 or views.is_floating_point() or bool((views < 1).any()):
        raise InputError(f"grid_thw must be (t, h, w) of positive integers, or one triple per view, got {grid_thw!r}.")
    return tuple((t, h, w) for t, h, w in views.reshape(-1, 3).tolist())


def _count_tokens(given: Mapping[str, Tensor], views: tuple[Grid, ...]) -> int:
    """N, which every input that has a token axis must agree on."""
    per_token = {name: axis for name, axis in _TOKEN_AXIS.items() if name in given}
    scalars = [name for name in per_token if given[name].ndim == 0]
    if scalars:
        raise InputError(f"{', '.join(scalars)}: a scalar has no axis of N tokens.")
    counts = {name: given[name].shape[axis] for name, axis in per_token.items()}
    if views:
        counts["grid_thw"] = sum(t * h * w for t, h, w in views)
    if not counts:
        raise ConfigError(
            "The number of tokens is unknown: give features, grid_thw or a tensor with one entry per token."
        )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"The inputs disagree about the number of tokens: {listed}.")
    return next(iter(counts.values()))
