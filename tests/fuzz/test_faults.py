"""Every part of the engine fails once, every tensor operation runs out of memory, commands are interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import vtc.reference
from tests import tiny
from tests.fuzz import faults, interrupts
from tests.fuzz.models import forget_what_is_open

CACHE = "uniform 0.6 at decoder+uniform 0.6 at decoder:2+uniform 0.5 at cache"
CASES = [
    ("llava", "divprune+fastv", "greedy"),
    ("llava", "vtc-cls", "beams"),
    ("llava", CACHE, "greedy"),
    ("qwen3_vl", "fastv", "greedy"),
    ("qwen2_5_vl", "vflowopt", "static-cache"),
    ("internvl", "todre", "no-cache"),
    ("gemma3", "aim", "greedy"),
    ("llava_next_video", "todre", "turns"),
]


@pytest.fixture(autouse=True)
def _whatever_a_failed_test_left_open() -> Iterator[None]:
    yield
    forget_what_is_open()


def patient_of(family: str, setting: str, way: str) -> faults.Patient:
    line = tiny.family(family)
    return faults.Patient(line, faults.setting_of(line, setting), way)


@pytest.mark.parametrize(("family", "setting", "way"), CASES[:6])
def test_any_part_may_raise_during_a_call(family: str, setting: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list(faults.fail_in_calls(patient_of(family, setting, way), monkeypatch, most=1))
    assert len(tried) > 20


@pytest.mark.parametrize(("family", "setting", "way"), CASES)
def test_any_operation_may_find_no_memory(family: str, setting: str, way: str) -> None:
    tried = list(faults.run_out_of_memory(patient_of(family, setting, way), stride=149))
    assert len(tried) > 2


@pytest.mark.parametrize("earlier", [None, "random", "fastv"])
@pytest.mark.parametrize(("family", "setting"), [("llava", "divprune+fastv"), ("qwen3_vl", "fastv")])
def test_any_part_may_raise_during_compress(
    family: str, setting: str, earlier: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = patient_of(family, setting, "greedy")
    before = None if earlier is None else faults.setting_of(patient.family, earlier)
    tried = list(faults.fail_in_compress(patient, monkeypatch, before))
    assert len(tried) > 8


@pytest.mark.skipif(not vtc.reference.available(), reason="vtc-reference is not installed")
@pytest.mark.parametrize(("command", "after"), [("ask", 3.0), ("video", 2.5), ("calibrate", 3.5)])
def test_an_interrupt_is_a_line(command: str, after: float, tmp_path: Path) -> None:
    interrupts.prepare(tmp_path)
    (line,) = [known for known in interrupts.COMMANDS if known.name == command]
    interrupts.check_interrupt(line, tmp_path, after)
