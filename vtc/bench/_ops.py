"""The operations that `vtc bench kernels` measures, with their shapes and baselines.

Features are clustered around forty centres, like the tokens of an image with forty objects, and for one operation also
unclustered: greedy selection can exclude many rows early in the former case and few in the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc import kernels
from vtc.bench import _baselines
from vtc.kernels import near_ties, reference

__all__ = ["OPS", "SMALL", "Draw", "Op", "Problem"]


_SMALL_TOKENS = 70
SMALL = {
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "width": 16,
    "steps": 2,
    "k": 9,
    "d": 24,
    "side": 4,
    "text": 6,
    "frame": 8,
}
"""Sizes of `Op.small`."""


@dataclass
class Draw:
    """Generator of seeded tensors of one dtype on one device."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __call__(self, *shape: int) -> Tensor:
        """Draw from the standard normal distribution."""
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def tokens(self, n: int, d: int) -> Tensor:
        """Draw features (n, d) around forty centres."""
        centre = torch.randint(40, (n,), generator=self.generator).to(self.device)
        return self(40, d)[centre] + 0.5 * self(n, d)


@dataclass(frozen=True)
class Problem:
    """One operation on one set of tensors, in two implementations.

    Attributes
    ----------
    ours, baseline : callable
        The two implementations.
    agreement : callable
        (result of ours, result of the baseline) to a short description of their agreement.
    inputs : tuple of Tensor
        What any implementation must read.
    specified : callable, optional
        The specification, where the baseline is another code or computes in the dtype of its input.
    picks : PickCheck, optional
        Of greedy selection, whose picks cannot be compared one by one: where two rows tie to rounding, all later picks
        may differ.
    """

    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    agreement: Callable[[Any, Any], str]
    inputs: tuple[Tensor, ...] = ()
    specified: Callable[[], Any] | None = None
    picks: PickCheck | None = None

    def error(self, result: Any) -> float:
        """Return how far a result of `ours` is from the specification.

        Of picks, how much less a pick is worth than the best one, as a share of what is allowed; otherwise the largest
        difference relative to the largest value, and infinity where integers or shapes differ or a value is not finite.
        """
        if self.picks is not None:
            return self.picks.shortfall(result)
        expected = (self.specified or self.baseline)()
        pairs = [(result, expected)] if isinstance(result, Tensor) else list(zip(result, expected, strict=True))
        return max(_relative(ours, theirs) for ours, theirs in pairs)


@dataclass(frozen=True)
class PickCheck:
    """What the picks of a greedy selection are held to.

    Attributes
    ----------
    x : Tensor
        The rows (N, D).
    k : int
        Number of picks.
    objective : callable
        See `vtc.kernels.near_ties`.
    rounding : float
        By how much a pick may be worth less than the best.
    """

    x: Tensor
    k: int
    objective: near_ties.Objective
    rounding: float = near_ties.ROUNDING

    def shortfall(self, picks: Tensor) -> float:
        """Return the largest shortfall of a pick as a share of `rounding`."""
        return near_ties.shortfall(picks.cpu(), self.x.cpu(), self.k, self.objective) / self.rounding


@dataclass(frozen=True)
class Op:
    """One operation to measure.

    Attributes
    ----------
    problem : callable
        (draw, n, other sizes by name) to `Problem`.
    baseline : str
        Description of the baseline.
    n : int
        Number of tokens of the comparison.
    sizes : mapping
        Other sizes of the comparison.
    growing : mapping
        Sizes that differ where growth with n is measured, small enough for the largest n.
    """

    problem: Callable[..., Problem]
    baseline: str
    n: int
    sizes: Mapping[str, int]
    growing: Mapping[str, int]

    def at(self, draw: Draw, n: int | None = None, *, growing: bool = False) -> Problem:
        """Draw the problem of `n` tokens, by default that of the comparison."""
        return self.problem(draw, n or self.n, **self.shape(growing=growing))

    def shape(self, *, growing: bool = False) -> dict[str, int]:
        """Return the sizes beside the number of tokens."""
        return {**self.sizes, **(self.growing if growing else {})}

    def small(self) -> Op:
        """Return the same operation at sizes that are no multiples of a kernel's blocks, and quick to interpret."""
        return Op(self.problem, self.baseline, _SMALL_TOKENS, {name: SMALL[name] for name in self.sizes}, {})

    def words(self) -> str:
        """Describe the sizes of the comparison."""
        return ", ".join(f"{name} {size}" for name, size in {"n": self.n, **self.sizes}.items())


