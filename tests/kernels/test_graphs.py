"""Which launches are recorded and replayed; the recorder is replaced, as there is no GPU here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vtc import kernels
from vtc.kernels import cosines, graphs, greedy


class Recorder:
    """Runs again what was recorded, on the tensors that it was recorded with, into the same result."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = work()

        def replay() -> None:
            self.replays += 1
            result.copy_(work())

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_record", recorder)
    monkeypatch.setattr(graphs, "_applies", lambda tensors: graphs._size(tensors) <= graphs._BYTES)
    graphs.clear()
    yield recorder
    graphs.clear()


@graphs.replayed()
def scaled(x: Tensor, by: int = 1, other: Tensor | None = None) -> Tensor:
    """By number and, where given, by tensor."""
    return x * by if other is None else x * by * other


def test_the_second_call_with_a_shape_is_recorded_and_later_ones_are_replayed(recorder: Recorder) -> None:
    results = [scaled(torch.full((3,), float(number)), 2) for number in range(4)]
    assert [result.tolist() for result in results] == [[2.0 * number] * 3 for number in range(4)]
    assert (recorder.recorded, recorder.replays) == (1, 3), "the first is not, and no result is written over"


def test_other_shapes_numbers_and_arguments_are_others(recorder: Recorder) -> None:
    x = torch.ones(3)
    for work in (
        lambda: scaled(x, 2),
        lambda: scaled(x, 3),
        lambda: scaled(x.double(), 2),
        lambda: scaled(x[:2], 2),
        lambda: scaled(x, 2, x),
        lambda: scaled(x, other=x, by=2),
    ):
        assert torch.equal(work(), work())
    assert recorder.recorded == 6
    assert scaled(x, other=3 * x, by=2).tolist() == [6.0] * 3
    assert recorder.recorded == 6


def test_what_was_used_least_recently_is_forgotten(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_GRAPHS", 2)
    for by in (1, 1, 2, 1, 3, 1, 2):  # 2 is forgotten for 3
        scaled(torch.ones(2), by)
    assert recorder.recorded == 1


def test_what_is_large_or_off_or_inside_another_is_not_recorded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with graphs.off():
        for _ in range(3):
            scaled(torch.ones(2))
    monkeypatch.setattr(graphs, "_BYTES", 7)
    for _ in range(3):
        scaled(torch.ones(2))
    assert recorder.recorded == 0


def test_results_outlive_inference_mode(recorder: Recorder) -> None:
    with torch.inference_mode():
        scaled(torch.ones(2))
        scaled(torch.ones(2))
    assert scaled(torch.full((2,), 5.0)).tolist() == [5.0, 5.0]


def test_a_failure_is_told_once_and_costs_nothing_else(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("no capture")

    monkeypatch.setattr(graphs, "_record", fail)
    scaled(torch.ones(2))
    with pytest.warns(UserWarning, match=r"scaled is launched by the host: .*no capture"):
        assert scaled(torch.ones(2)).tolist() == [1.0, 1.0]
    assert scaled(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["coverage_greedy", "weighted_coverage", "multimodal_coverage"])
def test_coverages_are_recorded_where_they_read_nothing(
    name: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "queues", lambda x: True)
    generator = torch.Generator().manual_seed(0)

    def arguments() -> tuple[object, ...]:
        x = torch.randn(40, 8, generator=generator)
        more = {
            "coverage_greedy": (torch.rand(40, generator=generator),),
            "weighted_coverage": (torch.rand(40, generator=generator),),
            "multimodal_coverage": (torch.randn(3, 8, generator=generator), x, 0.5, 0.02, 0.2),
        }
        return x, 7, *more[name]

    operation = getattr(kernels, name)
    for _ in range(4):
        given = arguments()
        with graphs.off():
            expected = operation(*given)
        assert torch.equal(operation(*given), expected)
    assert (recorder.recorded, recorder.replays) == (1, 3)
    monkeypatch.setattr(cosines, "WORKSPACE", 0)  # rows on demand, which asks
    for _ in range(3):
        operation(*arguments())
    assert recorder.replays == 3
