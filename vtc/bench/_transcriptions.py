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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.budget import largest_remainder
from vtc.core.context import VisualContext
from vtc.core.signals import ClsAttention, MeanKeys, Origin, PreProjector, ReceivedAttention, TextEmbeds, VisionKeys
from vtc.kernels import reference
from vtc.selectors.prumerge import WideClsAttention
from vtc.selectors.prunevid import runs_of
from vtc.selectors.vtc import Place

__all__ = ["TRANSCRIPTIONS", "Choice", "Transcription"]

Choice = tuple[Tensor, Tensor | None]
"""Kept tokens (K,), and their merged features (K, D)."""

Transcription = Callable[[Any, VisualContext], Choice]


def _kept(picks: Tensor) -> Choice:
    return picks.sort().values, None


def _top(scores: Tensor, k: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:k]


def _attention(selector: Any, ctx: VisualContext) -> Tensor:
    """(N,): what the feature layer attends to, averaged over heads."""
    source = ReceivedAttention if selector.score_source == "received" else ClsAttention
    return ctx[source][-1].float().mean(dim=0)


def _range(values: Tensor) -> Tensor:
    return (values - values.min() + 1e-6) / (values.max() - values.min())


def _relevance(ctx: VisualContext) -> Tensor:
    text, x = F.normalize(ctx[TextEmbeds].float(), dim=1), F.normalize(ctx.features.float(), dim=1)
    return (text @ x.T).mean(dim=0)


# -- attention -------------------------------------------------------------------------------------------------------


def vtc_cls(_: Any, ctx: VisualContext) -> Choice:
    """Sum of the layers."""
    return _kept(_top(ctx[ClsAttention].float().mean(dim=1).sum(dim=0), ctx.budget))


def fastervlm(selector: Any, ctx: VisualContext) -> Choice:
    """The best of the feature layer."""
    return _kept(_top(_attention(selector, ctx), ctx.budget))


def visionzip(selector: Any, ctx: VisualContext) -> Choice:
    """The best, and an even spread of the others with what resembles them."""
    context = round(ctx.budget * selector.contextual)
    dominant = _top(_attention(selector, ctx), ctx.budget - context)
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
    ranked = _top(_attention(selector, ctx), ctx.n)
    important = int(ctx.budget * selector.important_ratio)
    unit, listed = F.normalize(ctx[PreProjector].float(), dim=1), ranked[important:]
    while len(listed) > ctx.budget - important:
        closest = (unit[listed[::2]] @ unit[listed[1::2]].T).amax(dim=1)
        drop = min(8, len(listed) - (ctx.budget - important))
        listed = torch.cat([listed[::2][_top(closest, len(closest))[drop:]], listed[1::2]])
    return _kept(torch.cat([ranked[:important], listed]))


def holov(selector: Any, ctx: VisualContext) -> Choice:
    """A share for every crop, in it the best."""
    attention, x = _attention(selector, ctx), ctx[PreProjector].float()
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
    for crop in itertools.cycle(_top(weight, len(crops)).tolist()):
        if sum(shares) == ctx.budget:
            break
        shares[crop] += shares[crop] < len(crops[crop])
    return _kept(torch.cat([crop[_top(attention[crop], k)] for crop, k in zip(crops, shares, strict=True)]))


def hiprune(selector: Any, ctx: VisualContext) -> Choice:
    """Anchors of the middle layer with their neighbours, then the best of the last."""
    middle, end = ctx[ReceivedAttention].float().mean(dim=1)[[0, -1]]
    places = {tuple(place): token for token, place in enumerate(ctx[Origin][:, :4].tolist())}
    chosen: dict[int, None] = {}
    for anchor in _top(middle, round(ctx.budget * selector.alpha / 5)).tolist():
        view, frame, row, column = ctx[Origin][anchor, :4].tolist()
        around = ((row, column), (row, column - 1), (row, column + 1), (row - 1, column), (row + 1, column))
        found = (places.get((view, frame, *place)) for place in around)
        chosen |= {token: None for token in found if token is not None}
    first = torch.tensor(list(chosen)[: ctx.budget], dtype=torch.long)
    return _kept(torch.cat([first, _top(end.index_fill(0, first, -torch.inf), ctx.budget - len(first))]))


