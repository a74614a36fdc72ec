"""The operations that `vtc bench kernels` measures: at which shapes, against which plain way.

Features are drawn around forty centres, as the tokens of a picture with forty things in it, and for one operation as
noise as well: a greedy search that leaves out what cannot win is helped by the former, and hardly by the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtc import kernels
from vtc.bench import _plain
from vtc.kernels import attention_received, attention_rows, pagerank

__all__ = ["OPS", "Draw", "Op", "Problem"]


@dataclass
class Draw:
    """Where the tensors of a problem come from: seeded, of one precision, on one device."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __call__(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def tokens(self, n: int, d: int) -> Tensor:
        """(n, d) features around forty centres."""
        centre = torch.randint(40, (n,), generator=self.generator).to(self.device)
        return self(40, d)[centre] + 0.5 * self(n, d)


@dataclass(frozen=True)
class Problem:
    """One operation on one set of tensors, in two ways.

    Attributes
    ----------
    ours, plain : callable
        Compute the same.
    agreement : callable
        (result of ours, result of plain) to a few words on how far they agree.
    """

    ours: Callable[[], Any]
    plain: Callable[[], Any]
    agreement: Callable[[Any, Any], str]


@dataclass(frozen=True)
class Op:
    """One operation to measure.

    Attributes
    ----------
    problem : callable
        (draw, n, other sizes by name) to `Problem`.
    plainly : str
        The plain way in words.
    n : int
        Tokens where the two ways are compared.
    sizes : mapping
        Other sizes there.
    growing : mapping
        What is different in them where growth with n is measured: small enough for the largest n.
    """

    problem: Callable[..., Problem]
    plainly: str
    n: int
    sizes: Mapping[str, int]
    growing: Mapping[str, int]

    def at(self, draw: Draw, n: int | None = None, *, growing: bool = False) -> Problem:
        """The problem of `n` tokens; by default the one where the two ways are compared."""
        return self.problem(draw, n or self.n, **self.shape(growing=growing))

    def shape(self, *, growing: bool = False) -> dict[str, int]:
        """Sizes beside the number of tokens."""
        return {**self.sizes, **(self.growing if growing else {})}


def difference(a: Tensor, b: Tensor) -> str:
    """Largest difference relative to the largest value."""
    largest = float((a.float() - b.float()).abs().max() / b.float().abs().max())
    return f"to {largest:.0e}" if largest else "equal"


def same_picks(a: Tensor, b: Tensor) -> str:
    """How many of the picks are the same, as sets."""
    common = len(set(a.tolist()) & set(b.tolist()))
    return "equal" if common == len(b) else f"{common} of {len(b)}"


def _attention_rows(draw: Draw, n: int, layers: int, heads: int, width: int) -> Problem:
    queries = [draw(1, heads, n, width) for _ in range(layers)]
    keys = [draw(1, heads, n, width) for _ in range(layers)]
    scaling = width**-0.5

    def ours() -> Tensor:
        rows = [attention_rows(q[:, :, :1], k, scaling) for q, k in zip(queries, keys, strict=True)]
        return torch.stack(rows).mean(dim=2).sum(dim=0)[0, 0]

    return Problem(ours, lambda: _plain.attention_rows(queries, keys, scaling), difference)


def _attention_received(draw: Draw, n: int, heads: int, width: int) -> Problem:
    query, key, scaling = draw(1, heads, n, width), draw(1, heads, n, width), width**-0.5
    return Problem(
        lambda: attention_received(query, key, scaling),
        lambda: _plain.attention_received(query, key, scaling),
        difference,
    )


def _pagerank(draw: Draw, n: int, heads: int, kv_heads: int, width: int, steps: int) -> Problem:
    # Small logits: AIM divides them by a temperature of 0.1, and a walk that is one-hot compares nothing.
    query, key, scaling = draw(1, heads, n, width) * 0.1, draw(1, kv_heads, n, width), width**-0.5
    at = torch.arange(n, device=query.device)[None]
    causal = kernels.Sight(at, at)
    return Problem(
        lambda: pagerank(query, key, scaling, causal, temperature=0.1, iterations=steps),
        lambda: _plain.pagerank(query, key, scaling, 0.1, steps),
        difference,
    )


