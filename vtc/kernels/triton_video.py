"""Triton kernel for the cosine of tokens to earlier tokens.

A program reads a few tokens and the tokens that they are compared with, each once. Programs run roughly in the order of
the tokens, so that the previous frame is usually still in the second-level cache.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .video import check

_TOKENS, _WIDTH = 4, 512  # tokens of a program, and columns per step


@triton.jit
def _similarity(x, earlier, out, count, width, x_n, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the cosine of a block of tokens to their partners."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    partner = tl.load(earlier + token, mask=token < count, other=-1)
    paired = partner >= 0
    at = x + token[:, None].to(tl.int64) * x_n
    there = x + partner[:, None].to(tl.int64) * x_n
    product = tl.zeros((TOKENS, WIDTH), tl.float32)
    ours, theirs, differ = product, product, product
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        here = paired[:, None] & (lane < width)[None, :]
        own = tl.load(at + lane[None, :], mask=here, other=0.0).to(tl.float32)
        its = tl.load(there + lane[None, :], mask=here, other=0.0).to(tl.float32)
        product += own * its
        ours += own * own
        theirs += its * its
        differ += tl.where(own != its, 1.0, 0.0)
    own_norm = tl.maximum(tl.sqrt(tl.sum(ours, axis=1)), 1e-12)
    its_norm = tl.maximum(tl.sqrt(tl.sum(theirs, axis=1)), 1e-12)
    cosine = tl.sum(product, axis=1) / (own_norm * its_norm)
    cosine = tl.where(tl.sum(differ, axis=1) == 0.0, 1.0, tl.minimum(tl.maximum(cosine, -1.0), 1.0))
    tl.store(out + token, tl.where(paired, cosine, 0.0), mask=token < count)


def temporal_similarity(x: Tensor, earlier: Tensor) -> Tensor:
    """Implement `vtc.kernels.temporal_similarity`."""
    check(x, earlier)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_zeros(len(x), dtype=torch.float32)
    if len(x):
        _similarity[(triton.cdiv(len(x), _TOKENS),)](
            x, earlier.contiguous(), out, len(x), x.shape[1], x.stride(0), TOKENS=_TOKENS, WIDTH=_WIDTH
        )
    return out


KERNELS = [
    KernelSpec(
        _similarity,
        {"x": "*bf16", "earlier": "*i64", "out": "*fp32"} | dict.fromkeys(("count", "width", "x_n"), "i32"),
        {"TOKENS": _TOKENS, "WIDTH": _WIDTH},
        label="bf16",
    )
]
