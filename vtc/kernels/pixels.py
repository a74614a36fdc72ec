"""Statistics of the pixels of image patches."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.errors import InputError

from .dispatch import op

__all__ = ["as_pictures", "patch_entropy"]

_BLOCK = 2**18
"""Pixels per block, which bounds the memory."""


@op(triton="vtc.kernels.triton_pixels:patch_entropy")
def patch_entropy(
    pixels: Tensor, mean: Tensor | None = None, std: Tensor | None = None, *, size: tuple[int, int] | None = None
) -> Tensor:
    """Compute the entropy in bits of the grey values of every patch (VFlowOpt, arXiv 2508.05211, as released).

    The grey value of a pixel is the rounded sum of 0.3333 of each of its 8-bit channels; a histogram has 256 bins.

    Parameters
    ----------
    pixels
        (..., C, P): P values in 0..1 of C channels of every patch. With `size`, images (..., C, H, W).
    mean, std
        (C,): normalisation to undo first. 8-bit values are then rounded; without it they are truncated, as released.
    size
        Height and width of a patch. Incomplete patches at the bottom and right edges are ignored.

    Returns
    -------
    Tensor
        (...) float32, between 0 and 8; for images (..., H // height * W // width), in raster order.

    Raises
    ------
    InputError
        Only one of mean and std is given, or an image is smaller than a patch.
    """
    pictures, (height, width), shape = as_pictures(pixels, mean, std, size)
    channels, rows, columns = pictures.shape[1:]
    if not pictures.numel():
        return pixels.new_zeros(shape, dtype=torch.float32)
    entropy = []
    for some in pictures.split(max(1, _BLOCK // (rows * columns))):
        levels = some.float()
        if mean is None or std is None:
            levels = (levels * 255).trunc_()
        else:
            levels = torch.addcmul(mean[:, None, None].float(), levels, std[:, None, None].float()).mul_(255).round_()
        grey = levels.clamp_(0, 255).mul_(0.3333 * 3 / channels).sum(dim=1).round_().clamp_(0, 255).long()
        patches = grey.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3).flatten(3).flatten(0, 2)
        bins = patches + torch.arange(len(patches), device=patches.device)[:, None] * 256
        share = torch.bincount(bins.flatten(), minlength=256 * len(patches)).view(-1, 256) / (height * width)
        entropy.append(-(share * (share + 1e-10).log2()).sum(dim=-1))
    return torch.cat(entropy).view(shape)


def as_pictures(
    pixels: Tensor, mean: Tensor | None, std: Tensor | None, size: tuple[int, int] | None
) -> tuple[Tensor, tuple[int, int], tuple[int, ...]]:
    """Check the arguments of `patch_entropy` and convert the pixels to images of whole patches.

    Returns
    -------
    Tensor (N, C, H, W)
        A view of whole patches; without a size, N patches of a single row of pixels.
    (int, int)
        Size of a patch.
    tuple of int
        Shape of the result.
    """
    if (mean is None) != (std is None):
        raise InputError("patch_entropy: give mean and std both, or neither.")
    if size is None:
        patches = pixels.flatten(0, -3) if pixels.ndim > 2 else pixels[None]
        return patches[:, :, None], (1, pixels.shape[-1]), pixels.shape[:-2]
    height, width = size
    rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
    if not rows * columns:
        raise InputError(f"patch_entropy: pictures of {tuple(pixels.shape[-2:])} hold no patch of {size}.")
    whole = pixels[..., : rows * height, : columns * width]
    pictures = whole.flatten(0, -4) if pixels.ndim > 3 else whole[None]
    return pictures, size, (*pixels.shape[:-3], rows * columns)
