"""A GPU that is not there: tensors say that they are on "cuda:0", lie on the host, and are computed with there.

What a GPU does not forgive fails here as well: operands of which one is on the host. What makes the host wait is noted:
a value that is read, a size that only a result tells, copies between the two that are not told to go on.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vtc.kernels import dispatch, graphs

__all__ = ["GPU", "Wait", "pretended", "to_gpu"]

GPU = torch.device("cuda", 0)
_PACKAGES = Path(torch.__file__).parents[1]
_OWN = Path(__file__).parents[1]
_HOST = torch.device("cpu")

_READING = {
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

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


@dataclass(frozen=True)
class Wait:
    """One time at which the host would wait: the operator, and the line outside of PyTorch that called it."""

    operator: str
    file: str
    line: int
    text: str

    @property
    def own(self) -> bool:
        """Whether a line of this package waits."""
        return self.file.startswith("vtc/")

    def __str__(self) -> str:
        return f"{self.operator} in {self.file}:{self.line}: {self.text}"


class _OnGpu(torch.Tensor):
    """A tensor on the pretended GPU; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _OnGpu:
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=GPU, requires_grad=inner.requires_grad,
        )  # fmt: skip
        self.inner = inner
        return self

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: a tensor outlived its pretended GPU")

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Pretending(TorchDispatchMode):
    """Runs every operator on the host and keeps the accounts."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in leaves if isinstance(x, _OnGpu)]
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = _HOST if torch.device(target).type == "cuda" else target
        lands = bool(there) if target is None else torch.device(target).type == "cuda"
        if there or lands:
            if "pin_memory" in kwargs:
                kwargs["pin_memory"] = None
            self._account(name, args, kwargs, leaves, there, lands)
        if name == "aten::_fused_sdp_choice" and there:
            return 0  # the composite, of operators that are counted
        if torch.Tag.inplace_view in func.tags and there:
            with no_dispatch():
                func(*args, **kwargs)  # the shape that is told
        wrappers = {id(x.inner): x for x in there}
        result = func(*tree_map_only(_OnGpu, _inner, args), **tree_map_only(_OnGpu, _inner, kwargs))
        if not lands:
            return result
        if name == "aten::copy_":
            return args[0]
        return tree_map_only(torch.Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else _wrap(x), result)

    def _account(self, name: str, args: Any, kwargs: Any, leaves: Any, there: Any, lands: bool) -> None:
        here = [x for x in leaves if not isinstance(x, _OnGpu) and x.ndim]
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if name == "aten::copy_" else args[0]
            onto = isinstance(args[0], _OnGpu) if name == "aten::copy_" else lands
            going = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            if isinstance(source, _OnGpu) != onto and not (going and (not onto or _pinned(source))):
                self._wait(name)
            return
        if name in _INDEXING and there:
            masks = [x for x in args[1] if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
            filled = name not in ("aten::index", "aten::_unsafe_index") and len(args[1]) == 1 and args[2].numel() == 1
            if masks and not filled:
                self._wait(f"{name} by a mask")
            on_host = [x for x in args[1] if isinstance(x, torch.Tensor) and not isinstance(x, _OnGpu)]
            if on_host and isinstance(args[0], _OnGpu):
                self._wait(f"{name} by indices of the host")
            here = [x for x in here if not any(x is index for index in on_host)]
        if there and name in _READING:
            self._wait(name)
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self._wait(name)
        if there and here:
            shapes = [tuple(x.shape) for x in here]
            raise RuntimeError(f"{name}: expected all tensors on one device, those of {shapes} are on the host")
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")

    def _wait(self, operator: str) -> None:
        if _RECORDING:
            raise RuntimeError(f"{operator}: operation not permitted when stream is capturing")
        frame: Any = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        file = frame.f_code.co_filename
        line = linecache.getline(file, frame.f_lineno).strip()
        root = _OWN if file.startswith(str(_OWN)) else _PACKAGES
        self.waits.append(Wait(operator, file.removeprefix(f"{root}/"), frame.f_lineno, line))


_RECORDING: list[bool] = []
_PINNED: Any = torch.utils.weak.WeakIdKeyDictionary()


def _inner(x: _OnGpu) -> torch.Tensor:
    return x.inner


def _wrap(x: torch.Tensor) -> torch.Tensor:
    return x if isinstance(x, _OnGpu) else _OnGpu(x)


def _pinned(x: torch.Tensor) -> bool:
    return x in _PINNED


def to_gpu(x: Any) -> Any:
    """Put a model, in place, or tensors in any structure onto the pretended GPU."""
    if not isinstance(x, nn.Module):
        return tree_map_only(torch.Tensor, lambda t: t if isinstance(t, _OnGpu) else _OnGpu(t.detach().clone()), x)
    seen: dict[int, Any] = {}

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, _OnGpu):
            return value
        if id(value) not in seen:
            copy = _OnGpu(value.detach().clone())
            new = nn.Parameter(copy, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else copy
            seen[id(value)] = (value, new)
        return seen[id(value)][1]

    for module in x.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                table[name] = moved(value)
        for name, value in list(vars(module).items()):  # rotary tables keep a second copy that is no buffer
            if isinstance(value, torch.Tensor):
                setattr(module, name, moved(value))
    return x


def _record(work: Any, device: torch.device) -> Any:
    """Stand for `graphs._record`: what would be captured must not wait, and is computed again by a replay."""
    work()

    def captured() -> torch.Tensor:
        _RECORDING.append(True)
        try:
            return work()
        finally:
            _RECORDING.pop()

    result = captured()
    return (lambda: result.copy_(captured())), result


@contextlib.contextmanager
def _launching() -> Iterator[None]:
    """Let kernels in Triton's interpreter read and write what tensors hold."""
    if not dispatch.interpreting():
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        launch(self, *tree_map_only(_OnGpu, _inner, args), **tree_map_only(_OnGpu, _inner, kwargs))

    with mock.patch.object(GridExecutor, "__call__", launched):
        yield


@contextlib.contextmanager
def pretended() -> Iterator[list[Wait]]:
    """Pretend that there is a GPU in a `with` block, and collect what the host waits for."""
    mode = _Pretending()

    def pin(x: torch.Tensor, *_: Any) -> torch.Tensor:
        if isinstance(x, _OnGpu):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        copy = x.clone()
        _PINNED[copy] = True
        return copy

    make = torch.tensor

    def tensor(data: Any, **more: Any) -> torch.Tensor:
        def read(x: Any) -> Any:
            return [read(y) for y in x] if isinstance(x, (list, tuple)) else x.item() if isinstance(x, _OnGpu) else x

        return make(read(data), **more)

    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._ensureCUDADeviceGuardSet()
    stubs: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "current_stream": lambda *_: mock.Mock(cuda_stream=0),
        "device_of": lambda *_: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: bool(_RECORDING),
        "synchronize": lambda *_: None,
    }
    with (
        mock.patch.multiple(torch.cuda, **stubs),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(torch.Tensor, "pin_memory", pin),
        mock.patch.object(graphs, "_record", _record),
        _launching(),
        mode,
    ):
        try:
            yield mode.waits
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
            graphs.clear()
