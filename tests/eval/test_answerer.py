"""Many questions about one picture: the tower runs once for them, and the answers are those of plain `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("skimage", reason="scenes are drawn on photographs out of scikit-learn and scikit-image")
pytest.importorskip("matplotlib", reason="the fonts come out of matplotlib")

import vtc
from eval import __main__ as command
from eval import models, resizing, results_log, runner
from eval.results_log import ResultsLog, Row
from eval.runs import BLIND, FULL, Run, supported_runs, sweep_runs
from eval.tasks import Sample, Task, get_task
from vtc import reference

pytestmark = pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")

TWO_STAGES = Run.of_stages("divprune@vision:4=0.5+divprune@decoder=0.5")
SETTINGS = {
    "llava": ("scenes", [Run("uniform", 0.25), Run("vtc-cls", 0.11), Run("pool", 0.25), TWO_STAGES, Run("fastv", 0.5)]),
    "internvl": ("scenes", [Run("divprune", 0.11)]),
    "qwen2_5_vl": ("clips", [Run("divprune", 0.11), Run("evs", 0.25), Run("pool", 0.11), TWO_STAGES]),
}


def rows_of(
    loaded: models.Loaded, task: Task, samples: Sequence[Sample], runs: list[Run], path: Path, **more: Any
) -> list[Row]:
    with ResultsLog(path / "rows.jsonl", {}, {}) as log:
        runner.answer_samples(loaded, task, samples, runs, log, progress=False, **more)
    return results_log.read(path)[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_are_those_of_plain_generate(name: str, tmp_path: Path) -> None:
    loaded = models.load(f"reference:{name}")
    task_name, runs = SETTINGS[name]
    task = get_task(task_name, pictures=2, per_picture=3)
    samples = task.samples(None)
    runs = [FULL, BLIND, *runs]
    rows = rows_of(loaded, task, samples, runs, tmp_path, check=2)
    assert not any("error" in row for row in rows)
    found = {(row["run"], row["sample"]): row["prediction"] for row in rows}
    for run in runs:
        for sample in samples[1::3]:  # all over again, without any code of the harness but the processor's
            encoded = models.inputs(loaded, [sample], [sample.open()])
            if run == BLIND:
                encoded = models.blinded(encoded)
            if run.plan():
                vtc.compress(loaded.model, run.plan())
            out = loaded.model.generate(**encoded, do_sample=False, max_new_tokens=task.max_new_tokens)
            vtc.restore(loaded.model)
            text = loaded.processor.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
            assert found[run.name, sample.id] == text.strip()


def test_a_tower_runs_once_for_all_questions_and_runs(tmp_path: Path) -> None:
    loaded = models.load("reference")
    task = get_task("scenes", pictures=2, per_picture=4)
    seen: list[int] = []
    handle = loaded.model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        plain = [FULL, *(Run(name, keep) for name in ("random", "divprune", "fastv") for keep in (0.5, 0.11))]
        rows_of(loaded, task, task.samples(None), plain, tmp_path / "plain")
        assert seen == [1, 1], "one picture at a time, once"
        del seen[:]
        towers = [FULL, Run("vtc-cls", 0.5), Run("vtc-cls", 0.11), TWO_STAGES]
        rows_of(loaded, task, task.samples(None), towers, tmp_path / "towers")
        assert seen == [1, 1, 1] * 2, "and again for what only vtc-cls reads, and for patches that leave inside"
    finally:
        handle.remove()


def test_a_difference_from_plain_generate_ends_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.load("reference")
    task = get_task("scenes", pictures=1, per_picture=3)
    genuine = models.answer

    def answer(loaded: models.Loaded, encoded: Any, length: int) -> Any:
        texts, logp = genuine(loaded, encoded, length)
        return (texts if len(texts) == 1 else ["something else", *texts[1:]]), logp

    monkeypatch.setattr(models, "answer", answer)
    with pytest.raises(vtc.StateError, match=r"all tokens, scene-0-0: 'something else' is the answer in a batch"):
        rows_of(loaded, task, task.samples(None), [FULL], tmp_path, check=3)


def test_batches_hold_the_questions_of_a_picture_or_pictures_with_one_question() -> None:
    def batches(shown: str, size: int) -> list[str]:
        samples = [Sample(str(i), "?", (Path(name),)) for i, name in enumerate(shown)]
        return ["".join(str(sample.images[0]) for _, sample in batch) for batch in runner.split(samples, size)]

    assert batches("aaaaabbcdefg", 3) == ["aaa", "aa", "bb", "cde", "fg"]
    assert batches("abcdd", 2) == ["ab", "c", "dd"]
    assert sorted(runner.spaced(10, 3)) == [1, 5, 8]
    assert sorted(runner.spaced(2, 5)) == [0, 1]


def test_a_smaller_picture_is_a_run_where_it_gives_fewer_tokens(tmp_path: Path) -> None:
    task = get_task("scenes", pictures=1, per_picture=2)
    samples = task.samples(None)
    fixed, flexible = models.load("reference"), models.load("reference:qwen2_5_vl")
    assert (
        resizing.refusal(fixed, samples) == "a picture or video makes 256 tokens, and 256 with a quarter of the pixels"
    )
    assert resizing.refusal(flexible, samples) is None
    runs = sweep_runs([], [0.25])
    kept, left_out = supported_runs(runs, fixed.model, [], resizing.refusal(fixed, samples))
    assert [run.name for run in kept] == ["all tokens", "blind", "random 0.25", "uniform 0.25", "pool 0.25"]
    assert left_out == {
        "resize 0.25": "resize: a picture or video makes 256 tokens, and 256 with a quarter of the pixels"
    }
    rows = rows_of(
        flexible, task, samples, [FULL, Run("resize", 0.25), Run("resize", keep_tokens=64)], tmp_path, check=2
    )
    for row in rows:
        if row["run"] != FULL.name:
            assert row["visual"] == 256
            assert row["kept"] == 0.25
            assert row["flops_share"] < 0.5


def test_stages_have_readable_names_and_one_budget() -> None:
    assert TWO_STAGES.name == "divprune@vision:4=0.5+divprune@decoder=0.5"
    assert (TWO_STAGES.method, TWO_STAGES.keep_ratio) == ("divprune@vision:4+divprune@decoder", 0.25)
    assert Run.from_dict(TWO_STAGES.to_dict()) == TWO_STAGES
    assert [(c.method, c.at, c.seed) for c in TWO_STAGES.plan(7)] == [
        ("divprune", "vision:4", 7),
        ("divprune", "decoder", 7),
    ]
    counted = Run.of_stages("random@vision:4=0.5+uniform=64")
    assert (counted.keep_ratio, counted.keep_tokens, counted.plan()[1].at) == (None, 64, None)
    smaller = Run.of_stages("resize@pixels=0.5+vtc=0.5 compact")
    assert smaller.name == "resize@pixels=0.5+vtc=0.5 compact"
    assert [config.positions for config in smaller.plan()] == ["compact", "compact"]
    assert Run.from_dict(smaller.to_dict()) == smaller
    for text in ("divprune@=0.5", "divprune", "=0.5", "divprune@decoder=many"):
        with pytest.raises(vtc.ConfigError, match="METHOD@SITE=KEEP"):
            Run.of_stages(text)


def test_baselines_and_settings_have_the_same_budgets() -> None:
    assert command._budgets(["divprune@vision:4=0.5+divprune@decoder=0.5", "uniform=64"]) == (0.25, 64.0)
    assert command._budgets([]) == (0.5, 0.25, 0.11, 0.056)
    runs = sweep_runs([], [0.25], settings=["divprune=0.25"])
    assert [run.name for run in runs[2:]] == [
        "random 0.25",
        "uniform 0.25",
        "pool 0.25",
        "resize 0.25",
        "divprune=0.25",
    ]
