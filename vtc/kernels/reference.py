"""Naive PyTorch implementations of the shared operations: their specification, the tests' oracle and a baseline.

Functions named like an operation have its signature. The others define a score on the attention matrix itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .visibility import VisibilityMask


def attention(query: Tensor, key: Tensor, scaling: float, mask: VisibilityMask | Tensor | None = None) -> Tensor:
    """Return the attention matrix (..., H, Q, M) float32; the row of a query without any key is zero."""
    if isinstance(mask, VisibilityMask):
        mask = mask(slice(None), key.shape[-2])
    matrix = logits(query, key, scaling, mask).softmax(dim=-1)
    if mask is None:
        return matrix
    empty = ~mask.any(dim=-1, keepdim=True)
    return matrix.masked_fill(empty, 0.0) if bool(empty.any()) else matrix


def logits(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Return the argument of the softmax, (..., H, Q, M) float32, minus infinity where masked."""
    shared = query.shape[-3] // key.shape[-3]
    products = query.float() @ key.float().repeat_interleave(shared, dim=-3).transpose(-1, -2) * scaling
    return products if mask is None else products.masked_fill(~mask, -torch.inf)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: VisibilityMask | Tensor | None = None,
    *,
    reduce: str = "none",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Specify `vtc.kernels.attention_rows`."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        own = [attention(query[[s]], key[:, :, bounds[s] : bounds[s + 1]], scaling) for s in range(len(query))]
        matrix = torch.cat(own, dim=-1)
    else:
        matrix = attention(query, key, scaling, mask)
    if reduce == "none":
        return matrix
    if reduce == "rms":
        return matrix.square().mean(dim=-3).sqrt()
    reduced: Tensor = matrix.amax(dim=-3) if reduce == "max" else getattr(matrix, reduce)(dim=-3)
    return reduced


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    weights: Tensor,
    mask: VisibilityMask | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Specify `vtc.kernels.attention_column_sums`."""
    if cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(query.shape[2], device=query.device), cu_seqlens[1:], right=True)
        mask = (sequence[:, None] == sequence)[None, None]
    return weights @ attention(query, key, scaling, mask)


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
    """Specify `vtc.kernels.pagerank`."""
    walk = attention(query, key, scaling / temperature, mask)
    end = key.shape[2] if known is None else known
    here = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if exists is None else exists
    start = (here / here.sum(dim=-1, keepdim=True).clamp(min=1))[:, None].expand(-1, query.shape[1], -1)
    weight = _walked(walk[..., end - query.shape[2] : end], start, iterations, damping)
    return weight.square().mean(dim=1).sqrt()


def _walked(walk: Tensor, start: Tensor, iterations: int, damping: float) -> Tensor:
    """Return the weight (B, H, N) after the steps of a walk from `start` along `walk` (B, H, N, N)."""
    weight = start
    for _ in range(iterations):
        weight = (weight[:, :, None] @ walk)[:, :, 0] * (1 - damping) + damping * start
    return weight


def pagerank_of_logits(logits: Tensor, temperature: float = 0.1, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """Compute the importance of tokens by a random walk along sharpened attention (AIM, arXiv 2412.03248, as released).

    All queries start with the same weight, which moves along ``softmax(logits / temperature)``; in every step a
    fraction `damping` of it is redistributed evenly. Queries without any key are padding, which has no weight.

    Parameters
    ----------
    logits
        (B, H, N, N); masked entries are the lowest value of the dtype or minus infinity.

    Returns
    -------
    Tensor
        (B, N) float32: root mean square of the weights over the heads.
    """
    logits = logits.float()
    visible = logits > torch.finfo(torch.float32).min / 2
    exists = visible.any(dim=-1)  # (B, H, N)
    walk = (logits / temperature).masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(nan=0.0)
    start = exists / exists.sum(dim=-1, keepdim=True).clamp(min=1)
    return _walked(walk, start, iterations, damping).square().mean(dim=1).sqrt()


def context_relevance_of(attention: Tensor, t: float, reduction: str = "mean") -> Tensor:
    """Compute the attention that every token receives from the context set (VFlowOpt, arXiv 2508.05211, section 3).

    The context set holds the tokens that receive more than `t` times the average attention, or all if there are none.

    Parameters
    ----------
    attention
        (..., N, N): attention averaged over heads; rows are queries.
    t
        Threshold of the context set.
    reduction
        "mean" over the rows of the set, as released, or their "sum", as in the paper.

    Returns
    -------
    Tensor
        (..., N) float32.
    """
    attention = attention.float()
    member = context_set(attention.mean(dim=-2), t)
    relevance = (attention * member[..., :, None]).sum(dim=-2)
    return relevance / member.sum(dim=-1, keepdim=True) if reduction == "mean" else relevance


def context_set(received: Tensor, t: float) -> Tensor:
    """Return the tokens (..., N) bool that receive more than `t` times the average attention, all if there are none."""
    member = received > t * received.mean(dim=-1, keepdim=True)
    return member | ~member.any(dim=-1, keepdim=True)


def patch_entropy(
    pixels: Tensor, mean: Tensor | None = None, std: Tensor | None = None, *, size: tuple[int, int] | None = None
) -> Tensor:
    """Specify `vtc.kernels.patch_entropy`."""
    if size is not None:
        patches = torch.nn.functional.unfold(pixels.float().flatten(0, -4), size, stride=size).transpose(1, 2)
        entropy = patch_entropy(patches.unflatten(2, (pixels.shape[-3], -1)), mean, std)
        return entropy.view(*pixels.shape[:-3], -1)
    pixels = pixels.float()
    if mean is None or std is None:
        levels = (pixels * 255).trunc()
    else:
        levels = ((pixels * std[:, None] + mean[:, None]) * 255).round()
    grey = (levels.clamp(0, 255) * (0.3333 * 3 / pixels.shape[-2])).sum(dim=-2).round().clamp(0, 255)
    bins = torch.arange(256, device=grey.device)
    share = (grey[..., None, :] == bins[:, None]).sum(dim=-1) / grey.shape[-1]
    return -(share * (share + 1e-10).log2()).sum(dim=-1)


def temporal_similarity(x: Tensor, earlier: Tensor) -> Tensor:
    """Specify `vtc.kernels.temporal_similarity`."""
    x = x.float()
    unit = torch.nn.functional.normalize(x, dim=1, eps=1e-12)
    similarity = (unit * unit[earlier]).sum(dim=1).clamp(-1, 1)
    return similarity.where((x != x[earlier]).any(dim=1), 1.0).where(earlier >= 0, 0.0)


def attention_exchange(attention: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """Compute the share of attention from text to visual tokens and back (ToDRE, arXiv 2505.18757).

    Parameters
    ----------
    attention
        (H, N, N): attention probabilities, rows are queries.
    text, visual
        (N,) bool, or indices.

    Returns
    -------
    Tensor
        (2,) float32: text to vision, vision to text; 0 for an empty group.
    """
    mean = attention.float().mean(dim=0)
    return torch.stack([_share(mean[text].sum(dim=0), visual), _share(mean[visual].sum(dim=0), text)])


def _share(mass: Tensor, part: Tensor) -> Tensor:
    """Return the fraction of `mass` (N,) that lies in `part`; 0 if the total is 0."""
    return mass[part].sum() / mass.sum().clamp(min=torch.finfo(torch.float32).tiny)


def cosines(x: Tensor) -> Tensor:
    """Return the cosines (N, N) float32 between the rows of `x` (N, D); 0 for zero rows."""
    unit = torch.nn.functional.normalize(x.float(), dim=1, eps=1e-12)
    return unit @ unit.T


def farthest_point(x: Tensor, k: int, first: int | Tensor | None = None) -> Tensor:
    """Pick (min(k, N),) long: in every step the row whose similarity to its nearest pick is lowest.

    Starts at `first`, or at the row least similar to its nearest neighbour.
    """
    similarity = cosines(x)
    if first is None and x.shape[0]:
        others = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
        first = int(similarity.masked_fill(others, -torch.inf).amax(dim=1).argmin())
    near = torch.full_like(similarity[:, :1].flatten(), -torch.inf)
    picks: list[int] = []
    while len(picks) < min(k, x.shape[0]):
        picks.append(int(near.argmin()) if picks else range(x.shape[0])[int(first or 0)])
        near = torch.maximum(near, similarity[picks[-1]])
        near[picks[-1]] = torch.inf
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def relevant_farthest_point(x: Tensor, k: int, bonus: Tensor) -> Tensor:
    """Pick (min(k, N),) long: from the largest bonus on, in every step the row with the largest bonus and distance."""
    distance = 1 - cosines(x)
    near = torch.full_like(distance[:, :1].flatten(), torch.inf)
    picks: list[int] = []
    while len(picks) < min(k, x.shape[0]):
        picks.append(int((near + bonus if picks else bonus).argmax()))
        near = torch.minimum(near, distance[picks[-1]])
        near[picks[-1]] = -torch.inf
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def max_sum(x: Tensor, k: int, first: int | Tensor) -> Tensor:
    """Pick (min(k, N),) long: after `first`, in every step the row with the lowest sum of similarities to the picks."""
    similarity = cosines(x)
    total = torch.zeros_like(similarity[:, :1].flatten())
    picks: list[int] = []
    while len(picks) < min(k, x.shape[0]):
        picks.append(int(total.argmin()) if picks else range(x.shape[0])[int(first)])
        total = total + similarity[picks[-1]]
        total[picks[-1]] = torch.inf
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def dpp_greedy(
    x: Tensor, k: int, relevance: Tensor | None = None, places: Tensor | None = None, ridge: float = 0.0
) -> Tensor:
    """Pick (min(k, N),) long: in every step the row that most increases det(relevance * cosine * relevance).

    With `places` the cosine is multiplied by a Gaussian of their distance. The gain of a row is the part of its
    diagonal entry that the picks do not explain: an incremental Cholesky factorisation. Below 1e-5 of the largest entry
    the gain is rounding; then the most relevant rows follow.
    """
    n = x.shape[0]
    weight = torch.ones_like(x[:, 0], dtype=torch.float32) if relevance is None else relevance.float()
    kernel = weight[:, None] * cosines(x) * weight
    if places is not None:
        kernel *= (-(places[:, None].float() - places.float()).square().sum(dim=-1) / 2).exp()
    left = torch.where(x.float().norm(dim=1) > 1e-12, weight, 0.0).square() + ridge * weight.square()
    least = 1e-5 * left.max() if n else 0.0
    factor = kernel.new_zeros(min(k, n), n)
    picks: list[int] = []
    while len(picks) < min(k, n):
        step, best = len(picks), int(left.argmax())
        if not bool(left[best] > least):
            rest = weight.index_fill(0, torch.tensor(picks, dtype=torch.long, device=x.device), -torch.inf)
            ranked = rest.sort(descending=True, stable=True).indices
            picks += ranked[: min(k, n) - step].tolist()
            break
        factor[step] = (kernel[best] - factor[:step, best] @ factor[:step]) / left[best].sqrt()
        picks.append(best)
        left = left - factor[step].square()
        left[best] = -torch.inf
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def coverage_greedy(x: Tensor, k: int, weight: Tensor | None = None, combine: str = "multiply") -> Tensor:
    """Pick (min(k, N),) long: in every step the row with the largest gain of the coverage of all rows.

    The coverage of a row is its similarity to the nearest pick, at least 0; its weight is a factor of the gain, or a
    summand.
    """
    similarity = cosines(x)
    covered = torch.zeros_like(similarity[:, :1].flatten())
    picked = torch.zeros_like(covered, dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < min(k, x.shape[0]):
        score = (similarity - covered[:, None]).clamp(min=0).sum(dim=0)
        if weight is not None:
            score = score * weight if combine == "multiply" else score + weight
        picks.append(int(score.masked_fill_(picked, -torch.inf).argmax()))
        picked[picks[-1]] = True
        covered = torch.maximum(covered, similarity[:, picks[-1]])
    return torch.tensor(picks, dtype=torch.long, device=x.device)


def weighted_coverage(x: Tensor, k: int, demand: Tensor) -> Tensor:
    """Pick (min(k, N),) long: greedy facility location, rows of `demand`, similarity from 0 to 1."""
    return _covering(demand[:, None] * (1 + cosines(x)) / 2, k)


def multimodal_coverage(
    x: Tensor, k: int, text: Tensor, metric: Tensor, alpha: float, text_temperature: float, temperature: float
) -> Tensor:
    """Pick (min(k, N),) long: greedy coverage of what text and tokens look for, each a softmax over the tokens."""
    unit = torch.nn.functional.normalize
    looks = unit(text.float(), dim=1, eps=1e-12) @ unit(x.float(), dim=1, eps=1e-12).T / text_temperature
    parts = [looks.softmax(dim=1) / max(1, len(text)), alpha * (cosines(metric) / temperature).softmax(dim=1) / len(x)]
    return _covering(torch.cat(parts), k)


def _covering(table: Tensor, k: int) -> Tensor:
    """Pick (min(k, N),) long: in every step the column of `table` (M, N) that raises the maxima of its rows most."""
    covered = torch.zeros_like(table[:, 0])
    picked = torch.zeros_like(table[0], dtype=torch.bool)
    picks: list[int] = []
    while len(picks) < min(k, table.shape[1]):
        gain = (table - covered[:, None]).clamp(min=0).sum(dim=0)
        picks.append(int(gain.masked_fill_(picked, -torch.inf).argmax()))
        picked[picks[-1]] = True
        covered = torch.maximum(covered, table[:, picks[-1]])
    return torch.tensor(picks, dtype=torch.long, device=table.device)


def bipartite_merge(metric: Tensor, r: int, order: str = "original", first: int = 0) -> tuple[Tensor, Tensor]:
    """Return the anchor tokens (B, N - r) of the slots and the slots (B, N) of the tokens, row by row.

    The `r` sources, every second token from `first` on, most similar to any other token are merged into that token.
    """
    batch, n = metric.shape[:2]
    r = max(0, min(r, n // 2))
    anchors, assign = [], []
    for row in metric:
        similarity = cosines(row)[first::2, 1 - first :: 2]
        best = similarity.amax(dim=1) if n > 1 else similarity.new_zeros(len(similarity))
        ranked = (first + 2 * best.sort(descending=True, stable=True).indices).tolist()
        staying = ranked[r:] + list(range(1 - first, n, 2))
        if order == "original" or r == 0:
            staying.sort()
        slot = {token: place for place, token in enumerate(staying)}
        into = {token: 2 * int(similarity[token // 2].argmax()) + 1 - first for token in ranked[:r]}
        anchors.append(staying)
        assign.append([slot[into.get(token, token)] for token in range(n)])
    anchor = torch.tensor(anchors, dtype=torch.long, device=metric.device).view(batch, n - r)
    return anchor, torch.tensor(assign, dtype=torch.long, device=metric.device).view(batch, n)


def nearest_slots(metric: Tensor, keep: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return (N,) long: for every token the place in `keep` of itself or of the most similar of the `targets`."""
    targets = keep if targets is None else targets
    nearest = targets[cosines(metric)[:, targets].argmax(dim=1)] if len(targets) else torch.full_like(metric[:, 0], -1)
    here = torch.arange(len(metric), device=keep.device)
    into = torch.where(torch.isin(here, keep), here, nearest.long())
    return torch.searchsorted(keep, into).masked_fill(into < 0, -1)


