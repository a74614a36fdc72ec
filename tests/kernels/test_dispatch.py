"""Which implementation runs: the chosen one, or an error that lists what is available."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vtc
from vtc import kernels
from vtc.errors import ConfigError, KernelError
from vtc.kernels import dispatch
from vtc.kernels.dispatch import NoKernelError, chosen, op, use


def who_triton(x: torch.Tensor, picky: bool = False) -> str:
    if picky:
        raise NoKernelError("the kernel is picky")
    return "triton"


@pytest.fixture
def which(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """An operation that returns the name of the implementation that ran."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)

    @op(triton=f"{__name__}:who_triton")
    def who(x: torch.Tensor, picky: bool = False) -> str:
        return "torch"

    yield who
    del dispatch.OPS["who"]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    monkeypatch.setattr(dispatch, "_installed", lambda: True)


@pytest.fixture
def compiled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "_installed", lambda: True)


X = torch.ones(3)


def test_auto_leaves_a_cpu_to_pytorch(which, interpreted) -> None:
    assert which(X) == "torch"


def test_auto_takes_the_kernel_on_a_gpu(which, interpreted, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_check", lambda this, choice, tensors: None)
    assert which(X) == "triton"
    assert which(X, picky=True) == "torch", "a case that the kernel does not cover"


def test_use_holds_inside_its_block(which, interpreted) -> None:
    with use("triton"):
        assert which(X) == which(x=X) == "triton"
        with use("torch"):
            assert which(X) == "torch"
        assert which(X) == "triton"
    assert which(X) == "torch"


def test_use_is_undone_by_an_exception(which, interpreted) -> None:
    with pytest.raises(ZeroDivisionError), use("triton"):
        raise ZeroDivisionError
    assert chosen() == "auto"


def test_use_holds_in_its_own_thread_alone(which, interpreted) -> None:
    inside: list[str] = []
    with use("triton"):
        thread = threading.Thread(target=lambda: inside.append(which(X)))
        thread.start()
        thread.join()
        assert which(X) == "triton"
    assert inside == ["torch"]


def test_the_variable_is_read_at_every_call(which, interpreted, monkeypatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert which(X) == "triton"
    with use("torch"):
        assert which(X) == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "gpu")
    with pytest.raises(ConfigError, match=r"VTC_KERNELS is one of auto, torch, triton; got 'gpu'"):
        which(X)


def test_an_unknown_choice_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="got 'cuda'"):
        use("cuda")


def test_triton_that_is_not_installed_is_refused(which, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda: False)
    with pytest.raises(KernelError, match="not installed"):
        use("triton")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(KernelError, match=r"who: .*VTC_KERNELS=triton"):
        which(X)


def test_a_cpu_without_the_interpreter_is_refused(which, compiled_only) -> None:
    with use("triton"), pytest.raises(KernelError, match=r"the tensors are on cpu.*TRITON_INTERPRET=1"):
        which(X)


def test_other_devices_are_refused(which, interpreted) -> None:
    with use("triton"), pytest.raises(KernelError, match="on meta, kernels need a GPU"):
        which(torch.ones(3, device="meta"))


def test_other_dtypes_are_refused(which, interpreted) -> None:
    with use("triton"), pytest.raises(KernelError, match="these tensors are float64"):
        which(X.double())
    with use("triton"):
        assert which(X.long()) == which(X.half()) == which(X.bfloat16()) == "triton"


def test_gradients_are_refused(which, interpreted) -> None:
    with use("triton"), pytest.raises(KernelError, match="no_grad"):
        which(X.clone().requires_grad_())
    with use("triton"), torch.no_grad():
        assert which(X.clone().requires_grad_()) == "triton"


def test_a_case_without_a_kernel_is_refused(which, interpreted) -> None:
    with use("triton"), pytest.raises(KernelError, match=r"the kernel is picky\. Operations with a kernel: .*who"):
        which(X, picky=True)


def test_an_operation_without_a_kernel_is_refused(which, interpreted) -> None:
    @op()
    def bare(x: torch.Tensor) -> str:
        return "torch"

    try:
        assert bare(X) == "torch"
        with use("triton"), pytest.raises(KernelError, match=r"bare: .*has none"):
            bare(X)
    finally:
        del dispatch.OPS["bare"]


def test_every_operation_is_public() -> None:
    assert set(dispatch.OPS) <= set(kernels.__all__)
    assert issubclass(KernelError, vtc.VtcError)


def test_importing_brings_no_triton() -> None:
    # transformers imports Triton through PyTorch's compiler, so the parts that do not use it are imported alone.
    code = """
import sys, types
import torch

package = types.ModuleType("vtc")
package.__path__ = [sys.argv[1]]
sys.modules["vtc"] = package
import vtc.kernels, vtc.kernels.aot, vtc.selectors

assert "transformers" not in sys.modules
assert "triton" not in sys.modules, "imported"
vtc.kernels.max_sum(torch.ones(3, 3), 2, 0)
assert "triton" not in sys.modules, "imported by a call on a CPU"
"""
    command = [sys.executable, "-c", code, str(Path(vtc.__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_everything_loads_no_kernel() -> None:
    code = "import sys, vtc, vtc.cli; sys.exit(any(name.startswith('vtc.kernels.triton_') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
