"""`vtc bench kernels`: everything but the times."""

from __future__ import annotations

import json
import math
from argparse import Namespace

import pytest
import torch

import vtc
from vtc.bench import _compare, _cost, _growth, _models, _targets, _video, kernels
from vtc.bench._ops import OPS, Draw, Op, Problem
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import megabytes, repeated, seconds
from vtc.cli import main


@pytest.fixture
def small_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(OPS):
        monkeypatch.setitem(OPS, name, OPS[name].small())


class TestMemory:
    def test_counts_what_lives_at_the_same_time(self) -> None:
        mebi = 2**20

        def run() -> torch.Tensor:
            first = torch.zeros(1 * mebi, dtype=torch.uint8)
            second = torch.zeros(2 * mebi, dtype=torch.uint8)
            del first
            third = torch.zeros(mebi // 2, dtype=torch.uint8)
            return second[: len(third)]

        assert 3 * mebi <= peak_bytes(run) < 3.1 * mebi

    def test_sees_into_operators_and_not_what_was_there(self) -> None:
        query = torch.randn(1, 2, 300, 32)
        whole = 2 * 300 * 300 * 4
        assert peak_bytes(lambda: (query @ query.transpose(2, 3)).softmax(-1)) >= 2 * whole
        assert peak_bytes(lambda: query.sum()) < query.numel()

    @pytest.mark.parametrize("name", ["attention_received", "farthest_point", "max_sum"])
    def test_the_matrix_is_seen_where_it_is_made(self, name: str) -> None:
        n = 1500
        problem = OPS[name].at(Draw(torch.Generator().manual_seed(0)), n, growing=True)
        assert peak_bytes(problem.baseline) >= 4 * n * n
        assert peak_bytes(problem.ours) < 4 * n * n


class TestOps:
    @pytest.mark.parametrize("name", OPS)
    @pytest.mark.parametrize("n", [70, 257])
    def test_both_implementations_compute_the_same(self, name: str, n: int) -> None:
        problem = OPS[name].small().at(Draw(torch.Generator().manual_seed(n)), n)
        words = problem.agreement(problem.ours(), problem.baseline())
        assert words == "equal" or float(words.removeprefix("to ")) < 1e-5, words

    def test_disagreement_is_told(self) -> None:
        assert OPS["max_sum"].small().at(Draw(torch.Generator())).agreement(
            torch.tensor([1, 2, 3]), torch.tensor([3, 4, 1])
        ) == "2 of 3"  # fmt: skip
        received = OPS["attention_received"].small().at(Draw(torch.Generator()))
        assert received.agreement(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == "to 2e-01"

    @pytest.mark.parametrize("name", OPS)
    def test_sizes_named_for_growth_exist(self, name: str) -> None:
        assert OPS[name].growing.keys() <= OPS[name].sizes.keys()
        assert min(_growth.SIZES) >= OPS[name].shape(growing=True).get("k", 0)


class TestGrowth:
    def test_exponent_of_a_power_law(self) -> None:
        sizes = [256, 1024, 4096]
        assert _growth.exponent(sizes, [3e-9 * n**1.5 for n in sizes]) == pytest.approx(1.5)
        assert math.isnan(_growth.exponent([256], [1.0]))

    def test_fit_leaves_out_what_fixed_costs_rule(self) -> None:
        n = [256, 1024, 4096, 16384]
        curve = {"n": n, "seconds": [5.0, *(1e-6 * size**2 for size in n[1:])]}
        assert _growth.fitted(curve, "seconds") == pytest.approx(2)
        assert math.isnan(_growth.fitted({"n": n[:3], "seconds": [1.0, 2.0, 3.0]}, "seconds")), (
            "two points fit anything"
        )

    def test_what_would_take_too_much_is_not_run_and_named(self) -> None:
        points = {1024: {"seconds": 1.0, "bytes": 1e6}, 2048: {"seconds": 4.0, "bytes": 2e6}}
        assert _growth._too_much(points, 4096, 60) is None
        assert _growth._too_much(points, 4096, 15) == "about 16 s"
        points = {1024: {"seconds": 1.0, "bytes": 1e9}, 2048: {"seconds": 1.0, "bytes": 4e9}}
        assert _growth._too_much(points, 4096, 60) == "about 16000 MB"

    def test_nothing_larger_runs_once_a_size_was_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[int] = []

        def problem(draw: Draw, n: int) -> Problem:
            return Problem(lambda: ran.append(n), lambda: torch.empty(n, n), lambda a, b: "")

        monkeypatch.setitem(OPS, "square", Op(problem, "whole", 8, {}, {}))
        args = Namespace(dtype="float32", device="cpu", clock="wall", repeats=1, most_seconds=math.inf)
        sizes = (1024, 2048, 4096, 65536, 131072)
        result = _growth.measure("square", args, sizes)
        assert result["baseline"]["n"] == [1024, 2048, 4096]
        assert set(ran) == set(sizes), "the other way goes on"
        assert result["baseline"]["not_run"] == {"65536": "about 17180 MB", "131072": "more than the size before"}
        assert _growth.fitted(result["baseline"], "bytes") == pytest.approx(2)
        text = _growth.table({"square": result})
        assert "not run: about 17180 MB" in text
        assert "N^2.00" in text

    def test_picture_is_drawn(self, tmp_path) -> None:
        pytest.importorskip("matplotlib")
        curve = {"n": [256, 1024], "seconds": [0.1, 0.2], "bytes": [10, 40], "not_run": {}}
        results = {f"op {i}": {"shape": {}, "ours": curve, "baseline": curve} for i in range(5)}
        _growth.plot(results, tmp_path / "growth.png")
        assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


class TestTargets:
    def costs(self) -> dict:
        timing = {"median": 1.0, "quartiles": [1.0, 1.0]}
        quick = {"median": 0.005, "quartiles": [0.005, 0.005]}
        tower = {"untouched": timing, "scored": timing, "eager": timing, "scoring": quick}
        tower |= {"untouched_bytes": 10**7, "scored_bytes": 10**7 + 10**5, "eager_bytes": 10**8}
        prefill = {"prefill": timing, **dict.fromkeys(_cost.METHODS, quick)}
        memory = {n: 100 * n for n in _targets.LONG}
        return {"tower": tower, "prefill": prefill, "farthest_point_bytes": memory}

    def results(self) -> dict:
        return {
            "attention_received": {"speed_up": 1.5, "ours_bytes": 10**7, "baseline_bytes": 10**9},
            "farthest_point": {"speed_up": 6.0},
        }

    def test_all_met(self) -> None:
        assert all(target["met"] for target in _targets.check(self.results(), self.costs()))

    @pytest.mark.parametrize(
        ("where", "value", "target"),
        [
            (("tower", "scoring", "median"), 0.03, "of the tower's time"),
            (("tower", "scored_bytes"), 12 * 10**6, "peak memory above the tower's"),
            (("prefill", "divprune"), {"median": 0.02}, "all of divprune"),
            (("farthest_point_bytes", 50_000), 10**9, "farthest_point, 288"),
        ],
    )
    def test_each_can_be_missed(self, where, value, target) -> None:
        costs = self.costs()
        inner = costs
        for key in where[:-1]:
            inner[key] = dict(inner[key])
            inner = inner[key]
        inner[where[-1]] = value
        missed = [found["target"] for found in _targets.check(self.results(), costs) if not found["met"]]
        assert len(missed) == 1
        assert target in missed[0]

    @pytest.mark.parametrize(
        ("op", "field", "value"),
        [
            ("attention_received", "speed_up", 0.9),
            ("attention_received", "ours_bytes", 17 * 10**6),
            ("farthest_point", "speed_up", 4.9),
        ],
    )
    def test_operations_can_miss_theirs(self, op, field, value) -> None:
        results = self.results()
        results[op][field] = value
        missed = [target["target"] for target in _targets.check(results, self.costs()) if not target["met"]]
        assert len(missed) == 1
        assert missed[0].startswith(op)


@pytest.fixture(scope="module")
def model():
    shape = _models.BenchModel("small", 2, _small_llava, _models.llava_prompt, "vtc-cls")
    return _models.build(shape, 1, torch.float32, "cpu")


class TestCost:
    def test_tower(self, model) -> None:
        cost = _cost.tower_cost(model, repeats=2, warmup=0, clock=lambda: 0.0)
        matrix = 8 * 2 * 577 * 577 * 4  # of 8 layers and 2 heads, which output_attentions=True keeps
        assert cost["eager_bytes"] - cost["untouched_bytes"] >= matrix
        assert cost["scored_bytes"] - cost["untouched_bytes"] < 2e6
        assert model.config.vision_config._attn_implementation == "sdpa", "as it was"

    def test_scoring_is_timed_as_the_operation_itself(self, model) -> None:
        ticks = iter(range(10**6))
        cost = _cost.tower_cost(model, repeats=1, warmup=0, clock=lambda: float(next(ticks)))
        assert cost["untouched"]["seconds"] == [1.0]
        assert cost["scoring"]["seconds"] == [1.0]
        assert _cost._scoring(model, 2)().shape == (2, 576)

    def test_compression_is_timed_outside_of_the_modules(self, model) -> None:
        now = [0.0]

        def takes(seconds: float, only_compressed: bool = False):
            def hook(*_: object) -> None:
                now[0] += seconds if vtc.is_compressed(model) or not only_compressed else 0.0

            return hook

        inner = model.model
        hooks = [
            inner.vision_tower.encoder.layers[0].register_forward_pre_hook(takes(1000.0)),
            inner.language_model.register_forward_pre_hook(takes(5.0)),
            inner.language_model.register_forward_pre_hook(takes(7.0, only_compressed=True)),
            inner.language_model.layers[0].mlp.register_forward_pre_hook(takes(100.0)),
        ]
        try:
            cost = _cost.prefill_cost(
                model, visual_tokens=576, keep_ratio=0.25, repeats=1, warmup=0, clock=lambda: now[0]
            )
        finally:
            for hook in hooks:
                hook.remove()
        assert cost["prefill"]["seconds"] == [100.0 + 31 * 100.0], "the one layer, multiplied to full depth"
        assert all(cost[method]["seconds"] == [7.0] for method in _cost.METHODS)
        assert not any("forward" in vars(module) for module in model.modules()), "no trace is left"


def _small_llava(layers: int):
    from transformers import LlamaConfig

    return _models._llava(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, vocab_size=32064
        )
    )


class TestVideo:
    def test_peak_is_above_what_was_there(self) -> None:
        result = _video.measure("uniform", 64, grid=(6, 4, 5), keep=30)
        assert result["kept"] == 30
        assert result["features_bytes"] == 120 * 64 * 2
        assert result["features_bytes"] < result["before_bytes"] <= result["peak_bytes"]

    def test_table_tells_what_missed_the_aim(self) -> None:
        row = {"method": "evs", "width": 8, "kept": 1, "features_bytes": 1, "before_bytes": 10**9, "seconds": 1.0}
        assert "missed" in _video.table([{**row, "peak_bytes": 3 * 10**9}])
        assert "met" in _video.table([{**row, "peak_bytes": 3 * 10**8 + 10**9}])


class TestCommand:
    def test_options_name_all_operations(self) -> None:
        assert tuple(OPS) == kernels.OPERATIONS

    def test_prints_a_table_and_writes_its_conditions(self, small_ops, tmp_path, capsys) -> None:
        out = tmp_path / "kernels.json"
        ops = ["--op", "attention_rows", "--op", "topk_indices"]
        assert main(["bench", "kernels", *ops, "--repeats", "2", "--clock", "cpu", "--json", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "| attention_rows | n 70, layers 2, heads 4, width 16 |" in " ".join(printed.split())
        assert f"{torch.get_num_threads()} of" in printed, "threads are named"
        data = json.loads(out.read_text())
        assert data["conditions"]["clock"] == "cpu"
        assert [result["op"] for result in data["results"]] == ["attention_rows", "topk_indices"]
        assert len(data["results"][0]["ours"]["seconds"]) == 2

    def test_growth(self, small_ops, monkeypatch, tmp_path, capsys) -> None:
        monkeypatch.setattr(_growth, "measure", lambda name, args: _growth_result())
        out = tmp_path / "growth.json"
        assert main(["bench", "kernels", "--growth", "--op", "max_sum", "--json", str(out)]) == 0
        assert "max_sum" in capsys.readouterr().out
        assert json.loads(out.read_text())["growth"]["max_sum"]["ours"]["n"] == [256]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--plot", "x.png"], "give both"),
            (["--video", "--op", "max_sum"], "leave one of them out"),
            (["--clock", "cpu", "--device", "cuda"], "use --clock wall"),
        ],
    )
    def test_what_cannot_be_done_is_refused(self, arguments, words, capsys) -> None:
        assert main(["bench", "kernels", *arguments]) == 2
        assert words in capsys.readouterr().err


def _growth_result() -> dict:
    curve = {"n": [256], "seconds": [0.1], "bytes": [10], "not_run": {}}
    return {"shape": {}, "ours": curve, "baseline": curve}


def test_a_short_run_is_repeated_until_the_clock_can_see_it() -> None:
    calls: list[int] = []
    one = repeated(lambda: calls.append(1), "cpu", lambda: float(len(calls)))
    calls.clear()
    assert one()["run"] == 1.0, "per call"
    assert len(calls) > 100


def test_figures_have_three_digits_and_their_unit() -> None:
    assert [seconds(x) for x in (12.345, 0.5, 2.5e-5)] == ["12.3 s", "500 ms", "25 µs"]
    assert [megabytes(x) for x in (1.9e9, 250, 3.14e6)] == ["1900 MB", "0.0003 MB", "3.14 MB"]


def test_measure_is_what_the_command_runs(small_ops) -> None:
    args = Namespace(dtype="float32", device="cpu", clock="wall", repeats=1, warmup=0)
    result = _compare.measure("farthest_point/first", args)
    assert result["shape"] == {"n": 70, "k": 9, "d": 24}
    assert result["agreement"] == "equal"
