"""The command: tables and plots of rows, comparisons, and mistakes reported before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

import pandas

import vtc
from eval import __main__ as command
from eval import comparison, models, plots, readme, results_log, sweep, timing
from eval.__main__ import main
from eval.results_log import ResultsLog
from eval.runs import BLIND, FULL, Run, supported_runs, sweep_runs
from eval.tasks import Sample, Task, base, get_task, register_task
from vtc import reference

needs_model = pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")
PICTURES = {"score-by-tokens.png", "score-by-ttft.png", "score-by-kind.png"}


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load("reference")


@needs_model
def test_the_command_of_the_readme_makes_tables_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "GENERATED_LIMIT", 4)  # of 200
    arguments = ["sweep", "--model", "reference", "--methods", "divprune", "fastv", "--keep", "0.1"]
    arguments += ["--positions", "original", "compact", "--timed", "1", "--rounds", "2", "--decode-tokens", "3"]
    assert main(arguments) == 0
    folder = tmp_path / "results" / "scenes-reference"
    assert {path.name for path in folder.iterdir()} == {"rows.jsonl", "times.jsonl", "table.md", "table.csv", *PICTURES}
    printed = capsys.readouterr().out
    text = (folder / "table.md").read_text()
    assert text in printed
    frame = pandas.read_csv(folder / "table.csv").set_index("run")
    original = [f"{name} 0.1" for name in ("random", "uniform", "pool", "divprune", "fastv", "oracle", "anti-oracle")]
    compact = [f"{name} compact" for name in original if not name.startswith("fastv")]
    assert set(frame.index) == {"all tokens", "blind", *original, *compact}
    assert "- fastv 0.1 compact: positions='compact' renumbers" in text, "left out, and said so"
    for line in ("- weights: ", "- git: ", "- threads: ", "- cpu: ", "- samples: 4", "- batch_size: 10", "- command: "):
        assert line in text
    timed = frame.loc[["all tokens", "random 0.1", "divprune 0.1 compact"]]
    for column in timing.FIGURES:
        assert (timed[column].notna() if column != "device_mib" else timed[column].isna()).all(), column
    assert frame.loc["all tokens", "speed_up"] == 1.0
    assert frame.loc["all tokens", "selector_ms"] == 0.0 < frame.loc["divprune 0.1", "selector_ms"]
    assert frame.loc["divprune 0.1", "tokens"] == 26
    assert frame.loc["all tokens", "tokens"] == 256
    assert frame.loc[["blind", "oracle 0.1"], "ttft"].isna().all()
    assert frame.loc["divprune 0.1", "gflops"] == pytest.approx(
        frame.loc["divprune 0.1", "flops"] * frame.loc["all tokens", "gflops"], rel=1e-3
    )
    (folder / "table.md").unlink()
    assert main(["table", str(folder)]) == 0
    assert (folder / "table.md").read_text() == text
    # The same command again measures nothing: rows and times are there.
    before = {name: (folder / name).read_text().count("\n") for name in ("rows.jsonl", "times.jsonl")}
    assert main(arguments) == 0
    after = {name: (folder / name).read_text().count("\n") for name in ("rows.jsonl", "times.jsonl")}
    assert {name: count - before[name] for name, count in after.items()} == {"rows.jsonl": 1, "times.jsonl": 1}


@needs_model
def test_unsupported_runs_are_left_out_unless_requested(loaded: models.Loaded) -> None:
    runs = sweep_runs(["all"], [0.5], positions=["original", "compact"])
    good, left_out = supported_runs(runs, loaded.model, ["all"])
    inside = ("fastv", "atp", "sliminfer", "sparsevlm", "sparsevlm-rank", "pyramiddrop")
    caches = ("chunkkv", "defensivekv", "elastic-cache", "h2o", "light-transfer", "prefixkv", "snapkv", "streaming")
    caches += ("triattention",)
    elsewhere = (*inside, *caches, "tome", "adaptive-sparse-vit", "pixelprune")  # not before the decoder
    learned = ("crosslmm", "llava-mini", "vision-remember", "vtc-asked")
    trained = {f"{name} 0.5{compact}" for name in learned for compact in ("", " compact")}  # without their modules
    regional = {"pixelrefer 0.5", "pixelrefer 0.5 compact"}  # without regions
    assert set(left_out) == {f"{name} 0.5 compact" for name in elsewhere} | trained | regional
    assert {run.name for run in good} | set(left_out) == {run.name for run in runs}
    assert not vtc.is_compressed(loaded.model)
    compact = [FULL, Run("uniform", 0.5, positions="compact"), Run("fastv", 0.5, positions="compact")]
    assert supported_runs(compact, loaded.model, ["all"])[0] == compact[:2]
    with pytest.raises(vtc.ConfigError, match="renumbers"):
        supported_runs(compact, loaded.model, ["fastv"])


def test_a_sweep_contains_the_baselines() -> None:
    runs = sweep_runs(["fastv"], [0.5, 32], options={"fastv": {"layer": 3}})
    assert [run.name for run in runs] == [
        "all tokens",
        "blind",
        "random 0.5",
        "random 32 tokens",
        "uniform 0.5",
        "uniform 32 tokens",
        "pool 0.5",
        "pool 32 tokens",
        "resize 0.5",
        "resize 32 tokens",
        "fastv 0.5 layer=3",
        "fastv 32 tokens layer=3",
    ]
    assert [Run.from_dict(json.loads(json.dumps(run.to_dict()))) for run in runs] == runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nonsense"], "no task is called 'nonsense'"),
        (["--methods", "nonsense"], "unknown method"),
        (["--keep", "-1"], "--keep takes fractions"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--option", "fastv=3"], "METHOD.NAME=VALUE"),
        (["--frames", "8"], "scenes shows no video files"),
        (["--data", "a", "b"], "TASK=FOLDER"),
        (["--task", "scenes", "pope", "--data", "a"], "TASK=FOLDER"),
        pytest.param(["--task", "clips", "--limit", "1"], "LlavaProcessor takes no videos", marks=needs_model),
        pytest.param(["--device", "nonsense", "--limit", "1"], "--device nonsense", marks=needs_model),
        pytest.param(
            ["--attention", "flash_attention_2", "--limit", "1"], "--attention flash_attention_2", marks=needs_model
        ),
        (["--model", "nowhere", "--limit", "1"], "no such folder"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep"]) == 2
    assert "accelerate launch -m eval run" in capsys.readouterr().err


def test_workers_are_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--workers", "2"]) == 2
    assert "--workers 2 is of --backend ray" in capsys.readouterr().err


def test_folders_of_data_by_task() -> None:
    assert command._data(["x"], ["pope"]) == {"pope": Path("x")}
    assert command._data(["pope=x", "docvqa=y"], ["pope", "docvqa", "scenes"]) == {
        "pope": Path("x"),
        "docvqa": Path("y"),
    }
    assert command._data(["a=b"], ["pope"]) == {"pope": Path("a=b")}


# ------------------------------------------------------------------------------------- rows made up, no model needed


@dataclass(frozen=True)
class Written(Task):
    name: ClassVar[str] = "written"
    licence: ClassVar[str] = "none"
    source: ClassVar[str] = "the test"
    layout: ClassVar[str] = "none"

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        return []

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {}


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_TASKS", dict(base._TASKS))
    register_task(Written)


def write(folder: Path, scores: Mapping[Run, Sequence[float]], task: str = "written", **identity: Any) -> Path:
    """A folder of results: runs with the scores of samples 0, 1, ..., two of each group."""
    stated = {
        "runs": [run.to_dict() for run in scores],
        "left_out": {},
        "command": "made up",
        "config": {"data": None, "device": "cpu", "batch_size": 1},
    }
    with ResultsLog(folder / "rows.jsonl", {"task": task, "model": "m", "seed": 0, **identity}, stated) as rows:
        for run, values in scores.items():
            for number, value in enumerate(values):
                row = {"run": run.name, "sample": str(number), "order": number, "group": str(number // 2)}
                row["kind"] = ("even", "odd")[number % 2]
                row |= {"scores": {"score": value}, "agrees": True, "kl": 0.0, "kept": 0.5, "visual": 10}
                rows.add(row | {"flops": None, "flops_share": None})
    return folder


RANDOM, UNIFORM = Run("random", 0.5), Run("uniform", 0.5)
RIGHT, HALF = [1.0] * 20, [1.0, 0.0] * 10


def test_runs_of_a_folder_are_compared_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "x", {FULL: RIGHT, RANDOM: HALF, UNIFORM: RIGHT})
    (found,) = comparison.compare("random 0.5", "uniform 0.5", folder)
    assert (found.difference, found.n, found.groups) == (0.5, 20, 10)
    assert (found.low, found.high) == (0.5, 0.5), "every group gains as much"
    assert found.p == pytest.approx(2 / 2**10), "all ten signs alike, or all the other way"
    assert found.mcnemar == pytest.approx(2 / 2**10)
    assert comparison.compare(f"{folder}:random 0.5", f"{folder}:uniform 0.5") == [found]
    assert main(["compare", f"{folder}:random 0.5", f"{folder}:uniform 0.5"]) == 0
    assert (
        "| random 0.5 | uniform 0.5 | +0.5000 | +0.5000 to +0.5000 | 0.0000 | 0.0020 | B is better | 0.0020 | 20 | 10 |"
        in (capsys.readouterr().out)
    )


def test_folders_are_compared_run_by_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {FULL: RIGHT, RANDOM: HALF, UNIFORM: [0.25] * 20})
    b = write(tmp_path / "b", {FULL: RIGHT, RANDOM: RIGHT[:10], Run("fastv", 0.5): RIGHT}, seed=1)
    same, better = comparison.compare(str(a), str(b))
    assert (same.difference, same.p, same.n) == (0.0, 1.0, 20)
    assert (better.difference, better.n, better.groups) == (0.5, 10, 5), "only samples that both have"
    assert better.a.endswith("a: random 0.5")
    assert better.b.endswith("b: random 0.5")
    assert main(["compare", str(a), str(b)]) == 0
    assert "p, Holm" in capsys.readouterr().out


def test_pairs_that_are_looked_at_together_are_corrected_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = [1.0, 1.0] * 8 + [1.0, 0.0] * 2
    folder = write(
        tmp_path / "x", {FULL: RIGHT, RANDOM: HALF, UNIFORM: noisy, Run("fastv", 0.5): [1.0, 0.0] * 9 + [1.0] * 2}
    )
    found = comparison.compare_with("random 0.5", folder)
    assert [each.b for each in found] == ["all tokens", "uniform 0.5", "fastv 0.5"]
    assert main(["compare", "--folder", str(folder), "--base", "random 0.5", "--pair", "fastv 0.5", "uniform 0.5"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][:5]
    by_pair = {(line[0].strip("| "), line[1]): line for line in lines}
    assert by_pair["random 0.5", "all tokens"][5:8] == ["0.0020", "0.0078", "B is better"]
    assert by_pair["random 0.5", "fastv 0.5"][7] == "not told apart"
    assert by_pair["fastv 0.5", "uniform 0.5"][5:7] == ["0.0391", "0.0781"], "20 of 512 flips, and two pairs are left"
    assert "0.025 would take about" in printed
    assert "| even | odd |" in printed.splitlines()[-6]
    assert printed.splitlines()[-3].startswith("| random 0.5 | all tokens | +0.000 ± 0.000 | +1.000 ± 0.000 |")
    assert main(["compare", "--base", "random 0.5"]) == 2
    assert main(["compare", str(folder)]) == 2


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {FULL: RIGHT, RANDOM: HALF})
    other = write(tmp_path / "other", {FULL: RIGHT}, task="scenes")
    for left, right, message in (
        (f"{a}:nonsense", f"{a}:random 0.5", "has no run 'nonsense' with answers; it has: all tokens, random 0.5"),
        (str(a), f"{a}:random 0.5", "not one with the other"),
        (str(a), str(other), "nothing to pair"),
        (str(a), str(tmp_path / "nowhere"), "no rows"),
    ):
        assert main(["compare", left, right]) == 2
        assert message in capsys.readouterr().err


def test_runs_of_a_method_are_grouped_over_sessions(tmp_path: Path) -> None:
    small, compact = Run("random", 0.25), Run("random", 0.5, positions="compact")
    write(tmp_path, {FULL: RIGHT, small: HALF, UNIFORM: HALF})
    write(tmp_path, {compact: HALF, RANDOM: RIGHT[:10]})
    found = sweep.results(tmp_path)
    assert found.frame["run"].tolist() == [c.name for c in (FULL, RANDOM, small, compact, UNIFORM)]
    assert found.frame["n"].tolist() == [20, 10, 20, 20, 20]
    assert "| n |" in found.markdown(), "unequal numbers of samples are shown"
    assert "| compact |" in found.markdown()


def test_several_tasks_are_tabulated_side_by_side(tmp_path: Path) -> None:
    register_task(type("Second", (Written,), {"name": "second"}))
    write(tmp_path / "written", {FULL: RIGHT, RANDOM: HALF, BLIND: [0.0] * 20})
    write(tmp_path / "second", {FULL: HALF, RANDOM: RIGHT}, task="second")
    parts = [sweep.results(tmp_path / name) for name in ("written", "second")]
    text = sweep.overview(parts, tmp_path)
    assert "| all tokens | 1.000 | 0.500 |" in text
    assert "| random 0.5 | 0.500 | 1.000 |" in text
    assert "| blind | 0.000 |  |" in text
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "score-by-task.png").stat().st_size > 1000


def test_times_of_another_machine_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    ResultsLog(path, {"task": "scenes", "cpu": "this"}, {}).close()
    with pytest.raises(vtc.InputError, match="different: cpu"):
        ResultsLog(path, {"task": "scenes", "cpu": "that"}, {})
    assert results_log.read(tmp_path, "times")[1] == []


@needs_model
def test_an_interrupted_round_of_times_is_made_again(loaded: models.Loaded, tmp_path: Path) -> None:
    samples = get_task("scenes", pictures=2, per_picture=1).samples(None)
    runs, path = [FULL, BLIND, Run("uniform", 0.1)], tmp_path / "times.jsonl"

    def times() -> list[dict[str, Any]]:
        with ResultsLog(path, {}, {}) as rows:
            timing.measure(loaded, samples, runs, rows, count=1, rounds=2, decode_tokens=2, progress=False)
        return results_log.read(tmp_path, "times")[1]

    first = times()
    assert [(row["run"], row["sample"]) for row in first] == [
        (run, f"{samples[0].id}#{number}") for number in range(2) for run in ("all tokens", "uniform 0.1")
    ]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")  # the last run of the last round is lost
    again = times()
    assert again[:2] == first[:2]
    assert again[2] != first[2], "its partner of the same round is measured anew"
    assert len(again) == 4


def test_the_front_is_what_nothing_beats() -> None:
    assert plots.pareto([1, 2, 3, 4, 2], [0.5, 0.7, 0.6, 0.9, 0.65]) == [0, 1, 3]


def test_the_table_of_the_readme_is_made_from_the_committed_results() -> None:
    assert readme.current() == readme.block(), "run `python -m eval readme`"


def test_the_readme_keeps_the_text_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.write(page)
    assert page.read_text() == f"before\n{readme.block()}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(vtc.InputError, match="README has no"):
        readme.write(page)


def test_names_of_runs_may_have_colons(tmp_path: Path) -> None:
    stages = "divprune@vision:4=0.5+divprune@decoder=0.5"
    assert comparison._split(f"{tmp_path}:{stages}") == (str(tmp_path), stages)
    assert comparison._split("nowhere:random 0.5") == ("nowhere", "random 0.5")
