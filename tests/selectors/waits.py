"""Counts the places where a GPU would make the host wait, on a CPU."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

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


class _Operators(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _WAITING or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            self.seen.append(_described(name))
        elif name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and self._by_mask(name, args):
            self.seen.append(_described(f"{name} by a mask"))
        return func(*args, **kwargs)

    @staticmethod
    def _by_mask(name: str, args: Any) -> bool:
        masks = [x for x in args[1] if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
        # One value at all places of one mask is filled in without asking how many there are.
        return bool(masks) and not (name != "aten::index" and len(args[1]) == 1 and args[2].numel() == 1)


class _Functions(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if func in _READING or (copied and not isinstance(args[0], torch.Tensor)):
            self.seen.append(_described(getattr(func, "__name__", str(func))))
        return func(*args, **kwargs)


def _described(what: str) -> str:
    """The call, and the line of the package that made it."""
    own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(_ROOT / "vtc"))]
    where = f" in {Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line}" if own else ""
    return what + where


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Collect what a GPU would wait for, in a `with` block."""
    seen: list[str] = []
    with _Functions(seen), _Operators(seen):
        yield seen