def _topk(draw: Draw, n: int, k: int) -> Problem:
    scores = draw(n)
    return Problem(
        lambda: kernels.topk_indices(scores, k).sort().values, lambda: _plain.topk_sorted(scores, k), same_picks
    )


def _farthest_point(draw: Draw, n: int, k: int, d: int, first: int | None = None, noise: bool = False) -> Problem:
    x = draw(n, d) if noise else draw.tokens(n, d)
    return Problem(lambda: kernels.farthest_point(x, k, first), lambda: _plain.farthest_point(x, k, first), same_picks)


def _max_sum(draw: Draw, n: int, k: int, d: int) -> Problem:
    x = draw.tokens(n, d)
    return Problem(lambda: kernels.max_sum(x, k, 0), lambda: _plain.max_sum(x, k, 0), same_picks)


def _dpp_greedy(draw: Draw, n: int, k: int, d: int) -> Problem:
    x, relevance = draw.tokens(n, d), draw(n).sigmoid()
    return Problem(lambda: kernels.dpp_greedy(x, k, relevance), lambda: _plain.dpp_greedy(x, k, relevance), same_picks)


def _coverage_greedy(draw: Draw, n: int, k: int, d: int) -> Problem:
    x = draw.tokens(n, d)
    return Problem(lambda: kernels.coverage_greedy(x, k), lambda: _plain.coverage_greedy(x, k), same_picks)


def _bipartite_merge(draw: Draw, n: int, d: int) -> Problem:
    x = draw.tokens(n, d)

    def ours() -> Tensor:
        anchors, assign = kernels.bipartite_merge(x[None], n // 2, order="author")
        out = x.new_zeros(anchors.shape[1], d, dtype=torch.float32).index_add(0, assign[0], x.float())
        return (out / torch.bincount(assign[0])[:, None]).to(x.dtype)

    return Problem(ours, lambda: _plain.bipartite_merge(x, n // 2), difference)


def _patch_entropy(draw: Draw, n: int, side: int) -> Problem:
    patches = draw(n, 3, side * side).sigmoid()
    return Problem(lambda: kernels.patch_entropy(patches), lambda: _plain.patch_entropy(patches), difference)


_PICKS = {"k": 64, "d": 3584}
_SMALL = {"d": 256}

OPS: dict[str, Op] = {
    # What vtc-cls reads of CLIP ViT-L/14-336: layers 16 to 22.
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
    # A layer of Qwen2-7B, where AIM's authors walk.
    "pagerank": Op(
        _pagerank,
        "N x N matrix, one product with it per step",
        1440,
        {"heads": 28, "kv_heads": 4, "width": 128, "steps": 5},
        {"heads": 1, "kv_heads": 1, "width": 64, "steps": 1},
    ),
    "topk_indices": Op(_topk, "torch.topk, then sort", 2880, {"k": 288}, {"k": 64}),
    "farthest_point": Op(_farthest_point, "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "farthest_point/noise": Op(
        partial(_farthest_point, noise=True), "N x N cosines, then greedy", 2880, _PICKS, _SMALL
    ),
    "farthest_point/first": Op(partial(_farthest_point, first=0), "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "max_sum": Op(_max_sum, "N x N cosines, then greedy", 2880, _PICKS, _SMALL),
    "dpp_greedy": Op(_dpp_greedy, "N x N kernel, then greedy", 2880, _PICKS, _SMALL),
    "coverage_greedy": Op(_coverage_greedy, "N x N cosines, all of them per pick", 2880, _PICKS, _SMALL),
    "bipartite_merge": Op(_bipartite_merge, "N/2 x N/2 cosines, sort, scatter", 2880, {"d": 1024}, {"d": 64}),
    "patch_entropy": Op(_patch_entropy, "torch.histc per patch", 576, {"side": 14}, {}),
}
