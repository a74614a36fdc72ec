"""Methods for videos as a reader of their papers would write them, see `vtc.bench._transcriptions`."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.bench._transcribing import Choice, Transcription, as_choice, best_of, feature_attention
from vtc.budget import largest_remainder
from vtc.core.context import VisualContext

__all__ = ["VIDEO_TRANSCRIPTIONS", "runs_of"]


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
    return as_choice(torch.cat([torch.arange(first), first + best_of(change, ctx.budget - first)]))


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
    keep = ctx.budget / ctx.n if ctx.keep_ratio is None else ctx.keep_ratio
    shares = (keep * (1 + excess - excess.mean())).clamp(max=1).mul(n).round().clamp(1, n).long()
    scores = video + frame
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for t, share in enumerate(shares.tolist()):
        mask[t, best_of(-scores[t], share)] = True
    chosen = mask.flatten().nonzero()[:, 0]
    by_score, flat = scores.flatten(), mask.flatten()
    if len(chosen) > ctx.budget:
        return as_choice(chosen[best_of(-by_score[chosen], ctx.budget)])
    more = best_of(-by_score.masked_fill(flat, torch.inf), ctx.budget - len(chosen))
    return as_choice(torch.cat([chosen, more]))


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
        kept.append(t * n + best_of(-likeness, share))
    return as_choice(torch.cat(kept))


def _peaks(x: Tensor, k: int) -> Tensor:
    """(N,): density times separation of tokens (N, D)."""
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = (-distance.topk(min(k, len(x)), largest=False).values.square().mean(dim=1)).exp()
    separation = torch.where(density > density[:, None], distance, distance.max()).amin(dim=1)
    return density * separation


def _clustered(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres (count,), ascending, of the tokens (N, D), and the means of their clusters."""
    centres = best_of(_peaks(x, 7), count).sort().values
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
    x, attention = _frames(ctx.features.float(), ctx), _frames(feature_attention(selector, ctx), ctx)
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
        ranked = t * n + best_of(attention[t], n)
        found |= {int(token): flat[token] for token in ranked[: salient[t]]}
        rest.append(ranked[salient[t] :].sort().values)
    for start, stop in segments:
        tokens = torch.cat(rest[start:stop])
        for t in range(start, stop):
            if not anchors[t]:
                continue
            mine = rest[t] if selector.interval == 1 else tokens
            centres = rest[t][best_of(_peaks(flat[rest[t]], 4), anchors[t])].sort().values
            label = (F.normalize(flat[mine], dim=1) @ F.normalize(flat[centres], dim=1).T).argmax(dim=1)
            for number, centre in enumerate(centres.tolist()):
                group = flat[mine[label == number]]
                weight = max(1 / (len(group) + 1), selector.beta)
                found[centre] = weight * flat[centre] + (1 - weight) * group.mean(dim=0)
    keep = sorted(found)
    return torch.tensor(keep), torch.stack([found[token] for token in keep])


def flashvid(selector: Any, ctx: VisualContext) -> Choice:
    """What is attended to and diverse in every frame, and trees of the others, clustered."""
    x, attention = _frames(ctx.features.float(), ctx), _frames(feature_attention(selector, ctx), ctx)
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
            best = best_of(attention[tokens], k)
            keep.append(tokens[best])
            merged.append(means[best])
        else:
            centres, found = _clustered(means, k)
            keep.append(tokens[centres])
            merged.append(found)
    order = torch.cat(keep).argsort()
    return torch.cat(keep)[order], torch.cat(merged)[order]


def runs_of(labels: Sequence[int]) -> list[int]:
    """Turn labels of frames into consecutive windows, numbered from 0.

    Of every label the longest runs stay, if they are longer than 1. A stretch between them goes to the longer of its
    neighbours, the left one of equals, with what that has taken before. Without any there is one window.
    """
    runs = [(label, len(list(same))) for label, same in itertools.groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 2))
    found = [label if length == longest[label] else -1 for label, length in runs for _ in range(length)]
    for at in range(len(found)):
        stretches = [(label, len(list(same))) for label, same in itertools.groupby(found)]
        ends = list(itertools.accumulate(length for _, length in stretches))
        which = bisect.bisect_right(ends, at)
        beside = [stretches[place] for place in (which - 1, which + 1) if 0 <= place < len(stretches)]
        if found[at] == -1:  # the whole stretch, of which this is the first
            winner = max(beside, key=lambda run: run[1])[0] if beside else 0
            found[at : ends[which]] = [winner] * (ends[which] - at)
    return [number for number, (_, same) in enumerate(itertools.groupby(found)) for _ in same]


def prunevid(selector: Any, ctx: VisualContext) -> Choice:
    """Windows of clustered frames, their static places averaged, all clustered."""
    x = _frames(F.normalize(ctx.features.float(), dim=1), ctx)
    means = _frames(ctx.features.float(), ctx).mean(dim=1)
    centres = best_of(_peaks(means, 7), max(1, int(len(means) * selector.segments)))
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

    return _merged_in_windows(ctx, windows, static, shares, feature_attention(selector, ctx))


VIDEO_TRANSCRIPTIONS: dict[str, Transcription] = {
    "evs": evs,
    "vidcom2": vidcom2,
    "dycoke": dycoke,
    "fastvid": fastvid,
    "prunevid": prunevid,
    "flashvid": flashvid,
    "holitom": holitom,
}