def density_peaks(x: Tensor, group: Tensor, neighbours: int) -> Tensor:
    """Return (N,) float32: log of density times separation, group by group, from the matrix of distances."""
    scores = x.new_full((len(x),), -torch.inf, dtype=torch.float32)
    for one in group[group >= 0].unique():
        mine = (group == one).nonzero()[:, 0]
        wide = x[mine].double()
        distance = (wide[:, None] - wide).square().sum(dim=2).sqrt() / x.shape[1] ** 0.5
        near = distance.sort(dim=1).values[:, :neighbours]
        density = (-near.square().mean(dim=1)).exp()
        at = torch.arange(len(mine), device=x.device)
        denser = (density > density[:, None]) | ((density == density[:, None]) & (at < at[:, None]))
        separation = torch.where(denser, distance, distance.max()).amin(dim=1)
        scores[mine] = (density * separation).log().float()
    return scores


def density_clusters(x: Tensor, group: Tensor, counts: Tensor, neighbours: int) -> Tensor:
    """Return (N,) long: the centre that every token is nearest to, of the `counts` with the highest scores a group."""
    scores, joined = density_peaks(x, group, neighbours), torch.full_like(group, -1)
    for one, count in enumerate(counts.tolist()):
        mine = (group == one).nonzero()[:, 0]
        centres = mine[scores[mine].sort(descending=True, stable=True).indices[:count]].sort().values
        if count:
            joined[mine] = centres[torch.cdist(x[mine].double(), x[centres].double()).argmin(dim=1)]
            joined[centres] = centres
    return joined


