"""Tensors that the host knows: copied to a device without waiting for it, and back without a copy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import queues

__all__ = ["on_host", "remembered", "upload"]

_TWINS = WeakTensorKeyDictionary()  # a tensor on a device to the one on the host that it is a copy of


def upload(x: Tensor, device: torch.device | str | None) -> Tensor:
    """Return `x`, a tensor on the host, on a device, which is not waited for."""
    if device is None:
        return x
    where = torch.device(device)
    return (x.pin_memory() if where.type == "cuda" else x).to(where, non_blocking=True)


def remembered(x: Tensor, device: torch.device | str | None) -> Tensor:
    """Do what `upload` does, so that `on_host` returns `x` again as long as the copy is alive."""
    copy = upload(x, device)
    if copy is not x:
        _TWINS[copy] = x
    return copy


def on_host(x: Tensor) -> Tensor:
    """Return `x` on the host. A device is waited for, once, unless the host has it: see `remembered`."""
    if not queues(x):
        return x
    twin = _TWINS.get(x)
    return x.cpu() if twin is None else twin
