"""Counts the places where a GPU would make the host wait, on a CPU.

Tensors that would be on a GPU are of a class of their own, which whatever is computed from them inherits. A wait is
what reads one of them on the host, asks how large a result is, or copies between the two without being told not to
wait. The host's own tensors may do all of that; computing with tensors of both sides is an error here as it is there.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROOT = Path(__file__).parents[2]

_WAITING = {
    "aten::_local_scalar_dense",  # int(), float(), bool(), item()
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
"""Operators whose result, or its size, the host needs."""

_READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
"""Functions that read a tensor, which no operator shows."""

_COPYING = {torch.tensor, torch.as_tensor, torch.Tensor.to}
"""Functions that bring a tensor of the host to a device."""


class OnDevice(torch.Tensor):
    """A tensor that would be on a GPU."""


def on_device(x: torch.Tensor) -> torch.Tensor:
    """Take a tensor for one on a GPU."""
    return x.as_subclass(OnDevice)


class _Watch:
    """What the two modes share: the waits seen, and whether a call that runs is one of the device."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on_device = False

    def add(self, what: str) -> None:
        """Note a wait, and the line of the package that made it."""
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(_ROOT / "vtc"))]
        where = f" in {Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line}" if own else ""
        self.seen.append(what + where)


class _Operators(TorchDispatchMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if self.watch.on_device:
            if name in _WAITING or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
                self.watch.add(name)
            elif name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and self._by_mask(name, args):
                self.watch.add(f"{name} by a mask")
        return func(*args, **kwargs)

    @staticmethod
    def _by_mask(name: str, args: Any) -> bool:
        masks = [x for x in args[1] if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
        # One value at all places of one mask is filled in without asking how many there are.
        return bool(masks) and not (name != "aten::index" and len(args[1]) == 1 and args[2].numel() == 1)


class _Functions(TorchFunctionMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, OnDevice)]
        here = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        name = getattr(func, "__name__", str(func))
        # Where is it to go? An argument of the device means that; the host is only ever said in words.
        places = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
        if func is torch.Tensor.to:
            comes = bool(places) and not there and len(tensors) == 1 and not kwargs.get("non_blocking")
        else:
            comes = func in _COPYING and bool(places) and not tensors
        if comes or (there and func in _READING):
            self.watch.add(name)
        if there and here and not name.startswith("__get") and func is not torch.Tensor.as_subclass:
            raise AssertionError(f"{name}: tensors {[tuple(x.shape) for x in here]} are on the host, others are not")
        before, self.watch.on_device = self.watch.on_device, bool(there)
        try:
            result = func(*args, **kwargs)
        finally:
            self.watch.on_device = before
        if there and func in _READING:
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
        if places and not there and isinstance(result, torch.Tensor):
            return on_device(result)
        return result


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Collect what a GPU would wait for, in a `with` block."""
    watch = _Watch()
    with _Functions(watch), _Operators(watch):
        yield watch.seen


def patch_queues(patch: Any) -> None:
    """Let all of the package take the code that a GPU would run, for tensors that would be on one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vtc.") and hasattr(module, "queues"):
            patch.setattr(module, "queues", lambda x: isinstance(x, OnDevice))
