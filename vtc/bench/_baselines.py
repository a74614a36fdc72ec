"""Baselines that `vtc bench kernels` compares with: PyTorch code as found in the released code of methods.

Where that code is the naive definition, the baseline is the specification itself (`vtc.kernels.reference`, used in
`vtc.bench._ops`), which computes in float32 whatever the dtype of its input. Here are the other ones: code that users
write differently from the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.kernels import reference

__all__ = [
    "attention_rows",
    "bipartite_merge",
    "patch_entropy",
    "segment_merge",
    "select_gather",
    "temporal_similarity",
    "topk_indices",
]


def attention_rows(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return row 0 (N,) of the matrices of all layers, averaged over heads, summed over layers.

    All matrices exist at the same time, as `output_attentions=True` returns them.
    """
    matrices = [reference.attention(query, key, scaling) for query, key in zip(queries, keys, strict=True)]
    return torch.stack([matrix[0, :, 0].mean(dim=0) for matrix in matrices]).sum(dim=0)


def bipartite_merge(x: Tensor, r: int) -> Tensor:
    """Return (N - r, D): the matching of ToMe with the whole matrix of cosines, and the means of the merged rows."""
    unit = F.normalize(x, dim=-1)
    best, partner = (unit[::2] @ unit[1::2].T).max(dim=-1)
    order = best.argsort(descending=True)
    merged, staying = order[:r], order[r:]
    sources, targets = x[::2], x[1::2]
    targets = targets.scatter_reduce(0, partner[merged, None].expand(-1, x.shape[1]), sources[merged], "mean")
    return torch.cat([sources[staying], targets])


def patch_entropy(patches: Tensor) -> Tensor:
    """Return entropies (n,), with `torch.histc` patch by patch."""
    entropies = []
    for patch in patches:
        grey = ((patch * 255).trunc() * 0.3333).sum(dim=0).round()
        share = torch.histc(grey, bins=256, min=0, max=256) / grey.numel()
        entropies.append(-(share * (share + 1e-10).log2()).sum())
    return torch.stack(entropies)


def segment_merge(x: Tensor, slot: Tensor, count: int) -> Tensor:
    """Return the means (count, D) of the rows of every slot, with `scatter_reduce`."""
    index = slot[:, None].expand(-1, x.shape[1])
    return x.new_zeros(count, x.shape[1]).scatter_reduce(0, index, x, "mean", include_self=False)


def select_gather(
    scores: Tensor, k: int, start: int, embeddings: Tensor, positions: Tensor, mask: Tensor, plane: Tensor
) -> tuple[Tensor, ...]:
    """Return embeddings, positions and mask of one row and one deepstack plane at all text and the best `k` tokens."""
    best = topk_indices(scores, k)
    before = torch.arange(start, device=scores.device)
    after = torch.arange(start + len(scores), embeddings.shape[1], device=scores.device)
    index = torch.cat([before, best + start, after])
    return embeddings[:, index], positions[..., index], mask[:, index], plane[best]


def temporal_similarity(x: Tensor, frame: int) -> Tensor:
    """Return the similarities (N,) of all tokens to those of the previous frame, 0 in the first frame."""
    x = x.float()
    return torch.cat([x.new_zeros(frame), F.cosine_similarity(x[frame:], x[:-frame], dim=-1)])


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Return the ascending indices (k,) of the best scores."""
    return scores.topk(k).indices.sort().values
