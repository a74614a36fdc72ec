"""`vtc bench gpu` on a CPU: everything but what a GPU says."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, needs_triton
from vtc import kernels
from vtc.bench import _gpu, _gpu_kernels, _gpu_laws, _gpu_models, _gpu_tables, _gpu_times, _gpu_worker, tower
from vtc.bench._gpu_parts import PARTS, Part
from vtc.bench._ops import OPS, Draw
from vtc.bench._whole_models import WHOLE_MODELS
from vtc.cli import main
from vtc.errors import ConfigError, InputError
from vtc.kernels import dispatch, reference

UNRULY = Part("tests.bench.unruly", ("fine", "raises", "dies", "fine too", "hangs", "last"), limit=1.5, share=1.0)

MACHINE: dict[str, Any] = {
    "conditions": {
        "versions": {"torch": "2"},
        "machine": {"gpu": "H100", "cpu": "x", "threads": 1, "cores": 2},
        "device": "cuda",
    },
    "bytes_per_second": 3e12,
    "flops": 8e14,
    "memory_bytes": 8e10,
}


def until(seconds: float) -> _gpu.Deadline:
    return _gpu.Deadline(time.monotonic() + seconds)


class TestRunning:
    def test_a_case_costs_itself_alone(self) -> None:
        found = dict(_gpu.run_part(UNRULY, UNRULY.cases, "cpu", until(60)))
        assert list(found) == list(UNRULY.cases)
        assert {case: entry["status"] for case, entry in found.items()} == {
            "fine": "done",
            "raises": "failed",
            "dies": "failed",
            "fine too": "done",
            "hangs": "failed",
            "last": "done",
        }
        assert found["raises"]["error"].endswith("ValueError: a wrong number")
        assert found["dies"]["error"] == "ended by signal 6: last words"
        assert found["hangs"]["error"].startswith("no end within 2 s")
        own = [found[case]["result"]["process"] for case in ("fine", "fine too", "last")]
        assert len(set(own)) == 3, "a new process behind each that broke"
        assert found["fine"]["result"]["small"]

    def test_a_result_that_cannot_be_written_is_none(self) -> None:
        found = dict(_gpu.run_part(UNRULY, ("is infinite", "fine"), "cpu", until(60)))
        assert "not JSON compliant" in found["is infinite"]["error"]
        assert found["fine"]["status"] == "done"

    def test_processes_are_shared_while_nothing_breaks(self) -> None:
        found = dict(_gpu.run_part(UNRULY, ("fine", "raises", "fine too"), "cpu", until(60)))
        assert found["fine"]["result"]["process"] == found["fine too"]["result"]["process"]

    def test_several_processes_share_the_cases(self) -> None:
        found = dict(_gpu.run_side_by_side(UNRULY, ("fine", "dies", "raises", "last"), "cpu", until(60), 2))
        assert sorted(found) == ["dies", "fine", "last", "raises"]
        assert found["dies"]["status"] == found["raises"]["status"] == "failed"
        assert found["fine"]["result"]["process"] != found["last"]["result"]["process"]

    def test_an_interruption_ends_all_processes(self) -> None:
        began = time.monotonic()
        patient = dataclasses.replace(UNRULY, limit=600.0)
        running = _gpu.run_side_by_side(patient, ("fine", "hangs"), "cpu", until(600), 2)
        assert next(running)[0] == "fine"
        running.close()  # as an exception would where the results are taken
        assert time.monotonic() - began < 60

    def test_the_budget_ends_it(self) -> None:
        found = dict(_gpu.run_part(UNRULY, ("hangs", "last"), "cpu", until(1.0)))
        assert found["hangs"]["status"] in ("failed", "left out"), "left out if the process took longer to start"
        assert found["last"]["status"] == "left out"
        assert dict(_gpu.run_part(UNRULY, ("fine",), "cpu", until(0)))["fine"]["status"] == "left out"

    def test_what_cannot_start_is_told_once(self) -> None:
        found = dict(_gpu.run_part(Part("tests.bench.nowhere", ("a", "b"), 1.0, 1.0), ("a", "b"), "cpu", until(60)))
        assert [entry["status"] for entry in found.values()] == ["failed", "failed"]
        assert "No module named 'tests.bench.nowhere'" in found["b"]["error"]

    def test_an_unusable_device_ends_the_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_gpu_worker, "_usable", lambda device: False)
        events = tmp_path / "events"
        status = _gpu_worker.main("tests.bench.unruly", events, "cuda:0", ["fine", "raises", "fine too"])
        assert status == _gpu_worker.UNUSABLE
        told = [json.loads(line) for line in events.read_text().splitlines()]
        assert [event.get("case") for event in told] == [None, "fine", "fine", "raises", "raises"]


class TestResults:
    def test_goes_on_where_it_was_interrupted(self, tmp_path: Path) -> None:
        first = _gpu.Results(tmp_path)
        first.resume(MACHINE)
        first.add("kernels", "a", {"status": "failed", "seconds": 1.0, "error": "no"})
        first.add("kernels", "topk_indices, float32, small", _kernel(1e-7))
        again = _gpu.Results(tmp_path)
        again.resume(MACHINE)
        assert again.done("kernels", "topk_indices, float32, small")
        assert not again.done("kernels", "a"), "what failed is tried again"

    def test_other_machines_and_files_are_refused(self, tmp_path: Path) -> None:
        results = _gpu.Results(tmp_path)
        results.resume(MACHINE)
        results.write()
        other = json.loads(json.dumps(MACHINE))
        other["conditions"]["machine"]["gpu"] = "A100"
        with pytest.raises(ConfigError, match="another machine"):
            _gpu.Results(tmp_path).resume(other)
        results.json.write_text("{}")
        with pytest.raises(InputError, match="give another folder"):
            _gpu.Results(tmp_path).resume(MACHINE)

    def test_tables_tell_what_is_wrong(self) -> None:
        law = {"law": "restored", "holds": False, "measured": "differs"}
        parts = {
            "kernels": {
                "topk_indices, float32, small": _kernel(1e-7),
                "topk_indices, bfloat16, true": _kernel(0.5, holds=False),
                "max_sum, float32, small": {"status": "failed", "seconds": 1, "error": "Traceback\nCUDA error"},
            },
            "laws": {
                "qwen3-vl-4b, sdpa": _done({"laws": [law, {**law, "law": "other", "holds": True}]}),
                "qwen3-vl-4b, flash_attention_2": _done({"skipped": "there is none"}),
            },
            "times": {"max_sum, kernel": {"status": "left out", "seconds": 0, "error": "the time budget had ended"}},
        }
        text = _gpu_tables.report(MACHINE, parts)
        assert "3,000 GB/s" in text
        assert "at tiny sizes" not in text
        assert "**WRONG** 5e-01" in text
        assert "**1 of 2** | restored: differs |" in text
        assert "not installed" in text
        assert "- max_sum, float32, small: `CUDA error`" in text
        assert "Left out:\n\n- max_sum, kernel" in text


def _done(result: dict[str, Any]) -> dict[str, Any]:
    return {"status": "done", "seconds": 1.0, "result": result}


def _kernel(error: float, holds: bool = True) -> dict[str, Any]:
    return _done({"error": error, "holds": holds})


@needs_triton
class TestKernels:
    def test_every_kernel_has_a_case(self) -> None:
        there = {name for name, op in dispatch.OPS.items() if op.triton is not None}
        measured = {case.split(", ")[0].split("/")[0] for case in PARTS["kernels"].cases}
        # The column sums are what attention_received is made of, gathering is a part of packing.
        assert there - measured == {"attention_column_sums", "gather_planes"}
        assert measured - there == {"attention_received"}

    @pytest.mark.parametrize("name", sorted({case.split(", ")[0] for case in PARTS["kernels"].cases}))
    def test_kernels_agree_with_their_specification(self, name: str) -> None:
        result = _gpu_kernels.measure(f"{name}, bfloat16, small", DEVICE, True)
        assert result["holds"], result

    @pytest.mark.parametrize("name", ["topk_indices", "segment_merge", "max_sum"])
    def test_a_wrong_kernel_is_noticed(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(reference, name)

        def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
            return right(*args, **kwargs).flip(0)

        monkeypatch.setattr(kernels, name, wrong)
        result = _gpu_kernels.measure(f"{name}, float32, small", DEVICE, True)
        assert not result["holds"], result

    def test_what_is_not_finite_or_of_another_shape_is_far_off(self) -> None:
        problem = OPS["temporal_similarity"].small().at(Draw(torch.Generator().manual_seed(0)))
        right = problem.ours()
        assert problem.error(right) < 1e-5
        assert problem.error(right[1:]) == math.inf
        assert problem.error(right * torch.nan) == math.inf

    def test_times_have_all_implementations_and_a_limit(self) -> None:
        result = _gpu_times.measure("topk_indices, kernel", DEVICE, True)
        assert result["times"].keys() == {"triton", "torch", "baseline"}
        assert result["bytes"] == 70 * 2 + 9 * 8
        assert 0 < result["limit"] < min(result["times"].values())
        assert _gpu_times.measure("topk_indices, compiled", DEVICE, True)["times"].keys() == {"compiled"}
        assert _gpu_times.measure("max_sum, graph", DEVICE, True)["times"].keys() == {"launches"}
        assert _gpu_times.measure("coverage_greedy, graph", DEVICE, True)["times"].keys() == {"launches", "torch"}


class TestModels:
    @pytest.mark.parametrize("how", ["sdpa", "static cache"])
    def test_laws_hold(self, how: str) -> None:
        laws = _gpu_laws.measure(f"qwen3-vl-4b, {how}", DEVICE, True)["laws"]
        assert len(laws) >= 2
        assert all(law["holds"] for law in laws), laws

    def test_laws_of_another_family_hold(self) -> None:
        laws = _gpu_laws.measure("internvl3-8b, sdpa", DEVICE, True)["laws"]
        assert all(law["holds"] for law in laws), laws

    def test_broken_laws_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_gpu_laws, "_masked", lambda model, inputs, kept: _gpu_laws._logits(model, inputs))
        laws = _gpu_laws.measure("qwen2.5-vl-7b, sdpa", DEVICE, True)["laws"]
        assert [law["law"] for law in laws if not law["holds"]] == ["dropped is as if masked"]

    def test_attention_that_is_not_installed_is_told(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("it may be there")
        assert "not installed" in _gpu_laws.measure("qwen3-vl-4b, flash_attention_2", DEVICE, True)["skipped"]

    @pytest.mark.parametrize("case", ["qwen2.5-vl-7b, batch 2", "internvl3-8b, batch 1", "llava-1.5-7b, batch 1"])
    def test_calls_are_measured(self, case: str) -> None:
        found = _gpu_models.measure(case, DEVICE, True)
        rows = found["settings"]
        assert [row["keep"] for row in rows] == list(_gpu_models.KEEPS)
        whole, quarter, tenth = rows
        assert whole["tokens_after"] == whole["tokens_before"] > quarter["tokens_after"] > tenth["tokens_after"] > 64
        assert whole["realised_share"] == whole["ttft_speed_up"] == 1.0
        for row in rows:
            assert row["ttft"] > (row["preprocess"] or 0.0) + row["prefill"]
            assert row["peak_bytes"] > 0
            assert row["realised_share"] == pytest.approx(row["prefill_speed_up"] / row["by_tokens"])
        assert quarter["cache_bytes"] < whole["cache_bytes"]
        assert "100 %" in _gpu_tables.report(MACHINE, {"models": {case: _done(found)}})

    def test_shapes_are_those_of_the_checkpoints(self) -> None:
        assert tuple(sorted(WHOLE_MODELS)) == tuple(sorted(tower.MODELS))
        text = WHOLE_MODELS["qwen2.5-vl-7b"].config(1).get_text_config()
        assert (text.hidden_size, text.intermediate_size, text.num_key_value_heads) == (3584, 18944, 4)
        assert not WHOLE_MODELS["qwen2.5-vl-7b"].config(1).tie_word_embeddings


class TestCommand:
    def test_it_runs_from_end_to_end(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "new"
        asked = ["bench", "gpu", "--out", str(folder), "--device", "cpu", "--budget", "120"]
        assert main([*asked, "--part", "kernels", "--only", "topk_indices, float32"]) == 0
        printed = capsys.readouterr().out
        assert "Tried without a GPU" in printed
        found = json.loads((folder / "gpu.json").read_text())
        assert list(found["parts"]["kernels"]) == ["topk_indices, float32, small"]
        assert found["machine"]["conditions"]["versions"]["torch"] == torch.__version__
        assert "topk_indices" in (folder / "gpu.md").read_text()

    def test_impossible_requests_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        asked = ["bench", "gpu", "--out", str(tmp_path)]
        assert main([*asked, "--budget", "nan"]) == 2
        assert "--budget must be from 10" in capsys.readouterr().err
        file = tmp_path / "file"
        file.touch()
        assert main(["bench", "gpu", "--out", str(file)]) == 2

    def test_every_part_has_cases_without_a_gpu(self) -> None:
        for part in PARTS.values():
            assert set(part.of(small=True)) <= set(part.cases)
            assert part.of(small=True)
            assert part.limit > 0
        assert not any("true" in case for case in PARTS["kernels"].of(small=True))
        assert sum(part.share for part in PARTS.values()) == pytest.approx(1)