def nearest_in_group(x: Tensor, group: Tensor, targets: Tensor, metric: str = "cosine") -> Tensor:
    """Return (N,) long: for every token the place of the closest of the `targets` in its group; -1 without any."""
    if not len(targets):
        return torch.full_like(group, -1)
    closeness = cosines(x)[:, targets] if metric == "cosine" else -torch.cdist(x.double(), x[targets].double())
    closeness = closeness.masked_fill((group[:, None] != group[targets]) | (group[:, None] < 0), -torch.inf)
    return closeness.argmax(dim=1).masked_fill(closeness.amax(dim=1) == -torch.inf, -1)


def segment_merge(x: Tensor, slot: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Return (K, ...): for every slot the weighted sum of the rows of `x` (N, ...) assigned to it."""
    wide = x if x.dtype == torch.float64 else x.float()
    share = torch.ones_like(slot, dtype=wide.dtype) if weight is None else weight.to(wide.dtype)
    assigned = torch.arange(count, device=slot.device)[:, None] == slot
    return torch.tensordot(assigned * share, wide, dims=1).to(x.dtype)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Return (min(k, N),) long, ascending: the first `k` of a stable descending sort."""
    return (
        scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        .sort(descending=True, stable=True)
        .indices[: max(k, 0)]
        .sort()
        .values
    )


def select_gather(
    keep: Tensor,
    planes: Sequence[Tensor] = (),
    axes: Sequence[int] = (),
    *,
    scores: Tensor | None = None,
    columns: Tensor | None = None,
    offsets: Tensor | None = None,
    counts: Tensor | None = None,
    threshold: float | None = None,
    marks: Tensor | None = None,
    marked: Sequence[Tensor] = (),
    side: str = "left",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return index, mask, lengths, planes and marked planes of the packed batch, computed row by row."""
    keep = keep.clone()
    if scores is not None and columns is not None and offsets is not None:
        for segment in range(len(offsets) - 1):
            part = slice(int(offsets[segment]), int(offsets[segment + 1]))
            if counts is not None:
                chosen = topk_indices(scores[part], int(counts[segment]))
            else:
                chosen = (scores[part] >= threshold).nonzero()[:, 0]  # type: ignore[operator]
            keep.view(-1)[columns[part][chosen]] = True
    lengths = keep.sum(dim=1)
    width = int(lengths.max()) if len(keep) else 0
    index, mask = [], []
    for row in keep:
        kept, dropped = row.nonzero()[:, 0], (~row).nonzero()[:, 0]
        padding = width - len(kept)
        left = side == "left"
        filling = dropped[len(dropped) - padding :] if left else dropped[:padding]
        index.append(torch.cat([filling, kept] if left else [kept, filling]))
        real = torch.ones_like(index[-1], dtype=torch.bool)
        real[slice(padding) if left else slice(width - padding, None)] = False
        mask.append(real)
    packed = []
    for plane, axis in zip(planes, axes, strict=True):
        rows = [plane.select(axis - 1, row if plane.shape[axis - 1] > 1 else 0) for row in range(len(keep))]
        taken = [part.index_select(axis - 1, index[row]) for row, part in enumerate(rows)]
        packed.append(torch.stack(taken, dim=axis - 1))
    rest = [] if marks is None else [plane[keep[marks]] for plane in marked]
    return torch.stack(index), torch.stack(mask), lengths, packed, rest