def difference(a: Tensor, b: Tensor) -> str:
    """Describe the largest difference relative to the largest value."""
    largest = float((a.float() - b.float()).abs().max() / b.float().abs().max())
    return f"to {largest:.0e}" if largest else "equal"


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype.is_floating_point != b.dtype.is_floating_point:
        return math.inf
    if not a.dtype.is_floating_point:
        return 0.0 if torch.equal(a, b) else math.inf
    largest = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
    return float(largest) if bool(largest.isfinite()) else math.inf


def same_picks(a: Tensor, b: Tensor) -> str:
    """Describe how many of the picks are the same, as sets."""
    common = len(set(a.tolist()) & set(b.tolist()))
    return "equal" if common == len(b) else f"{common} of {len(b)}"


def _attention_rows(draw: Draw, n: int, layers: int, heads: int, width: int) -> Problem:
    queries, keys = draw(layers, 1, heads, n, width), draw(layers, 1, heads, n, width)
    first, scaling = queries[..., :1, :], width**-0.5
    return Problem(
        lambda: kernels.attention_rows(first, keys, scaling, reduce="mean").sum(dim=0)[0, 0],
        lambda: _baselines.attention_rows(queries, keys, scaling),
        difference,
        (first, keys),
        lambda: reference.attention_rows(first, keys, scaling, reduce="mean").sum(dim=0)[0, 0],
    )


def _attention_received(draw: Draw, n: int, heads: int, width: int) -> Problem:
    query, key, scaling = draw(1, heads, n, width), draw(1, heads, n, width), width**-0.5
    return Problem(
        lambda: kernels.attention_received(query, key, scaling),
        lambda: reference.attention(query, key, scaling).mean(dim=2),
        difference,
        (query, key),
    )


def _pagerank(draw: Draw, n: int, heads: int, kv_heads: int, width: int, steps: int) -> Problem:
    # Small logits, because AIM divides them by a temperature of 0.1, and one-hot attention would compare nothing.
    query, key, scaling = draw(1, heads, n, width) * 0.1, draw(1, kv_heads, n, width), width**-0.5
    at = torch.arange(n, device=query.device)[None]
    causal = kernels.VisibilityMask(at, at)
    return Problem(
        lambda: kernels.pagerank(query, key, scaling, causal, iterations=steps),
        lambda: reference.pagerank(query, key, scaling, causal, iterations=steps),
        difference,
        (query, key),
    )


def _topk(draw: Draw, n: int, k: int) -> Problem:
    scores = draw(n)
    return Problem(
        lambda: kernels.topk_indices(scores, k),
        lambda: _baselines.topk_indices(scores, k),
        same_picks,
        (scores,),
        lambda: reference.topk_indices(scores, k),
    )


