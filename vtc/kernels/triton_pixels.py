"""Triton kernel for the entropy of patches: one program per patch reads its pixels in place, once."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import KernelSpec
from .dispatch import NoKernelError
from .pixels import as_pictures

_MAX_PIXELS = 4096  # of a patch

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: float32 has no fractions there, so adding it rounds half to even


@triton.jit
def _patch_entropy(
    pixels, mean, std, out, per_picture, per_row, channels, height, width, share, p_n, p_c, p_y,
    NORMALISED: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Compute the entropy of one patch; `share` is the weight of a channel in the grey value."""
    patch = tl.program_id(0)
    picture = (patch // per_picture).to(tl.int64)
    row, column = (patch % per_picture) // per_row, patch % per_row
    index = tl.arange(0, PIXELS)
    here = index < height * width
    at = picture * p_n + (row * height + index // width).to(tl.int64) * p_y + column * width + index % width
    grey = tl.zeros((PIXELS,), tl.float32)
    for channel in range(channels):
        level = tl.load(pixels + at + channel * p_c, mask=here, other=0.0).to(tl.float32)
        if NORMALISED:
            level = (level * tl.load(std + channel) + tl.load(mean + channel)) * 255.0
            level = tl.minimum(tl.maximum(level, 0.0), 255.0)
            level = (level + ROUNDER) - ROUNDER
        else:
            level = tl.floor(tl.minimum(tl.maximum(level * 255.0, 0.0), 255.0))
        grey += level * share
    grey = tl.minimum(tl.maximum((grey + ROUNDER) - ROUNDER, 0.0), 255.0)
    # Padding lanes are counted as black and subtracted again.
    counts = tl.histogram(tl.where(here, grey, 0.0).to(tl.int32), 256)
    counts -= tl.where(tl.arange(0, 256) == 0, PIXELS - height * width, 0)
    part = counts.to(tl.float32) / (height * width)
    tl.store(out + patch, -tl.sum(part * tl.log2(part + 1e-10)))


def patch_entropy(
    pixels: Tensor, mean: Tensor | None = None, std: Tensor | None = None, *, size: tuple[int, int] | None = None
) -> Tensor:
    """Implement `vtc.kernels.patch_entropy`."""
    pictures, (height, width), shape = as_pictures(pixels, mean, std, size)
    if height * width > _MAX_PIXELS:
        raise NoKernelError(f"patches have at most {_MAX_PIXELS} pixels, these have {height * width}")
    if pictures.stride(3) != 1:
        pictures = pictures.contiguous()
    rows, columns = pictures.shape[2] // height, pictures.shape[3] // max(1, width)
    out = pixels.new_empty(shape, dtype=torch.float32)
    if not pictures.numel():
        return out.zero_()
    _patch_entropy[(len(pictures) * rows * columns,)](
        pictures, None if mean is None else mean.float().contiguous(),
        None if std is None else std.float().contiguous(), out,
        rows * columns, columns, pictures.shape[1], height, width, 0.3333 * 3 / pictures.shape[1],
        *pictures.stride()[:3], NORMALISED=mean is not None, PIXELS=triton.next_power_of_2(height * width),
        num_warps=2,
    )  # fmt: skip
    return out


_SIZES = ("per_picture", "per_row", "channels", "height", "width", "p_n", "p_c", "p_y")
_POINTERS = {"pixels": "*bf16", "mean": "*fp32", "std": "*fp32", "out": "*fp32"}

KERNELS = [
    KernelSpec(
        _patch_entropy,
        _POINTERS | {"share": "fp32"} | dict.fromkeys(_SIZES, "i32"),
        {"NORMALISED": True, "PIXELS": 256},
        num_warps=2,
        label="bf16, 14 x 14",
    )
]
