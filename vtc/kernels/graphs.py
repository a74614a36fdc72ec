"""Greedy picks as one launch: what a function launches on a GPU is recorded once per shape and then replayed.

A greedy operation launches a few kernels per pick. Each reads all rows once, which takes a GPU less time than Python
needs to launch it. A CUDA graph has the device launch them one after the other. It is recorded when a function is
called with the same shapes for the second time: what is called once, as with pictures of ever new sizes, costs nothing
more.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch
from torch import Tensor

__all__ = ["clear", "off", "replayed"]

_GRAPHS = 8
"""How many functions and shapes are remembered; the one that was used least recently is forgotten."""

_BYTES = 2**26
"""Most bytes of a function's tensors, of which a graph keeps a copy. Reading more at every pick takes longer than a
launch, so that nothing is gained."""

_OFF: ContextVar[bool] = ContextVar("vtc_graphs_off", default=False)
_LOCK = threading.Lock()

P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class _Graph:
    """Recorded launches: `replay` computes `result` from `buffers`."""

    buffers: Sequence[Tensor]
    replay: Callable[[], None]
    result: Tensor


@dataclass
class _Entry:
    """What is remembered of a function and the shapes of its tensors.

    Attributes
    ----------
    calls
        So far.
    graph
        None before the second call, and where recording has failed.
    lock
        Held while buffers are filled and read.
    """

    calls: int = 0
    graph: _Graph | None = None
    lock: Any = field(default_factory=threading.Lock)


_ENTRIES: OrderedDict[Hashable, _Entry] = OrderedDict()


def replayed(
    when: Callable[[Tensor], bool] = lambda x: True,
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Let a function of tensors and numbers, which reads no value on the host, replay its launches on a GPU.

    Parameters
    ----------
    when
        Whether that is so, given the first argument, a tensor.
    """

    def mark(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            values = (*args, *(kwargs[name] for name in sorted(kwargs)))
            tensors = [value for value in values if isinstance(value, Tensor)]
            if _OFF.get() or not _applies(tensors) or not when(tensors[0]):
                return function(*args, **kwargs)
            key = (function, tuple(sorted(kwargs)), *map(_described, values), _stream(tensors[0]))
            entry = _entry(key)
            with entry.lock:
                entry.calls += 1
                if entry.calls == 2:
                    entry.graph = _recorded(function, args, kwargs)
                if entry.graph is None:
                    return function(*args, **kwargs)
                for buffer, tensor in zip(entry.graph.buffers, tensors, strict=True):
                    buffer.copy_(tensor)
                entry.graph.replay()
                return entry.graph.result.clone()

        return run

    return mark


@contextmanager
def off() -> Iterator[None]:
    """Launch everything from the host inside a ``with`` block, for comparison."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def clear() -> None:
    """Forget all graphs, and free their memory."""
    with _LOCK:
        _ENTRIES.clear()


def _entry(key: Hashable) -> _Entry:
    """Return what is known by a key."""
    with _LOCK:
        entry = _ENTRIES.setdefault(key, _Entry())
        _ENTRIES.move_to_end(key)
        while len(_ENTRIES) > _GRAPHS:
            _ENTRIES.popitem(last=False)
    return entry


def _described(value: Any) -> Hashable:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value


def _stream(x: Tensor) -> int:
    """Return the queue that the host fills: the tensors of a graph are those of one queue."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0


def _applies(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are small and on one GPU, and nothing else is being recorded or traced."""
    if not all(x.is_cuda and x.device == tensors[0].device for x in tensors) or _size(tensors) > _BYTES:
        return False
    return not (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _recorded(function: Callable[..., Tensor], args: Any, kwargs: Any) -> _Graph | None:
    """Record the launches of a function; None, and a warning, where that fails."""
    buffers: list[Tensor] = []

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        buffers.append(torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value))
        return buffers[-1]

    with torch.inference_mode(False), torch.no_grad():
        own_args, own_kwargs = [own(value) for value in args], {name: own(kwargs[name]) for name in sorted(kwargs)}
        try:
            return _Graph(buffers, *_record(lambda: function(*own_args, **own_kwargs), buffers[0].device))
        except RuntimeError as error:
            name = function.__name__
            warnings.warn(f"{name} is launched by the host: no CUDA graph could be recorded ({error}).", stacklevel=3)
            return None


def _record(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Return what replays the launches of `work`, and where its result is then."""
    work()  # so that whatever has to be compiled or loaded for these very tensors is
    graph = torch.cuda.CUDAGraph()
    # A stream of its own, because PyTorch's is one of the first GPU that ever recorded; and the present one again
    # behind it, which `torch.cuda.graph` does not see to where recording fails. Other threads may allocate meanwhile.
    with (
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        result = work()
    return graph.replay, result