def _select_gather(draw: Draw, n: int, k: int, d: int, text: int) -> Problem:
    length, start = n + text, text // 2
    scores, embeddings, plane = draw(n).float(), draw(1, length, d), draw(n, d)
    positions = torch.arange(length, device=draw.device).expand(3, 1, length).contiguous()
    mask = torch.ones(1, length, dtype=torch.long, device=draw.device)
    visual = torch.zeros(1, length, dtype=torch.bool, device=draw.device)
    visual[:, start : start + n] = True
    columns = visual[0].nonzero()[:, 0]
    offsets, counts = (torch.tensor(x, device=draw.device) for x in ([0, n], [k]))

    def arguments() -> dict[str, Any]:
        chosen = {"scores": scores, "columns": columns, "offsets": offsets, "counts": counts}
        return {"keep": ~visual, "planes": (embeddings, positions, mask), "axes": (1, 2, 1), **chosen} | {
            "marks": visual,
            "marked": (plane,),
        }

    def ours() -> tuple[Tensor, ...]:
        packed = kernels.select_gather(**arguments())
        return *packed.planes, *packed.marked

    def specified() -> tuple[Tensor, ...]:
        _, _, _, planes, marked = reference.select_gather(**arguments())
        return *planes, *marked

    def agreement(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> str:
        return "equal" if all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) else "not equal"

    return Problem(
        ours,
        lambda: _baselines.select_gather(scores, k, start, embeddings, positions, mask, plane),
        agreement,
        (scores, embeddings[:, : k + text], plane[:k]),
        specified,
    )


def _segment_merge(draw: Draw, n: int, k: int, d: int) -> Problem:
    x, slot = draw(n, d), torch.randint(k, (n,), generator=draw.generator).to(draw.device)
    weight = torch.bincount(slot, minlength=k).float().reciprocal()[slot]
    return Problem(
        lambda: kernels.segment_merge(x, slot, k, weight),
        lambda: _baselines.segment_merge(x, slot, k),
        difference,
        (x, slot),
        lambda: reference.segment_merge(x, slot, k, weight),
    )


def _farthest_point(draw: Draw, n: int, k: int, d: int, first: int | None = None, noise: bool = False) -> Problem:
    x = draw(n, d) if noise else draw.tokens(n, d)
    return Problem(
        lambda: kernels.farthest_point(x, k, first),
        lambda: reference.farthest_point(x, k, first),
        same_picks,
        (x,),
        picks=PickCheck(x, k, near_ties.isolation(first)),
    )


def _relevant_farthest_point(draw: Draw, n: int, k: int, d: int) -> Problem:
    x, bonus = draw.tokens(n, d), draw(n).sigmoid()
    return Problem(
        lambda: kernels.relevant_farthest_point(x, k, bonus),
        lambda: reference.relevant_farthest_point(x, k, bonus),
        same_picks,
        (x, bonus),
        picks=PickCheck(x, k, near_ties.relevance(bonus.cpu())),
    )


def _max_sum(draw: Draw, n: int, k: int, d: int) -> Problem:
    x = draw.tokens(n, d)
    return Problem(
        lambda: kernels.max_sum(x, k, 0),
        lambda: reference.max_sum(x, k, 0),
        same_picks,
        (x,),
        picks=PickCheck(x, k, near_ties.distance_to_all(0), near_ties.ROUNDING * n),
    )


def _dpp_greedy(draw: Draw, n: int, k: int, d: int) -> Problem:
    x, relevance = draw.tokens(n, d), draw(n).sigmoid()
    return Problem(
        lambda: kernels.dpp_greedy(x, k, relevance),
        lambda: reference.dpp_greedy(x, k, relevance),
        same_picks,
        (x, relevance),
        picks=PickCheck(x, k, near_ties.volume(relevance.cpu()), near_ties.ROUNDING_OF_VOLUME),
    )


def _coverage_greedy(draw: Draw, n: int, k: int, d: int) -> Problem:
    x = draw.tokens(n, d)
    return Problem(
        lambda: kernels.coverage_greedy(x, k),
        lambda: reference.coverage_greedy(x, k),
        same_picks,
        (x,),
        picks=PickCheck(x, k, near_ties.coverage(None, "multiply"), near_ties.ROUNDING_OF_COVERAGE * n),
    )


