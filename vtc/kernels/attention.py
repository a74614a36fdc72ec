"""Rows and sums of an attention matrix, without the matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vtc.kernels.reference import context_set

Sight = Callable[[slice, int], torch.Tensor]
"""Says for a slice of the queries which of so many keys they see: bool, broadcastable to (B, H, R, M)."""


def attention_rows(
    query: torch.Tensor, key: torch.Tensor, scaling: float, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax rows of chosen queries.

    Parameters
    ----------
    query : Tensor (B, H, R, d)
        The chosen queries only.
    key : Tensor (B, Hkv, M, d)
        Hkv divides H: each key head serves H / Hkv query heads.
    scaling : float
        Factor on the logits.
    allowed : BoolTensor broadcastable to (B, H, R, M), optional
        Keys a query may see. A query that sees none gets a row of zeros.

    Returns
    -------
    Tensor (B, H, R, M), float32
    """
    logits = _logits(query, key, scaling)
    if allowed is None:
        return logits.softmax(dim=-1)
    logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(dim=-1).nan_to_num(nan=0.0)


def attention_received(
    query: torch.Tensor, key: torch.Tensor, scaling: float, allowed: torch.Tensor | None = None, block: int = 256
) -> torch.Tensor:
    """Attention that each key receives, averaged over the queries, in blocks of queries: O(block x M) memory.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    allowed : BoolTensor (B, 1, M or 1, M), optional
        Keys a query may see. Keys that nobody may see are padding, and do not count as queries either.
    block : int
        Queries per block.

    Returns
    -------
    Tensor (B, H, M), float32
        Sums to 1 over the keys.
    """
    received = query.new_zeros(query.shape[0], query.shape[1], key.shape[2], dtype=torch.float32)
    if allowed is None:
        for rows in query.split(block, dim=2):
            received += _logits(rows, key, scaling).softmax(dim=-1).sum(dim=2)
        return received / query.shape[2]
    exists = allowed.any(dim=2)  # (B, 1, M)
    for start in range(0, query.shape[2], block):
        part = slice(start, start + block)
        rows = attention_rows(
            query[:, :, part], key, scaling, allowed if allowed.shape[2] == 1 else allowed[:, :, part]
        )
        received += (rows * exists[:, :, part, None]).sum(dim=2)
    return received / exists.sum(dim=-1, keepdim=True).clamp(min=1)


def attention_push(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    weights: torch.Tensor,
    sight: Sight | None = None,
    block: int = 256,
) -> torch.Tensor:
    """Weighted sums of attention rows, in blocks of queries: what flows to the keys if every query has some weight.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    weights : Tensor (B, H or 1, W, Q), float32
        W sets of weights.
    sight : Sight, optional
        Without it everybody sees everything.
    block : int
        Rows of logits per key head that exist at a time.

    Returns
    -------
    Tensor (B, H, W, M), float32
    """
    step = max(1, block // (query.shape[1] // key.shape[1]))
    pushed = query.new_zeros(query.shape[0], query.shape[1], weights.shape[2], key.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], step):
        part = slice(start, start + step)
        allowed = None if sight is None else sight(part, key.shape[2])
        pushed += weights[..., part] @ attention_rows(query[:, :, part], key, scaling, allowed)
    return pushed


