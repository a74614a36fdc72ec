"""Scores derived from weighted column sums of attention: attention received, and PageRank along attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_column_sums
from .dispatch import op
from .reference import context_set
from .visibility import VisibilityMask

__all__ = [
    "attention_received",
    "context_relevance",
    "current_keys",
    "pagerank",
    "received_from",
    "root_mean_square",
    "starting_weight",
]


def attention_received(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Compute the attention that each key receives, averaged over the queries.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    mask : BoolTensor (B, 1, M or 1, M), optional
        True where a query attends to a key. Keys masked for all queries are padding and are not counted as queries.
    cu_seqlens : IntTensor (S + 1,), optional
        Cumulative lengths of S sequences packed into the only row of the batch. Each attends to itself only, and the
        average is over its own queries.

    Returns
    -------
    Tensor (B, H, M), float32
        Sums to 1 over the keys of every sequence.
    """
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()
        equal = (1.0 / lengths).repeat_interleave(lengths, output_size=query.shape[2])[None]
    elif mask is not None:
        exists = mask.any(dim=2)[:, 0]
        equal = exists / exists.sum(dim=-1, keepdim=True).clamp(min=1)
    else:
        equal = query.new_full((1, query.shape[2]), 1.0 / max(1, query.shape[2]), dtype=torch.float32)
    return attention_column_sums(query, key, scaling, equal[:, None, None], mask, cu_seqlens=cu_seqlens)[:, :, 0]


def received_from(
    query: Tensor, key: Tensor, scaling: float, mask: VisibilityMask, groups: Tensor, *, known: int | None = None
) -> Tensor:
    """Compute the attention that each current token receives from groups of queries, averaged over heads and group.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
        Keys of earlier turns of a conversation, followed by those of the queries.
    scaling : float
    mask : VisibilityMask
    groups : BoolTensor (B, G, Q)
    known : int, optional
        As in `pagerank`.

    Returns
    -------
    Tensor (B, G, Q), float32
        0 for an empty group.
    """
    weights = groups / groups.sum(dim=2, keepdim=True).clamp(min=1)
    sums = attention_column_sums(query, key, scaling, weights[:, None], mask)
    return sums[..., current_keys(query, key, known)].mean(dim=1)


@op(triton="vtc.kernels.triton_attention:pagerank")
def pagerank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: VisibilityMask | Tensor | None = None,
    exists: Tensor | None = None,
    *,
    known: int | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
) -> Tensor:
    """Compute the importance of tokens by a random walk along sharpened attention (AIM, arXiv 2412.03248, as released).

    All queries start with the same weight, which moves along ``softmax(logits / temperature)``; in every step a
    fraction `damping` of it is redistributed evenly. The attention matrix is recomputed tile by tile in every step.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
        Keys of earlier turns of a conversation, whose weight is dropped, followed by those of the queries.
    scaling : float
    mask : VisibilityMask or BoolTensor broadcastable to (B, H, Q, M), optional
    exists : BoolTensor (B, Q), optional
        False for padding, which has no weight.
    known : int, optional
        Number of valid keys among the M slots of a static cache; those of the queries are the last of them.
    temperature : float
        Divisor of the logits.
    iterations : int
        Steps of the walk.
    damping : float
        Fraction of the weight that is redistributed in every step.

    Returns
    -------
    Tensor (B, Q), float32
        Root mean square of the weights over the heads.
    """
    start = starting_weight(query, exists)
    weight = start.expand(query.shape[0], query.shape[1], 1, query.shape[2])
    for _ in range(iterations):
        # On a CPU a softmax is cheaper than the exponential of logits minus a stored logsumexp.
        sums = attention_column_sums(query, key, scaling / temperature, weight, mask)
        weight = sums[..., current_keys(query, key, known)] * (1 - damping) + damping * start
    return root_mean_square(weight[:, :, 0])


def context_relevance(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    *,
    t: float,
    reduction: str = "mean",
    prefix: int = 0,
) -> Tensor:
    """Compute the attention that every token receives from the context set (VFlowOpt, arXiv 2508.05211, section 3).

    The context set holds the tokens that receive more than `t` times the average attention, or all if there are none.
    Takes two passes: the attention received by all tokens, then the rows of the context set.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    mask : BoolTensor (B, 1, M or 1, M), optional
        True where a query attends to a key. Keys masked for all queries are padding.
    t : float
        Threshold of the context set.
    reduction : str
        "mean" over the rows of the set, as released, or their "sum", as in the paper.
    prefix : int
        Number of leading tokens that are not patches: they take part in the softmax and in nothing else.

    Returns
    -------
    Tensor (B, M), float32
        0 for prefix and padding.
    """
    batch, length = query.shape[0], query.shape[2]
    patch = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    patch[:, :prefix] = False
    if mask is not None:
        patch &= mask.any(dim=2)[:, 0]
    count = patch.sum(dim=1, keepdim=True).clamp(min=1)
    equal = (patch / count)[:, None, None]
    received = attention_column_sums(query, key, scaling, equal, mask)[:, :, 0].mean(dim=1)
    # The mean is over patches; other tokens get exactly the mean, so that they do not change it.
    mean = (received * patch).sum(dim=1, keepdim=True) / count
    member = context_set(torch.where(patch, received, mean), t) & patch
    member = torch.where(member.any(dim=1, keepdim=True), member, patch)
    relevance = torch.empty_like(received)
    for row in range(batch):  # one row at a time, so that a batch equals its rows bit for bit
        chosen = member[row].nonzero()[:, 0]
        weights = torch.ones(1, 1, 1, len(chosen), device=query.device)
        own = mask if mask is None or mask.shape[0] == 1 else mask[row : row + 1]
        if own is not None and own.shape[2] > 1:
            own = own[:, :, chosen]
        sums = attention_column_sums(query[row : row + 1, :, chosen], key[row : row + 1], scaling, weights, own)
        relevance[row] = sums[0, :, 0].mean(dim=0) / (max(1, len(chosen)) if reduction == "mean" else 1)
    return relevance * patch


def starting_weight(query: Tensor, exists: Tensor | None) -> Tensor:
    """Return weights (B or 1, 1, 1, Q) that are equal for all tokens but padding and sum to 1."""
    if exists is None:
        return query.new_full((1, 1, 1, query.shape[2]), 1.0 / max(1, query.shape[2]), dtype=torch.float32)
    return (exists / exists.sum(dim=1, keepdim=True).clamp(min=1))[:, None, None]


def root_mean_square(weight: Tensor) -> Tensor:
    """Reduce (B, H, Q) over the heads to (B, Q)."""
    return weight.square().mean(dim=1).sqrt()


def current_keys(query: Tensor, key: Tensor, known: int | None) -> slice:
    """Return the slice of the queries' own keys, the last of all `known` keys."""
    end = key.shape[2] if known is None else min(known, key.shape[2])
    return slice(end - query.shape[2], end)