def prumerge(selector: Any, ctx: VisualContext) -> Choice:
    """The centres that the selector names, each with its neighbours, and one token of the rest."""
    attention, x = ctx[WideClsAttention].float(), ctx.features.float()
    centres = selector.centres(attention, ctx.budget - 1)
    rest = torch.ones(ctx.n, dtype=torch.bool).index_fill(0, centres, False).nonzero()[:, 0]
    similarity = reference.cosines(ctx[VisionKeys]).fill_diagonal_(-torch.inf)
    merged = {int(rest[attention[rest].argmax()]): attention[rest] @ x[rest]}
    for centre in centres.tolist():
        near = _top(similarity[centre], selector.neighbours)
        merged[centre] = x[centre] + attention[near] @ x[near]
    keep = sorted(merged)
    return torch.tensor(keep), torch.stack([merged[token] for token in keep])


# -- diversity and coverage ------------------------------------------------------------------------------------------


def divprune(_: Any, ctx: VisualContext) -> Choice:
    """Farthest points."""
    return _kept(reference.farthest_point(ctx.features, ctx.budget))


def cdpruner(selector: Any, ctx: VisualContext) -> Choice:
    """A determinantal point process, weighted by relevance to the text."""
    sign = -1 if selector.similarity == "inverted" else 1
    return _kept(reference.dpp_greedy(ctx.features, ctx.budget, _range(sign * _relevance(ctx))))


def vtc(selector: Any, ctx: VisualContext) -> Choice:
    """A determinantal point process of features and places; the rest merged into the most similar."""
    attention = ctx[ClsAttention].float().mean(dim=1).sum(dim=0)
    rank = (attention[:, None] >= attention).sum(dim=1)
    places = ctx[Place].float() / (0.5 if ctx.modality == "image" else 0.25)
    weight = (rank / ctx.n) ** selector.exponent
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
    return _kept(reference.coverage_greedy(ctx[PreProjector], ctx.budget, weight, selector.combine))


def rediprune(selector: Any, ctx: VisualContext) -> Choice:
    """Farthest points with a bonus for relevance."""
    bonus = selector.alpha * _relevance(ctx)
    return _kept(reference.relevant_farthest_point(ctx.features, ctx.budget, bonus))


def mmtok(selector: Any, ctx: VisualContext) -> Choice:
    """Coverage of what text and tokens look for."""
    options = selector.alpha, selector.text_temperature, selector.temperature
    return _kept(reference.multimodal_coverage(ctx.features, ctx.budget, ctx[TextEmbeds], ctx[PreProjector], *options))


def eadp(selector: Any, ctx: VisualContext) -> Choice:
    """Facility location over rows weighted by smoothed relevance."""
    text, x = F.normalize(ctx[TextEmbeds].float(), dim=1), F.normalize(ctx.features.float(), dim=1)
    similarity = (-1 if selector.similarity == "inverted" else 1) * text @ x.T
    share = (100 * similarity).softmax(dim=1)
    entropy = -(share * share.clamp(min=1e-38).log()).sum(dim=1)
    clear = entropy.sort(stable=True).indices[: max(1, int(selector.words * len(text)))]
    local = (-entropy[clear] / 0.01).softmax(dim=0) @ similarity[clear]
    mixed = _range(selector.alpha * local + (1 - selector.alpha) * similarity.mean(dim=0))
    edge = torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.5)])
    kernel = torch.outer(edge, edge) / edge.sum() ** 2
    smooth = []
    for (t, h, w), part in zip(ctx.grids, mixed.split([math.prod(grid) for grid in ctx.grids]), strict=True):
        padded = F.pad(part.view(t, 1, h, w), (1, 1, 1, 1), mode="reflect")
        smooth.append(F.conv2d(padded, kernel[None, None]).flatten())
    return _kept(reference.weighted_coverage(ctx.features, ctx.budget, torch.cat(smooth) ** selector.beta))


