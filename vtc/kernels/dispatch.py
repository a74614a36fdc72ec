"""Dispatch of operations to their PyTorch or Triton implementation.

Every operation is a PyTorch function decorated with `op`, which names its Triton implementation: a function of the same
signature in a module that is imported on first use. The choice is made at every call: by `use`, else by the environment
variable ``VTC_KERNELS``, else "auto". Importing this module detects nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch

from vtc.errors import ConfigError, KernelError

__all__ = ["CHOICES", "OPS", "VARIABLE", "NoKernelError", "Op", "chosen", "interpreting", "op", "queues", "use"]

CHOICES = ("auto", "torch", "triton")
VARIABLE = "VTC_KERNELS"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHOICE: ContextVar[str | None] = ContextVar("vtc_kernels", default=None)

P = ParamSpec("P")
R = TypeVar("R")


class NoKernelError(Exception):
    """Raised by a Triton implementation, before any launch, for arguments that it does not support.

    Users never see it: "auto" falls back to PyTorch, and an explicit "triton" raises a `KernelError` with its reason.
    """


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes
    ----------
    name : str
    torch : callable
        The PyTorch implementation.
    triton : str or None
        "module:function" of the Triton implementation.
    """

    name: str
    torch: Callable[..., Any]
    triton: str | None

    def load_triton(self) -> Callable[..., Any]:
        """Import and return the Triton implementation."""
        if self.triton is None:
            raise NoKernelError("the operation has none")
        module, _, name = self.triton.partition(":")
        return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


OPS: dict[str, Op] = {}
"""Every operation by its name."""


def op(triton: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a PyTorch function as an operation, optionally with a Triton implementation.

    Parameters
    ----------
    triton
        "module:function" of the Triton implementation. It takes the same arguments, with float tensors in float32,
        float16 or bfloat16 and all tensors on one device, and raises `NoKernelError` for arguments that it does not
        support.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        this = OPS[function.__name__] = Op(function.__name__, function, triton)

        @functools.wraps(function)
        def operation(*args: P.args, **kwargs: P.kwargs) -> R:
            choice = chosen()
            if choice == "torch":
                return function(*args, **kwargs)
            try:
                tensors = list(_tensors(args, kwargs))
                _check(this, choice, tensors)
                with torch.cuda.device_of(
                    tensors[0]
                ):  # Triton launches on the current GPU, whatever its tensors are on
                    return cast("R", this.load_triton()(*args, **kwargs))
            except NoKernelError as reason:
                if choice != "auto":
                    raise KernelError(_refusal(this, reason)) from None
            # Outside of `except`, so that later errors are not chained to the missing kernel.
            return function(*args, **kwargs)

        return operation

    return mark


def use(choice: str) -> AbstractContextManager[None]:
    """Choose the implementation of all operations inside a ``with`` block, for this thread (or task) only.

    Parameters
    ----------
    choice
        "torch"; "triton", which raises an error where no kernel can run; or "auto", which runs kernels on a GPU where
        the operation has one and PyTorch otherwise.

    Raises
    ------
    ConfigError
        The choice is none of these.
    KernelError
        The choice is "triton" and Triton is not installed.

    Examples
    --------
    >>> with vtc.kernels.use("torch"):
    ...     vtc.kernels.farthest_point(features, 64)
    """
    _known(choice, "vtc.kernels.use()")
    if choice == "triton" and not _installed():
        raise KernelError(f"vtc.kernels.use('triton'): {_NOT_INSTALLED}")
    return _chosen(choice)


@contextmanager
def _chosen(choice: str) -> Iterator[None]:
    token = _CHOICE.set(choice)
    try:
        yield
    finally:
        _CHOICE.reset(token)


def chosen() -> str:
    """Return the current choice: of `use`, else of the environment, else "auto"."""
    choice = _CHOICE.get()
    if choice is not None:
        return choice
    choice = os.environ.get(VARIABLE) or "auto"
    _known(choice, f"the environment variable {VARIABLE}")
    return choice


def _known(choice: str, where: str) -> None:
    if choice not in CHOICES:
        raise ConfigError(f"{where} is one of {', '.join(CHOICES)}; got {choice!r}.")


_NOT_INSTALLED = "Triton is not installed here; `pip install triton`, or use 'auto' or 'torch'."


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Return whether Triton runs kernels in its interpreter, which accepts CPU tensors; imports Triton."""
    if not _installed():
        return False
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(language.cdiv, InterpretedFunction)  # decided when Triton was imported, not by the variable now


def queues(x: torch.Tensor) -> bool:
    """Return whether operations on `x` are queued, so that reading a value makes the host wait for those before it."""
    return x.device.type != "cpu"


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def _check(this: Op, choice: str, tensors: list[torch.Tensor]) -> None:
    """Raise `NoKernelError` unless a kernel supports these tensors and, for "auto", they are on a GPU."""
    if this.triton is None:
        raise NoKernelError("the operation has none")
    kinds = sorted({tensor.device.type for tensor in tensors})
    if kinds != ["cuda"]:
        where = f"the tensors are on {' and '.join(kinds) or 'no device'}"
        if choice == "auto" or kinds != ["cpu"]:
            raise NoKernelError(f"{where}, kernels need a GPU")
        if not interpreting():
            raise NoKernelError(
                f"{where}, kernels need a GPU, or, for tests, TRITON_INTERPRET=1 in the environment before Triton is "
                "imported"
            )
    if not _installed():
        raise NoKernelError(_NOT_INSTALLED)
    odd = {tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}.difference(_DTYPES)
    if odd:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in odd))
        raise NoKernelError(f"kernels take float32, float16 and bfloat16, these tensors are {names}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NoKernelError("kernels have no gradients, and one is recorded here; call under torch.no_grad()")


def _refusal(this: Op, reason: NoKernelError) -> str:
    there = sorted(name for name, other in OPS.items() if other.triton is not None)
    return (
        f"{this.name}: a Triton kernel was asked for by vtc.kernels.use('triton') or {VARIABLE}=triton, but "
        f"{str(reason).rstrip('.')}. Operations with a kernel: {', '.join(there) or 'none'}. Use 'auto' or 'torch'."
    )
