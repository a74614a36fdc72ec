"""Scores made of weighted column sums of attention: what tokens receive, once or along a walk."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_push
from .dispatch import op
from .reference import context_set
from .sight import Sight

__all__ = ["attention_received", "context_relevance", "current", "pagerank", "received_from", "root_mean_square"]


def attention_received(
    query: Tensor, key: Tensor, scaling: float, sight: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Attention that each key receives, averaged over the queries.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    sight : BoolTensor (B, 1, M or 1, M), optional
        Keys a query may see. Keys that nobody may see are padding, and do not count as queries either.
    cu_seqlens : IntTensor (S + 1,), optional
        Cumulative lengths of S sequences that lie one behind the other in the one row of the batch: each sees itself
        alone, and the average is over its own queries.

    Returns
    -------
    Tensor (B, H, M), float32
        Sums to 1 over the keys, of every sequence.
    """
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()
        equal = (1.0 / lengths).repeat_interleave(lengths, output_size=query.shape[2])[None]
    elif sight is not None:
        exists = sight.any(dim=2)[:, 0]
        equal = exists / exists.sum(dim=-1, keepdim=True).clamp(min=1)
    else:
        equal = query.new_full((1, query.shape[2]), 1.0 / max(1, query.shape[2]), dtype=torch.float32)
    return attention_push(query, key, scaling, equal[:, None, None], sight, cu_seqlens=cu_seqlens)[:, :, 0]


def received_from(
    query: Tensor, key: Tensor, scaling: float, sight: Sight, groups: Tensor, *, known: int | None = None
) -> Tensor:
    """Attention that each current token receives from groups of queries, averaged over heads and over the group.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
        Keys of the queries, behind those of an earlier conversation.
    scaling : float
    sight : Sight
    groups : BoolTensor (B, G, Q)
    known : int, optional
        As in `pagerank`.

    Returns
    -------
    Tensor (B, G, Q), float32
        0 from a group that is empty.
    """
    weights = groups / groups.sum(dim=2, keepdim=True).clamp(min=1)
    pushed = attention_push(query, key, scaling, weights[:, None], sight)
    return pushed[..., current(query, key, known)].mean(dim=1)


@op(triton="vtc.kernels.triton_attention:pagerank")
def pagerank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sight: Sight | Tensor | None = None,
    exists: Tensor | None = None,
    *,
    known: int | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
) -> Tensor:
    """Importance of tokens by a random walk along sharpened attention (AIM, arXiv 2412.03248, as released).

    All queries start with the same weight, which flows along ``softmax(logits / temperature)``; a fraction `damping` of
    it is dealt out evenly again at every step. The attention exists one tile at a time and is made anew for every step.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
        Keys of the queries, behind those of an earlier conversation: weight that flows there is lost.
    scaling : float
    sight : Sight or BoolTensor broadcastable to (B, H, Q, M), optional
    exists : BoolTensor (B, Q), optional
        False for padding, which neither starts with weight nor receives any.
    known : int, optional
        Keys that exist so far, of M that a static cache has room for; those of the queries are the last of them.
    temperature, iterations, damping
        Of the walk.

    Returns
    -------
    Tensor (B, Q), float32
        Root of the mean over heads of the squared weights.
    """
    start = starting_weight(query, exists)
    weight = start.expand(query.shape[0], query.shape[1], 1, query.shape[2])
    for _ in range(iterations):
        # A softmax of logits is cheaper on a CPU than an exponential of logits minus a row's known sum.
        pushed = attention_push(query, key, scaling / temperature, weight, sight)
        weight = pushed[..., current(query, key, known)] * (1 - damping) + damping * start
    return root_mean_square(weight[:, :, 0])


def context_relevance(
    query: Tensor,
    key: Tensor,
    scaling: float,
    sight: Tensor | None = None,
    *,
    t: float,
    reduction: str = "mean",
    prefix: int = 0,
) -> Tensor:
    """Attention that every token receives from the context set (VFlowOpt, arXiv 2508.05211, section 3).

    The context set are the tokens that receive more than `t` times the average attention; if nobody does, it is all.
    Two passes: what everybody receives, then the rows of the context set alone.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    sight : BoolTensor (B, 1, M or 1, M), optional
        Keys a query may see; keys that nobody sees are padding.
    t : float
        Threshold of the context set.
    reduction : str
        "mean" over the set's rows, as released, or their "sum", as in the paper.
    prefix : int
        Leading tokens that are no patches: they take part in the softmax and are left out of everything else.

    Returns
    -------
    Tensor (B, M), float32
        0 for prefix and padding.
    """
    batch, length = query.shape[0], query.shape[2]
    patch = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    patch[:, :prefix] = False
    if sight is not None:
        patch &= sight.any(dim=2)[:, 0]
    count = patch.sum(dim=1, keepdim=True).clamp(min=1)
    equal = (patch / count)[:, None, None]
    received = attention_push(query, key, scaling, equal, sight)[:, :, 0].mean(dim=1)
    # The mean is over patches; what is none is put there, where it is above no threshold.
    mean = (received * patch).sum(dim=1, keepdim=True) / count
    member = context_set(torch.where(patch, received, mean), t) & patch
    member = torch.where(member.any(dim=1, keepdim=True), member, patch)
    relevance = torch.empty_like(received)
    for row in range(batch):  # with as many queries as the row has, so that a batch is its rows to the last bit
        chosen = member[row].nonzero()[:, 0]
        weights = torch.ones(1, 1, 1, len(chosen), device=query.device)
        own = sight if sight is None or sight.shape[0] == 1 else sight[row : row + 1]
        if own is not None and own.shape[2] > 1:
            own = own[:, :, chosen]
        pushed = attention_push(query[row : row + 1, :, chosen], key[row : row + 1], scaling, weights, own)
        relevance[row] = pushed[0, :, 0].mean(dim=0) / (max(1, len(chosen)) if reduction == "mean" else 1)
    return relevance * patch


def starting_weight(query: Tensor, exists: Tensor | None) -> Tensor:
    """(B or 1, 1, 1, Q): the same for every token that exists."""
    if exists is None:
        return query.new_full((1, 1, 1, query.shape[2]), 1.0 / max(1, query.shape[2]), dtype=torch.float32)
    return (exists / exists.sum(dim=1, keepdim=True).clamp(min=1))[:, None, None]


def root_mean_square(weight: Tensor) -> Tensor:
    """(B, Q) of (B, H, Q)."""
    return weight.square().mean(dim=1).sqrt()


def current(query: Tensor, key: Tensor, known: int | None) -> slice:
    """Where the keys of the queries are among all `known` keys."""
    end = key.shape[2] if known is None else min(known, key.shape[2])
    return slice(end - query.shape[2], end)