def dart(selector: Any, ctx: VisualContext) -> Choice:
    """Pivots, and for each what resembles it least."""
    x, text = ctx.features.float(), ctx[TextEmbeds].float()
    kept = _top(x.abs().sum(dim=1), selector.image_pivots).tolist()
    pivots = [*x[kept], *text[_top(text.abs().sum(dim=1), selector.text_pivots)]]
    for turn, pivot in enumerate(pivots):
        share = -(-(ctx.budget - len(kept)) // (len(pivots) - turn))
        likeness = F.cosine_similarity(pivot[None], x, dim=1)
        likeness[kept] = torch.inf
        kept += _top(-likeness, share).tolist()
    return _kept(torch.tensor(kept))


# -- videos ----------------------------------------------------------------------------------------------------------


def _frames(x: Tensor, ctx: VisualContext) -> Tensor:
    """(T, n, ...)."""
    ((t, _, _),) = ctx.grids
    return x.unflatten(0, (t, -1))


def evs(_: Any, ctx: VisualContext) -> Choice:
    """The first frame, and what changed most."""
    x = _frames(ctx.features.float(), ctx)
    change = 1 - F.cosine_similarity(x[1:], x[:-1], dim=2).flatten()
    first = x.shape[1]
    if ctx.budget < first:  # the released code keeps the first frame whatever is asked for
        return torch.empty(0, dtype=torch.long), None
    return _kept(torch.cat([torch.arange(first), first + _top(change, ctx.budget - first)]))


def vidcom2(selector: Any, ctx: VisualContext) -> Choice:
    """The least typical of every frame, more of frames that stand out."""
    x = ctx.features.float()
    quiet = x.var(dim=0).topk(x.shape[1] // 2, largest=False).indices
    unit = _frames(F.normalize(x[:, quiet], dim=1), ctx)
    widths = [2.0**power for power in range(-3, 2)]

    def typical(centre: Tensor) -> Tensor:
        distance = (unit - centre).square().sum(dim=2)
        return sum((torch.exp(-distance / (2 * width)) for width in widths), torch.zeros_like(distance))

    video, frame = typical(unit.mean(dim=(0, 1))), typical(unit.mean(dim=1, keepdim=True))
    unlike = -video.mean(dim=1)
    excess = ((unlike - unlike.max()) / selector.temperature).softmax(dim=0)
    n = unit.shape[1]
    shares = (ctx.budget / ctx.n * (1 + excess - excess.mean())).clamp(max=1).mul(n).round().clamp(1, n).long()
    scores = video + frame
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for t, share in enumerate(shares.tolist()):
        mask[t, _top(-scores[t], share)] = True
    chosen = mask.flatten().nonzero()[:, 0]
    by_score, flat = scores.flatten(), mask.flatten()
    if len(chosen) > ctx.budget:
        return _kept(chosen[_top(-by_score[chosen], ctx.budget)])
    more = _top(-by_score.masked_fill(flat, torch.inf), ctx.budget - len(chosen))
    return _kept(torch.cat([chosen, more]))


def dycoke(_: Any, ctx: VisualContext) -> Choice:
    """Of four frames the first, and of the others what changed."""
    x = _frames(ctx.features.float(), ctx)
    frames, n = x.shape[:2]
    whole = range(0, frames, 4)
    if ctx.budget <= n * len(whole):
        return torch.empty(0, dtype=torch.long), None
    others = [t for t in range(frames) if t % 4]
    shares = largest_remainder(ctx.budget - n * len(whole), [n] * len(others))
    kept = [torch.arange(t * n, t * n + n) for t in whole]
    for t, share in zip(others, shares, strict=True):
        likeness = F.cosine_similarity(x[t], x[t - (0, 1, 2, 1)[t % 4]], dim=1)
        kept.append(t * n + _top(-likeness, share))
    return _kept(torch.cat(kept))


def _peaks(x: Tensor, k: int) -> Tensor:
    """(N,): density times separation of tokens (N, D)."""
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = (-distance.topk(min(k, len(x)), largest=False).values.square().mean(dim=1)).exp()
    separation = torch.where(density > density[:, None], distance, distance.max()).amin(dim=1)
    return density * separation


def _clustered(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres (count,), ascending, of the tokens (N, D), and the means of their clusters."""
    centres = _top(_peaks(x, 7), count).sort().values
    label = torch.cdist(x, x[centres]).argmin(dim=1)
    label[centres] = torch.arange(count)
    return centres, torch.stack([x[label == number].mean(dim=0) for number in range(count)])


def _scenes(x: Tensor, selector: Any) -> list[tuple[int, int]]:
    """First frame, and last frame plus one, of every scene of the frames (T, n, D)."""
    means = x.mean(dim=1)
    similarity = F.cosine_similarity(means[1:], means[:-1], dim=1)
    cuts = {int(t) + 1 for t in similarity.sort(stable=True).indices[: selector.segments - 1]}
    cuts |= {t + 1 for t, value in enumerate(similarity.tolist()) if value < selector.tau}
    return list(itertools.pairwise([0, *sorted(cuts), len(x)]))


def fastvid(selector: Any, ctx: VisualContext) -> Choice:
    """The salient tokens of every frame, and anchors with the means of their segment."""
    x, attention = _frames(ctx.features.float(), ctx), _frames(_attention(selector, ctx), ctx)
    frames, n = x.shape[:2]
    shares = largest_remainder(ctx.budget, [n] * frames)
    context = [int(share * selector.context) for share in shares]
    salient = [share - part for share, part in zip(shares, context, strict=True)]
    anchors, segments = [0] * frames, _scenes(x, selector)
    for start, stop in segments:
        at = [t for t in range(start, stop) if (stop - 1 - t) % selector.interval == 0]
        total = sum(context[start:stop])
        for number, t in enumerate(at):
            anchors[t] = min(total // len(at) + (number < total % len(at)), n - salient[t])
    left = ctx.budget - sum(salient) - sum(anchors)
    room = [n - own - more for own, more in zip(salient, anchors, strict=True)]
    salient = [own + more for own, more in zip(salient, largest_remainder(left, room), strict=True)]
    flat, rest = ctx.features.float(), []
    found: dict[int, Tensor] = {}
    for t in range(frames):
        ranked = t * n + _top(attention[t], n)
        found |= {int(token): flat[token] for token in ranked[: salient[t]]}
        rest.append(ranked[salient[t] :].sort().values)
    for start, stop in segments:
        tokens = torch.cat(rest[start:stop])
        for t in range(start, stop):
            if not anchors[t]:
                continue
            mine = rest[t] if selector.interval == 1 else tokens
            centres = rest[t][_top(_peaks(flat[rest[t]], 4), anchors[t])].sort().values
            label = (F.normalize(flat[mine], dim=1) @ F.normalize(flat[centres], dim=1).T).argmax(dim=1)
            for number, centre in enumerate(centres.tolist()):
                group = flat[mine[label == number]]
                weight = max(1 / (len(group) + 1), selector.beta)
                found[centre] = weight * flat[centre] + (1 - weight) * group.mean(dim=0)
    keep = sorted(found)
    return torch.tensor(keep), torch.stack([found[token] for token in keep])


def flashvid(selector: Any, ctx: VisualContext) -> Choice:
    """What is attended to and diverse in every frame, and trees of the others, clustered."""
    x, attention = _frames(ctx.features.float(), ctx), _frames(_attention(selector, ctx), ctx)
    frames, n = x.shape[:2]
    flat, unit = x.flatten(0, 1), F.normalize(x, dim=2)
    shares = largest_remainder(ctx.budget, [n] * frames)
    first = [int(share * selector.alpha) for share in shares]
    kept: list[int] = []
    rest = torch.ones(frames, n, dtype=torch.bool)
    for t in range(frames):
        apart = (1 - unit[t] @ unit[t].T) * attention[t]
        picks = [int(apart.sort(dim=0).values[1].argmax())]
        while len(picks) < first[t]:
            near = apart[picks].amin(dim=0)
            near[picks] = -torch.inf
            picks.append(int(near.argmax()))
        kept += [t * n + pick for pick in picks[: first[t]]]
        rest[t, picks[: first[t]]] = False
    links: list[tuple[float, int, int]] = []
    for start, stop in _scenes(x, selector):
        for t in range(start + 1, stop):
            mine, earlier = rest[t].nonzero()[:, 0], rest[t - 1].nonzero()[:, 0]
            closest, parent = (unit[t, mine] @ unit[t - 1, earlier].T).max(dim=1)
            for token, value, place in zip(mine.tolist(), closest.tolist(), earlier[parent].tolist(), strict=True):
                if value > selector.link:
                    links.append((value, t * n + token, (t - 1) * n + place))
    lacking = ctx.budget - sum(first) - (ctx.n - len(kept) - len(links))
    parents = {token: parent for _, token, parent in sorted(links)[max(0, lacking) :]}
    trees: dict[int, list[int]] = {}
    for token in range(ctx.n):
        root = token
        while root in parents:
            root = parents[root]
        trees.setdefault(root, []).append(token)
    by_frame = [[token for token in trees if token // n == t and rest[t, token % n]] for t in range(frames)]
    counts = [min(share - own, len(roots)) for share, own, roots in zip(shares, first, by_frame, strict=True)]
    room = [len(roots) - count for roots, count in zip(by_frame, counts, strict=True)]
    if left := ctx.budget - sum(first) - sum(counts):
        counts = [count + more for count, more in zip(counts, largest_remainder(left, room), strict=True)]
    found = {token: flat[token] for token in kept}
    for roots, count in zip(by_frame, counts, strict=True):
        if count:
            means = torch.stack([flat[trees[root]].mean(dim=0) for root in roots])
            centres, merged = _clustered(means, count)
            found |= {roots[centre]: value for centre, value in zip(centres.tolist(), merged, strict=True)}
    keep = sorted(found)
    return torch.tensor(keep), torch.stack([found[token] for token in keep])


def _merged_in_windows(
    ctx: VisualContext,
    windows: list[tuple[int, int]],
    static: list[Tensor],
    shares: Callable[[list[int], int], list[int]],
    attention: Tensor | None,
) -> Choice:
    """Average the `static` places of every window; cluster them, and the other tokens of every frame.

    Of these the ones with the most `attention` stay, if it is given.
    """
    x = _frames(ctx.features.float(), ctx)
    n = x.shape[1]
    groups: list[tuple[Tensor, Tensor, bool]] = []  # tokens, their features, whether they are static; frames first
    for (start, stop), still in zip(windows, static, strict=True):
        for t in range(start, stop):
            places = (~still).nonzero()[:, 0]
            groups.append((t * n + places, x[t, places], False))
    for (start, stop), still in zip(windows, static, strict=True):
        places = still.nonzero()[:, 0]
        groups.append((start * n + places, x[start:stop, places].mean(dim=0), True))
    groups = [group for group in groups if len(group[0])]
    keep, merged = [], []
    for (tokens, means, once), k in zip(groups, shares([len(g[0]) for g in groups], ctx.budget), strict=True):
        if not k:
            continue
        if attention is not None and not once:
            best = _top(attention[tokens], k)
            keep.append(tokens[best])
            merged.append(means[best])
        else:
            centres, found = _clustered(means, k)
            keep.append(tokens[centres])
            merged.append(found)
    order = torch.cat(keep).argsort()
    return torch.cat(keep)[order], torch.cat(merged)[order]


def prunevid(selector: Any, ctx: VisualContext) -> Choice:
    """Windows of clustered frames, their static places averaged, all clustered."""
    x = _frames(F.normalize(ctx.features.float(), dim=1), ctx)
    means = _frames(ctx.features.float(), ctx).mean(dim=1)
    centres = _top(_peaks(means, 7), max(1, int(len(means) * selector.segments)))
    labels = torch.cdist(means, means[centres]).argmin(dim=1)
    labels[centres] = torch.arange(len(centres))
    ends = torch.bincount(torch.tensor(runs_of(labels.tolist()))).cumsum(0).tolist()
    windows, static = list(itertools.pairwise([0, *ends])), []
    for start, stop in windows:
        width = stop - start
        pairs = torch.einsum("tnd,snd->nts", x[start:stop], x[start:stop])
        alike = (pairs.sum(dim=(1, 2)) - width) / max(1, width * (width - 1))
        static.append(alike > selector.tau if width > 1 else torch.zeros_like(alike, dtype=torch.bool))

    def shares(sizes: list[int], budget: int) -> list[int]:
        small = sum(size for size in sizes if size <= 14)
        if budget - small < sum(size > 14 for size in sizes):
            return largest_remainder(budget, sizes)
        large = largest_remainder(budget - small, [size if size > 14 else 0 for size in sizes])
        return [size if size <= 14 else share for size, share in zip(sizes, large, strict=True)]

    return _merged_in_windows(ctx, windows, static, shares, None)


def holitom(selector: Any, ctx: VisualContext) -> Choice:
    """The windows that save most, their static places averaged and clustered, of the others the best."""
    x = _frames(ctx.features.float(), ctx)
    still = F.cosine_similarity(x[1:], x[:-1], dim=2) > selector.tau
    best, start = [0], []
    for last in range(len(x)):
        options = [
            best[first] + int(still[first:last].all(dim=0).sum()) * (last - first) for first in range(last, -1, -1)
        ]
        best.append(max(options))
        start.append(last - options.index(best[-1]))
    windows: list[tuple[int, int]] = []
    stop = len(x)
    while stop:
        windows.insert(0, (start[stop - 1], stop))
        stop = start[stop - 1]
    static = [still[a : b - 1].all(dim=0) & (b - a > 1) for a, b in windows]

    def shares(sizes: list[int], budget: int) -> list[int]:
        return largest_remainder(budget, sizes)

    return _merged_in_windows(ctx, windows, static, shares, _attention(selector, ctx))


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
    "divprune": divprune,
    "cdpruner": cdpruner,
    "scope": scope,
    "rediprune": rediprune,
    "mmtok": mmtok,
    "eadp": eadp,
    "dart": dart,
    "evs": evs,
    "vidcom2": vidcom2,
    "dycoke": dycoke,
    "fastvid": fastvid,
    "prunevid": prunevid,
    "flashvid": flashvid,
    "holitom": holitom,
}
