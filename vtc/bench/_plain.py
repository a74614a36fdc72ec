"""What users write today for each operation of `vtc.kernels`, in plain PyTorch: what the benchmark compares with.

Written to be what one finds in the released code of methods, without their accidents: whole matrices where they make
whole matrices, loops where they loop. Where a cheaper plain way is just as natural (a running minimum instead of the
minimum over all rows picked so far), it is the cheaper one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "attention_received",
    "attention_rows",
    "bipartite_merge",
    "coverage_greedy",
    "dpp_greedy",
    "farthest_point",
    "max_sum",
    "pagerank",
    "patch_entropy",
    "segment_merge",
    "select_gather",
    "temporal_similarity",
    "topk_sorted",
]


def eager_attention(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """(B, H, Q, M): what `output_attentions=True` returns for one layer, softmax in float32 as transformers does."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        logits = logits + mask
    return logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)


def attention_rows(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """(N,): row 0 of all layers' matrices, mean over heads, summed over layers; all matrices are returned first."""
    attentions = [eager_attention(query, key, scaling) for query, key in zip(queries, keys, strict=True)]
    return torch.stack([attention[0, :, 0].float().mean(dim=0) for attention in attentions]).sum(dim=0)


def attention_received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """(B, H, M): mean over the queries of the matrix."""
    return eager_attention(query, key, scaling).mean(dim=2, dtype=torch.float32)


def pagerank(query: Tensor, key: Tensor, scaling: float, temperature: float, iterations: int) -> Tensor:
    """(B, N): the causal matrix once, then one product with it per step."""
    n = query.shape[2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    mask = torch.zeros(n, n, device=query.device, dtype=query.dtype).masked_fill(hidden, -torch.inf)
    walk = eager_attention(query, key, scaling / temperature, mask).float()
    weight = walk.new_full((*walk.shape[:2], 1, n), 1 / n)
    for _ in range(iterations):
        weight = weight @ walk
    return weight[:, :, 0].square().mean(dim=1).sqrt()


def cosines(x: Tensor) -> Tensor:
    """(N, N)."""
    unit = F.normalize(x, dim=-1)
    return unit @ unit.T


def farthest_point(x: Tensor, k: int, first: int | None) -> Tensor:
    """(k,): from the whole matrix of distances, which the first pick needs sorted along one axis."""
    distance = 1 - cosines(x)
    # The smallest distance of a token is the one to itself.
    pick = int(distance.topk(2, dim=0, largest=False).values[1].argmax()) if first is None else first
    nearest = distance[pick].clone()
    picks = [pick]
    for _ in range(k - 1):
        nearest[pick] = -1
        pick = int(nearest.argmax())
        picks.append(pick)
        nearest = torch.minimum(nearest, distance[pick])
    return torch.tensor(picks, device=x.device)


def max_sum(x: Tensor, k: int, first: int) -> Tensor:
    """(k,): from the whole matrix of cosines."""
    similarity = cosines(x)
    picks = [first]
    total = similarity[first].clone()
    for _ in range(k - 1):
        total[picks[-1]] = torch.inf
        picks.append(int(total.argmin()))
        total = total + similarity[picks[-1]]
    return torch.tensor(picks, device=x.device)


def dpp_greedy(x: Tensor, k: int, relevance: Tensor) -> Tensor:
    """(k,): from the whole kernel of the process, with one row of its Cholesky factor per pick."""
    kernel = relevance[:, None] * cosines(x) * relevance
    left = kernel.diagonal().clone()
    factor = x.new_zeros(k, len(x))
    picks: list[int] = []
    for step in range(k):
        pick = int(left.argmax())
        factor[step] = (kernel[pick] - factor[:step, pick] @ factor[:step]) / left[pick].sqrt()
        left = left - factor[step].square()
        left[pick] = -torch.inf
        picks.append(pick)
    return torch.tensor(picks, device=x.device)


def coverage_greedy(x: Tensor, k: int) -> Tensor:
    """(k,): from the whole matrix of cosines, which every pick goes through once."""
    similarity = cosines(x)
    covered = x.new_zeros(len(x))
    chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    picks: list[int] = []
    for _ in range(k):
        gain = (similarity - covered).clamp(min=0).sum(dim=1).masked_fill(chosen, -torch.inf)
        pick = int(gain.argmax())
        picks.append(pick)
        chosen[pick] = True
        covered = torch.maximum(covered, similarity[pick])
    return torch.tensor(picks, device=x.device)


def bipartite_merge(x: Tensor, r: int) -> Tensor:
    """(N - r, D): ToMe's matching with the whole matrix of cosines, and the mean of what flows together."""
    unit = F.normalize(x, dim=-1)
    best, partner = (unit[::2] @ unit[1::2].T).max(dim=-1)
    order = best.argsort(descending=True)
    merged, staying = order[:r], order[r:]
    sources, targets = x[::2], x[1::2]
    targets = targets.scatter_reduce(0, partner[merged, None].expand(-1, x.shape[1]), sources[merged], "mean")
    return torch.cat([sources[staying], targets])


def patch_entropy(patches: Tensor) -> Tensor:
    """(n,): `torch.histc` patch by patch."""
    entropies = []
    for patch in patches:
        grey = ((patch * 255).trunc() * 0.3333).sum(dim=0).round()
        share = torch.histc(grey, bins=256, min=0, max=256) / grey.numel()
        entropies.append(-(share * (share + 1e-10).log2()).sum())
    return torch.stack(entropies)


def segment_merge(x: Tensor, slot: Tensor, count: int) -> Tensor:
    """(count, D): the mean of the rows of each slot by `scatter_reduce`, as merging methods write it."""
    where = slot[:, None].expand(-1, x.shape[1])
    return x.new_zeros(count, x.shape[1]).scatter_reduce(0, where, x, "mean", include_self=False)


def select_gather(
    scores: Tensor, k: int, start: int, embeddings: Tensor, positions: Tensor, mask: Tensor, plane: Tensor
) -> tuple[Tensor, ...]:
    """Embeddings, positions and mask of one row, and one deepstack plane, at the best `k` tokens and all text."""
    best = scores.topk(k).indices.sort().values
    before = torch.arange(start, device=scores.device)
    after = torch.arange(start + len(scores), embeddings.shape[1], device=scores.device)
    index = torch.cat([before, best + start, after])
    return embeddings[:, index], positions[..., index], mask[:, index], plane[best]


def temporal_similarity(x: Tensor, frame: int) -> Tensor:
    """(N,): of every token to the one a frame earlier, 0 in the first frame."""
    x = x.float()
    return torch.cat([x.new_zeros(frame), F.cosine_similarity(x[frame:], x[:-frame], dim=-1)])


def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """(k,): the best, in the order of the tokens."""
    return scores.topk(k).indices.sort().values