def _bipartite_merge(draw: Draw, n: int, d: int) -> Problem:
    x = draw.tokens(n, d)

    def merged(match: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        anchors, assign = match(x[None], n // 2, order="author")
        out = x.new_zeros(anchors.shape[1], d, dtype=torch.float32).index_add(0, assign[0], x.float())
        return (out / torch.bincount(assign[0])[:, None]).to(x.dtype)

    return Problem(
        lambda: merged(kernels.bipartite_merge),
        lambda: _baselines.bipartite_merge(x, n // 2),
        difference,
        (x,),
        lambda: merged(reference.bipartite_merge),
    )


def _patch_entropy(draw: Draw, n: int, side: int) -> Problem:
    patches = draw(n, 3, side * side).sigmoid()
    return Problem(
        lambda: kernels.patch_entropy(patches),
        lambda: _baselines.patch_entropy(patches),
        difference,
        (patches,),
        lambda: reference.patch_entropy(patches),
    )


def _temporal_similarity(draw: Draw, n: int, frame: int, d: int) -> Problem:
    x, earlier = draw.tokens(n, d), (torch.arange(n, device=draw.device) - frame).clamp(min=-1)
    return Problem(
        lambda: kernels.temporal_similarity(x, earlier),
        lambda: _baselines.temporal_similarity(x, frame),
        difference,
        (x, earlier),
        lambda: reference.temporal_similarity(x, earlier),
    )


_PICKS = {"k": 64, "d": 3584}
_SMALL = {"d": 256}

OPS: dict[str, Op] = {
    # The layers of CLIP ViT-L/14-336 that vtc-cls uses, 16 to 22.
    "attention_rows": Op(
        _attention_rows,
        "output_attentions=True, then row 0",
        577,
        {"layers": 7, "heads": 16, "width": 64},
        {"layers": 1, "heads": 1},
    ),
    "attention_received": Op(
        _attention_received,
        "output_attentions=True, then the mean over queries",
        2880,
        {"heads": 16, "width": 64},
        {"heads": 1},
    ),
    # A layer of Qwen2-7B, the model of AIM's authors.
    "pagerank": Op(
        _pagerank,
        "N x N matrix, one product with it per step",
        1440,
        {"heads": 28, "kv_heads": 4, "width": 128, "steps": 5},
        {"heads": 1, "kv_heads": 1, "width": 64, "steps": 1},
    ),
    "topk_indices": Op(_topk, "torch.topk, then sort", 2880, {"k": 288}, {"k": 64}),
    # One row of the length of a LLaVA-NeXT prompt, with a deepstack plane, at the width of a 7B decoder.
    "select_gather": Op(
        _select_gather, "torch.topk, sort, a gather each", 2880, {"k": 288, "d": 4096, "text": 64}, {"k": 64, "d": 256}
    ),
    "farthest_point": Op(_farthest_point, "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "farthest_point/noise": Op(
        partial(_farthest_point, noise=True), "N x N cosines, then greedy", 2880, _PICKS, _SMALL
    ),
    "farthest_point/first": Op(partial(_farthest_point, first=0), "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "relevant_farthest_point": Op(_relevant_farthest_point, "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "max_sum": Op(_max_sum, "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "dpp_greedy": Op(_dpp_greedy, "N x N kernel, then greedy", 2880, _PICKS, _SMALL),
    "coverage_greedy": Op(_coverage_greedy, "N x N cosines, all of them per pick", 2880, _PICKS, _SMALL),
    "bipartite_merge": Op(_bipartite_merge, "N/2 x N/2 cosines, sort, scatter", 2880, {"d": 1024}, {"d": 64}),
    "segment_merge": Op(_segment_merge, "scatter_reduce, mean", 2880, {"k": 288, "d": 3584}, {"k": 64, "d": 256}),
    # 64 frames of LLaVA-OneVision.
    "temporal_similarity": Op(
        _temporal_similarity, "cosine_similarity of frames", 12544, {"frame": 196, "d": 3584}, {"frame": 64, "d": 256}
    ),
    "patch_entropy": Op(_patch_entropy, "torch.histc per patch", 576, {"side": 14}, {}),
}
