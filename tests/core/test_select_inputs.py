"""What `select` takes for tensors and numbers, and what it refuses, by every method: no error from inside torch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import vtc
from tests.selectors.inputs import SELECTING
from vtc.core.observations import TokenGrids
from vtc.errors import ConfigError, InputError, VtcError
from vtc.functional import select
from vtc.registry import get_selector

N = 16
LOOP: list[Any] = []
LOOP.append(LOOP)

# From a float tensor to what a user may hold instead.
TAKEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "lists": lambda x: x.tolist(),
    "list of tensors": list,
    "list of arrays": lambda x: list(x.numpy()),
    "read-only array": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "reversed array": lambda x: x.flip(0).numpy()[::-1],
    "float64": lambda x: x.double(),
    "trained": lambda x: x.clone().requires_grad_(),
}
INTEGERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "uint16 array": lambda x: x.numpy().astype(np.uint16),
    "list of int": lambda x: x.long().tolist(),
}
REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "bool": lambda x: x > 0.5,
    "bool array": lambda x: x.numpy() > 0.5,
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "object array": lambda x: x.numpy().astype(object),
    "text array": lambda x: x.numpy().astype(str),
    "text": lambda x: "text",
    "bytes": lambda x: b"bytes",
    "mapping": lambda x: {"a": x},
    "ragged": lambda x: [[1.0], [2.0, 3.0]],
    "loop": lambda x: LOOP,
    "number": lambda x: 3.0,
    "numpy number": lambda x: np.float32(3),
    "long": lambda x: 10**5000,
    "nothing in it": lambda x: x[..., :0],
    "none in it": lambda x: [None] * len(x),
    "object": lambda x: object(),
    "huge": lambda x: x.double() * 1e300 + 1e300,
}  # fmt: skip


def inputs(method: str) -> dict[str, torch.Tensor]:
    """Features and all signals of a method, whole numbers so that integers mean the same."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randint(1, 9, shape, generator=generator).float()

    sizes = {"N": N, "D": 8}
    found = {"features": drawn(N, 8)}
    for signal in get_selector(method).stages()[0].requires:
        if signal.reads is not TokenGrids:
            found[signal.name] = drawn(*(sizes.get(axis, int(axis) if axis.isdecimal() else 2) for axis in signal.axes))
    return found


@pytest.mark.parametrize("method", SELECTING)
def test_arrays_lists_and_integers_select_what_tensors_do(method: str) -> None:
    given = inputs(method)
    whole = select(method, keep_tokens=4, grid_thw=(1, 4, 4), **given)
    for kind, make in (TAKEN | INTEGERS).items():
        other = {name: make(value) for name, value in given.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = select(method, keep_tokens=4, grid_thw=np.array([1, 4, 4]), **other)
        assert torch.equal(found.keep, whole.keep), kind


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that quantised tensors are deprecated
@pytest.mark.parametrize("method", SELECTING)
def test_what_holds_no_real_numbers_is_refused_by_name(method: str) -> None:
    given = inputs(method)
    for name in given:
        for kind, make in REFUSED.items():
            with pytest.raises(InputError, match=name) as caught:
                select(method, keep_tokens=4, **(given | {name: make(given[name])}))
            assert len(str(caught.value)) < 600, kind


@pytest.mark.parametrize("method", SELECTING)
def test_numbers_of_numpy_are_numbers(method: str) -> None:
    given = inputs(method)
    shared = {"seed": 3, "structural": 2, "other_visuals": 1}
    others = {name: np.int64(value) for name, value in shared.items()}
    for budget, other in (({"keep_tokens": 4}, np.int64(4)), ({"keep_ratio": 0.25}, np.float32(0.25))):
        found = select(method, **given, **others, **dict.fromkeys(budget, other))  # type: ignore[arg-type]
        assert torch.equal(found.keep, select(method, **given, **shared, **budget).keep)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", 1j, float("nan"), [], torch.tensor(3), np.bool_(True), 10**5000],
                         ids=lambda value: type(value).__name__)  # fmt: skip
@pytest.mark.parametrize("name", ["keep_tokens", "keep_ratio", "seed", "structural", "other_visuals"])
def test_odd_numbers_are_refused_by_name(name: str, value: Any) -> None:
    budget = {} if name.startswith("keep") else {"keep_tokens": 2}
    with pytest.raises(ConfigError, match=name):
        select("random", features=torch.rand(4, 2), **budget, **{name: value})


@pytest.mark.parametrize(
    "grid",
    [(-1, -4, 1), (10**30, 1, 1), (2**20, 2**20, 1), [], torch.ones(3, dtype=torch.long, device="meta"),
     {"t": 1}, np.array([1.0, 2.0, 2.0]), ((1, 2, 2), (1, 2)), LOOP],
    ids=range(9),
)  # fmt: skip
def test_odd_grids_are_refused(grid: Any) -> None:
    with pytest.raises(InputError, match="grid_thw must be"):
        select("uniform", grid_thw=grid, keep_tokens=1)


@pytest.mark.parametrize("signals", [[], "x", 3, {1: 2}, {int: 1}, {"cls_attention": 1}, {vtc.Signal: torch.rand(4)}])
def test_signals_are_a_mapping_of_signals(signals: Any) -> None:
    with pytest.raises(ConfigError, match="signals maps types of signals to tensors"):
        select("random", features=torch.rand(4, 2), keep_tokens=2, signals=signals)


def test_features_have_two_axes_and_unknown_names_are_named() -> None:
    for features in (torch.rand(4), torch.rand(1, 4, 2)):
        with pytest.raises(InputError, match="features must have 2 axes"):
            select("random", features=features, keep_tokens=2)
    for value in (torch.rand(4), np.zeros(4), [1]):
        with pytest.raises(ConfigError, match="divprune reads no signal and has no option zzz"):
            select("divprune", features=torch.rand(4, 2), keep_tokens=2, zzz=value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(20))
def test_random_mixtures_never_end_inside_torch(seed: int) -> None:
    drawn = random.Random(seed)
    numbers = [np.int64(3), np.float32(0.5), True, -1, 10**30, 1.5, "3", None, [], {}, 2**63 - 1, np.uint64(2**63)]
    for _ in range(60):
        method = drawn.choice(SELECTING)
        given: dict[str, Any] = dict(inputs(method))
        for name, value in inputs(method).items():
            if drawn.random() < 0.2:
                given[name] = drawn.choice([*TAKEN.values(), *INTEGERS.values(), *REFUSED.values()])(value)
        for name in ("seed", "structural", "other_visuals", *get_selector(method).options()):
            if drawn.random() < 0.1:
                given[name] = drawn.choice(numbers)
        given[drawn.choice(["keep_tokens", "keep_ratio"])] = drawn.choice([1, 4, 0.5, *numbers])
        try:
            kept = select(method, **given).keep
        except VtcError:
            continue
        assert kept.tolist() == sorted(set(kept.tolist()))
