"""Methods as a reader of their papers would write them: whole matrices, loops over picks, frames and clusters.

`vtc bench selectors` compares the methods with these in time and memory, and the tests in what they choose. Each takes
a selector, for its options, and a context with a budget below N, and returns the kept tokens in ascending order, and
their features if it merges. Where the equations say nothing about a budget, it keeps no token.

All compute in float32. On large inputs VisPruner's lists, in which rounding decides what stands beside what, agree with
the method in float64 only.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.bench._transcribing import Choice, Transcription, as_choice, best_of, feature_attention
from vtc.bench._video_transcriptions import VIDEO_TRANSCRIPTIONS
from vtc.budget import largest_remainder
from vtc.core.context import VisualContext
from vtc.core.signals import ClsAttention, MeanKeys, Origin, PreProjector, ReceivedAttention, TextEmbeds, VisionKeys
from vtc.kernels import reference
from vtc.selectors.prumerge import WideClsAttention
from vtc.selectors.vflowopt import ContextRelevance, PixelEntropy
from vtc.selectors.vtc import Place

__all__ = ["TRANSCRIPTIONS"]


def _range(values: Tensor) -> Tensor:
    return (values - values.min() + 1e-6) / (values.max() - values.min())


def _relevance(ctx: VisualContext) -> Tensor:
    text, x = F.normalize(ctx[TextEmbeds].float(), dim=1), F.normalize(ctx.features.float(), dim=1)
    return (text @ x.T).mean(dim=0)


# -- attention -------------------------------------------------------------------------------------------------------


def vtc_cls(_: Any, ctx: VisualContext) -> Choice:
    """Sum of the layers."""
    return as_choice(best_of(ctx[ClsAttention].float().mean(dim=1).sum(dim=0), ctx.budget))


def fastervlm(selector: Any, ctx: VisualContext) -> Choice:
    """The best of the feature layer."""
    return as_choice(best_of(feature_attention(selector, ctx), ctx.budget))


def visionzip(selector: Any, ctx: VisualContext) -> Choice:
    """The best, and an even spread of the others with what resembles them."""
    context = round(ctx.budget * selector.contextual)
    dominant = best_of(feature_attention(selector, ctx), ctx.budget - context)
    rest = torch.ones(ctx.n, dtype=torch.bool).index_fill(0, dominant, False).nonzero()[:, 0]
    targets = rest[:: max(1, len(rest) // max(1, context))][:context]
    others = rest[~torch.isin(rest, targets)]
    unit, x = F.normalize(ctx[MeanKeys].float(), dim=1), ctx.features.float()
    nearest = (unit[others] @ unit[targets].T).argmax(dim=1)
    keep = torch.cat([dominant, targets]).sort().values
    merged = x[keep]
    for number, target in enumerate(targets.tolist()):
        mine = others[nearest == number]
        if len(mine):
            merged[keep == target] += x[mine].mean(dim=0)
    return keep, merged


def vispruner(selector: Any, ctx: VisualContext) -> Choice:
    """The best, and of the others lists that get shorter by eight close relatives at a time."""
    ranked = best_of(feature_attention(selector, ctx), ctx.n)
    important = int(ctx.budget * selector.important_ratio)
    unit, listed = F.normalize(ctx[PreProjector].float(), dim=1), ranked[important:]
    while len(listed) > ctx.budget - important:
        closest = (unit[listed[::2]] @ unit[listed[1::2]].T).amax(dim=1)
        drop = min(8, len(listed) - (ctx.budget - important))
        listed = torch.cat([listed[::2][best_of(closest, len(closest))[drop:]], listed[1::2]])
    return as_choice(torch.cat([ranked[:important], listed]))


def holov(selector: Any, ctx: VisualContext) -> Choice:
    """A share for every crop, in it the best."""
    attention, x = feature_attention(selector, ctx), ctx[PreProjector].float()
    crops = torch.arange(ctx.n).tensor_split(selector.crops)
    worth = []
    for crop in crops:
        unit, n = x[crop] / (x[crop].norm(dim=1, keepdim=True) + 1e-6), len(crop)
        similarity = (unit @ unit.T).fill_diagonal_(0)
        centred = similarity - similarity.sum(dim=1, keepdim=True) / (n - 1)
        variance, scaled = centred.square().sum(dim=1) / (n - 1), 1000 * attention[crop]
        worth.append((scaled + selector.diversity * variance * scaled.mean() / (variance.mean() + 1e-6)).mean())
    weight = torch.stack(worth) / (sum(worth) + 1e-6)
    shares = [min(int(part), len(crop)) for part, crop in zip((weight * ctx.budget).tolist(), crops, strict=True)]
    for crop in itertools.cycle(best_of(weight, len(crops)).tolist()):
        if sum(shares) == ctx.budget:
            break
        shares[crop] += shares[crop] < len(crops[crop])
    return as_choice(torch.cat([crop[best_of(attention[crop], k)] for crop, k in zip(crops, shares, strict=True)]))


def hiprune(selector: Any, ctx: VisualContext) -> Choice:
    """Anchors of the middle layer with their neighbours, then the best of the last."""
    middle, end = ctx[ReceivedAttention].float().mean(dim=1)[[0, -1]]
    places = {tuple(place): token for token, place in enumerate(ctx[Origin][:, :4].tolist())}
    chosen: dict[int, None] = {}
    for anchor in best_of(middle, round(ctx.budget * selector.alpha / 5)).tolist():
        view, frame, row, column = ctx[Origin][anchor, :4].tolist()
        around = ((row, column), (row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column))
        found = (places.get((view, frame, *place)) for place in around)
        chosen |= {token: None for token in found if token is not None}
    first = torch.tensor(list(chosen)[: ctx.budget], dtype=torch.long)
    return as_choice(torch.cat([first, best_of(end.index_fill(0, first, -torch.inf), ctx.budget - len(first))]))


def prumerge(selector: Any, ctx: VisualContext) -> Choice:
    """The centres that the selector names, each with its neighbours, and one token of the rest."""
    attention, x = ctx[WideClsAttention].float(), ctx.features.float()
    centres = selector.centres(attention, ctx.budget - 1).nonzero()[:, 0]
    rest = torch.ones(ctx.n, dtype=torch.bool).index_fill(0, centres, False).nonzero()[:, 0]
    similarity = reference.cosines(ctx[VisionKeys]).fill_diagonal_(-torch.inf)
    merged = {int(rest[attention[rest].argmax()]): attention[rest] @ x[rest]}
    for centre in centres.tolist():
        near = best_of(similarity[centre], selector.neighbours)
        merged[centre] = x[centre] + attention[near] @ x[near]
    keep = sorted(merged)
    return torch.tensor(keep), torch.stack([merged[token] for token in keep])


def vscan(selector: Any, ctx: VisualContext) -> Choice:
    """Half of the best of every window, half of the best of all; the rest averaged into the most similar."""
    layers, half = ctx[ClsAttention].float().mean(dim=1), ctx.budget // 2
    windows: dict[tuple[int, ...], list[int]] = {}
    for token, (view, frame, row, column) in enumerate(ctx.coords().tolist()):
        _, high, wide = ctx.grids[view]
        edges = [(place, size, max(1, size // 4)) for place, size in ((row, high), (column, wide))]
        across = [min(place // edge, size // edge - 1) for place, size, edge in edges]
        windows.setdefault((view, frame, *across), []).append(token)
    offered = []
    for tokens in windows.values():
        window = torch.tensor(tokens)
        offered.append(window[best_of(layers[0][window], -(-half // len(windows)))])
    local = torch.cat(offered).sort().values
    local = local[best_of(layers[0][local], half)]
    others = best_of(layers[-1].index_fill(0, local, -torch.inf), ctx.budget - len(local))
    keep = torch.cat([local, others]).sort().values
    x = ctx.features.float()
    unit = F.normalize(x, dim=1)
    nearest = (unit @ unit[keep].T).argmax(dim=1)
    nearest[keep] = torch.arange(len(keep))
    return keep, torch.stack([x[nearest == slot].mean(dim=0) for slot in range(len(keep))])


def aim(selector: Any, ctx: VisualContext) -> Choice:
    """In every picture even tokens flow into odd ones, at most half of them per round."""
    by_keys = selector.metric == "keys" or (selector.metric == "released" and ctx.modality == "image")
    metric, x = (ctx[VisionKeys] if by_keys else ctx.features).float(), ctx.features.float()
    both = torch.cat([metric, x], dim=1)  # what is merged is merged in both
    sizes = [h * w for t, h, w in ctx.grids for _ in range(t)]
    keep, merged = [], []
    tokens = torch.arange(ctx.n).split(sizes)
    for at, target in zip(tokens, largest_remainder(ctx.budget, sizes), strict=True):
        y = both[at]
        while target and len(y) > target:
            r, unit = min(len(y) - target, len(y) // 2), F.normalize(y[:, : metric.shape[1]], dim=1)
            closest, partner = (unit[::2] @ unit[1::2].T).max(dim=1)
            ranked = best_of(closest, len(closest))
            total, count = y[1::2].clone(), torch.ones(len(y) // 2)
            for source in ranked[:r].tolist():
                total[partner[source]] += y[2 * source]
                count[partner[source]] += 1
            y = torch.cat([y[::2][ranked[r:]], total / count[:, None]])
            at = torch.cat([at[::2][ranked[r:]], at[1::2]])
        if target:
            keep.append(at.sort().values)
            merged.append(y[at.argsort(), metric.shape[1] :])
    return torch.cat(keep), torch.cat(merged)


def vflowopt(selector: Any, ctx: VisualContext) -> Choice:
    """The most important, and of the others one for every cell of the picture, weighted by importance."""
    scores, x = ctx[ContextRelevance].float(), ctx.features.float()
    if selector.alpha:
        scores = scores + selector.alpha * ctx[PixelEntropy].float()
    lowest = best_of(scores, ctx.n).flip(0)
    cells: dict[tuple[int, ...], list[int]] = {}
    places, left = ctx.coords().tolist(), ctx.n
    for token in lowest.tolist():
        view, frame, row, column = places[token]
        cell = (view, frame, int(row / selector.cell), int(column / selector.cell))
        left += (cell not in cells) - 1
        cells.setdefault(cell, []).append(token)
        if left <= ctx.budget:
            break
    if left > ctx.budget:
        return as_choice(best_of(scores, ctx.budget))
    low = {token for tokens in cells.values() for token in tokens}
    found = {token: x[token] for token in range(ctx.n) if token not in low}
    for tokens in cells.values():
        share = scores[tokens] / scores[tokens].sum()
        found[max(tokens, key=lambda token: (float(scores[token]), -token))] = share @ x[tokens]
    keep = sorted(found)
    return torch.tensor(keep), torch.stack([found[token] for token in keep])


# -- diversity and coverage ------------------------------------------------------------------------------------------


def divprune(_: Any, ctx: VisualContext) -> Choice:
    """Farthest points."""
    return as_choice(reference.farthest_point(ctx.features, ctx.budget))


def todre(_: Any, ctx: VisualContext) -> Choice:
    """From the token that [CLS] looks at most, always the one least similar to those chosen, taken together."""
    attention = ctx[ClsAttention][-1].float().mean(dim=0)
    return as_choice(reference.max_sum(ctx.features, ctx.budget, int(attention[: _thumbnail(ctx)].argmax())))


def _thumbnail(ctx: VisualContext) -> int:
    return math.prod(ctx.grids[0]) if len(ctx.grids) == 2 else ctx.n


def cdpruner(selector: Any, ctx: VisualContext) -> Choice:
    """A determinantal point process, weighted by relevance to the text."""
    sign = -1 if selector.similarity == "inverted" else 1
    return as_choice(reference.dpp_greedy(ctx.features, ctx.budget, _range(sign * _relevance(ctx))))


def vtc(selector: Any, ctx: VisualContext) -> Choice:
    """A determinantal point process of features and places; the rest merged into the most similar."""
    if ctx.modality == "image":
        attention = ctx[ClsAttention].float().mean(dim=1).sum(dim=0)
        rank = (attention[:, None] >= attention).sum(dim=1)
        width, weight = 0.5, (rank / ctx.n) ** selector.exponent
    else:
        width, weight = 0.25 / max(1, 8 * ctx.budget / ctx.n), None
    places = ctx[Place].float() / width
    keep = reference.dpp_greedy(ctx.features, ctx.budget, weight, places, 1e-4).sort().values
    nearest, x = reference.cosines(ctx.features)[:, keep].argmax(dim=1), ctx.features.float()
    nearest[keep] = torch.arange(len(keep))
    merged = []
    for slot, token in enumerate(keep.tolist()):
        followers = (nearest == slot).nonzero()[:, 0]
        followers = followers[followers != token]
        total = x[token] + selector.merge_weight * x[followers].sum(dim=0)
        merged.append(total / (1 + selector.merge_weight * len(followers)))
    return keep, torch.stack(merged)


def scope(selector: Any, ctx: VisualContext) -> Choice:
    """Facility location, weighted by attention."""
    weight = ctx[ClsAttention][-1].float().sum(dim=0) ** selector.alpha
    return as_choice(reference.coverage_greedy(ctx[PreProjector], ctx.budget, weight, selector.combine))


def rediprune(selector: Any, ctx: VisualContext) -> Choice:
    """Farthest points with a bonus for relevance."""
    bonus = selector.alpha * _relevance(ctx)
    return as_choice(reference.relevant_farthest_point(ctx.features, ctx.budget, bonus))


def mmtok(selector: Any, ctx: VisualContext) -> Choice:
    """Coverage of what text and tokens look for."""
    options = selector.alpha, selector.text_temperature, selector.temperature
    return as_choice(
        reference.multimodal_coverage(ctx.features, ctx.budget, ctx[TextEmbeds], ctx[PreProjector], *options)
    )


def eadp(selector: Any, ctx: VisualContext) -> Choice:
    """Facility location over rows weighted by smoothed relevance."""
    text, x = F.normalize(ctx[TextEmbeds].float(), dim=1), F.normalize(ctx.features.float(), dim=1)
    similarity = (-1 if selector.similarity == "inverted" else 1) * text @ x.T
    share = (100 * similarity).softmax(dim=1)
    entropy = -(share * share.clamp(min=1e-38).log()).sum(dim=1)
    clear = entropy.sort(stable=True).indices[: max(1, int(selector.words * len(text)))]
    local = (-entropy[clear] / 0.01).softmax(dim=0) @ similarity[clear]
    mixed = _range(selector.alpha * similarity.mean(dim=0) + (1 - selector.alpha) * local)
    edge = torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.5)])
    kernel = torch.outer(edge, edge) / edge.sum() ** 2
    smooth = []
    for (t, h, w), part in zip(ctx.grids, mixed.split([math.prod(grid) for grid in ctx.grids]), strict=True):
        padded = F.pad(part.view(t, 1, h, w), (1, 1, 1, 1), mode="reflect")
        smooth.append(F.conv2d(padded, kernel[None, None]).flatten())
    return as_choice(reference.weighted_coverage(ctx.features, ctx.budget, torch.cat(smooth) ** selector.beta))


def dart(selector: Any, ctx: VisualContext) -> Choice:
    """Pivots, and for each what resembles it least."""
    x, text = ctx.features.float(), ctx[TextEmbeds].float()
    kept = best_of(x.abs().sum(dim=1), selector.image_pivots).tolist()
    pivots = [*x[kept], *text[best_of(text.abs().sum(dim=1), selector.text_pivots)]]
    for turn, pivot in enumerate(pivots):
        share = -(-(ctx.budget - len(kept)) // (len(pivots) - turn))
        likeness = F.cosine_similarity(pivot[None], x, dim=1)
        likeness[kept] = torch.inf
        kept += best_of(-likeness, share).tolist()
    return as_choice(torch.tensor(kept))


TRANSCRIPTIONS: dict[str, Transcription] = {
    "vtc": vtc,
    "vtc-cls": vtc_cls,
    "fastervlm": fastervlm,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "holov": holov,
    "hiprune": hiprune,
    "prumerge": prumerge,
    "prumerge-plus": prumerge,
    "vscan": vscan,
    "aim": aim,
    "vflowopt": vflowopt,
    "divprune": divprune,
    "todre": todre,
    "cdpruner": cdpruner,
    "scope": scope,
    "rediprune": rediprune,
    "mmtok": mmtok,
    "eadp": eadp,
    "dart": dart,
    **VIDEO_TRANSCRIPTIONS,
}