def streamed_context_relevance(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    allowed: torch.Tensor | None = None,
    *,
    t: float,
    reduction: str = "mean",
    prefix: int = 0,
    block: int = 256,
) -> torch.Tensor:
    """`vtc.kernels.context_relevance` in two passes: what everybody receives, then the rows of the context set alone.

    Parameters
    ----------
    query : Tensor (B, H, M, d)
    key : Tensor (B, Hkv, M, d)
    scaling : float
    allowed : BoolTensor (B, 1, M or 1, M), optional
        Keys a query may see; keys that nobody sees are padding.
    t, reduction
        As in the reference.
    prefix : int
        Leading tokens that are no patches: they take part in the softmax and are left out of everything else.
    block : int

    Returns
    -------
    Tensor (B, 1, M), float32
        0 for prefix and padding.
    """
    batch, length = query.shape[0], query.shape[2]
    patch = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    patch[:, :prefix] = False
    if allowed is not None:
        patch &= allowed.any(dim=2)[:, 0]

    def seen_by(queries: torch.Tensor) -> Sight | None:
        """What the queries (B, R) see."""
        if allowed is None:
            return None
        if allowed.shape[2] == 1:
            return lambda part, room: allowed
        return lambda part, room: allowed.gather(2, queries[:, None, part, None].expand(-1, -1, -1, room))

    everybody = torch.arange(length, device=query.device).expand(batch, -1)
    count = patch.sum(dim=1, keepdim=True).clamp(min=1)
    equal = (patch / count)[:, None, None]
    received = attention_push(query, key, scaling, equal, seen_by(everybody), block)[:, :, 0].mean(dim=1)
    # The mean is over patches; what is none is put there, where it is above no threshold.
    mean = (received * patch).sum(dim=1, keepdim=True) / count
    member = context_set(torch.where(patch, received, mean), t) & patch
    member = torch.where(member.any(dim=1, keepdim=True), member, patch)
    chosen = member.byte().argsort(dim=1, descending=True, stable=True)[:, : int(member.sum(dim=1).max())]
    rows = query.gather(2, chosen[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    weights = member.gather(1, chosen).float()
    if reduction == "mean":
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    pushed = attention_push(rows, key, scaling, weights[:, None, None], seen_by(chosen), block)
    return pushed.mean(dim=1) * patch[:, None]


def streamed_pagerank(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    sight: Sight,
    exists: torch.Tensor,
    *,
    known: int | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    block: int = 256,
) -> torch.Tensor:
    """`vtc.kernels.pagerank` with one block of the attention at a time, computed anew for every step of the walk.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
        Keys of the queries, behind those of an earlier conversation: weight that flows there is lost.
    scaling : float
    sight : Sight
    known : int, optional
        Keys that exist so far, of M that a static cache has room for; those of the queries are the last of them.
    exists : BoolTensor (B, Q)
        False for padding.
    temperature, iterations, damping
        As in the reference.
    block : int

    Returns
    -------
    Tensor (B, Q), float32
    """
    start = (exists / exists.sum(dim=1, keepdim=True).clamp(min=1))[:, None, None]
    weight = start.expand(-1, query.shape[1], -1, -1)
    for _ in range(iterations):
        pushed = attention_push(query, key, scaling / temperature, weight, sight, block)
        weight = pushed[..., _current(query, key, known)] * (1 - damping) + damping * start
    return weight[:, :, 0].square().mean(dim=1).sqrt()


def received_from(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    sight: Sight,
    groups: torch.Tensor,
    *,
    known: int | None = None,
    block: int = 256,
) -> torch.Tensor:
    """Attention that each current token receives from groups of queries, averaged over heads and over the group.

    Parameters
    ----------
    query : Tensor (B, H, Q, d)
    key : Tensor (B, Hkv, M, d)
        Keys of the queries, behind those of an earlier conversation.
    scaling : float
    sight : Sight
    known : int, optional
        As in `streamed_pagerank`.
    groups : BoolTensor (B, G, Q)

    Returns
    -------
    Tensor (B, G, Q), float32
        0 from a group that is empty.
    """
    weights = groups / groups.sum(dim=2, keepdim=True).clamp(min=1)
    pushed = attention_push(query, key, scaling, weights[:, None], sight, block)
    return pushed[..., _current(query, key, known)].mean(dim=1)


def _current(query: torch.Tensor, key: torch.Tensor, known: int | None) -> slice:
    """Where the keys of the queries are."""
    end = key.shape[2] if known is None else min(known, key.shape[2])
    return slice(end - query.shape[2], end)


def _logits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scaled logits (B, H, R, M) in float32, keys shared by groups of query heads without being copied."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    # Scaled before the product: half precision would overflow in the product first.
    grouped = (query * scaling).reshape(batch, key.shape[1], groups * rows, width)
    return (grouped @ key.transpose(2, 3)).float().reshape(batch, heads, rows, key.shape[2])
