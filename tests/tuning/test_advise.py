"""Advice: what agrees and is faster is chosen, the break-even follows from the line that was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests import tiny
from vtc import reference
from vtc.cli import main
from vtc.cli.advise import _commands
from vtc.notation import parse_stages
from vtc.tuning import advise as module
from vtc.tuning.advise import _Measured, _Tried


@pytest.fixture(scope="module")
def case() -> tiny.TinyCase:
    return tiny.build("llava")


@pytest.fixture(scope="module")
def rows(case: tiny.TinyCase) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    single = case.batch("single")
    return [{**single, "pixel_values": torch.randn_like(single["pixel_values"])} for _ in range(2)]


def quiet(case: tiny.TinyCase, rows: list[dict[str, Any]], **more: Any) -> vtc.Advice:
    given = {"methods": ["divprune"], "keep_ratios": [0.5, 0.25], "max_new_tokens": 3, "rounds": 2}
    return vtc.advise(case.model, None, rows, progress=False, **{**given, **more})


def test_every_setting_is_measured_beside_the_uncompressed_model(
    case: tiny.TinyCase, rows: list[dict[str, Any]]
) -> None:
    before = set(case.model.__dict__), set(case.model.model.__dict__)
    found = quiet(case, rows, agreement=0.5)
    assert {(each.stages[0].method, each.stages[0].keep_ratio) for each in found.settings} == {
        (method, ratio) for method in ("random", "uniform", "pool", "divprune") for ratio in (0.5, 0.25)
    }
    speeds = [each.speed_up for each in found.settings]
    assert speeds == sorted(speeds, reverse=True)
    with vtc.compressed(case.model, "divprune", keep_ratio=0.25), torch.no_grad():
        case.model(**rows[0])
        kept = vtc.report(case.model).average_visual_tokens
    (quarter,) = (e for e in found.settings if e.stages[0].method == "divprune" and e.stages[0].keep_ratio == 0.25)
    assert quarter.tokens == kept
    assert 0 <= quarter.agreement <= 1
    assert quarter.kl > 0
    assert found.prompts == 2
    assert (set(case.model.__dict__), set(case.model.model.__dict__)) == before


def test_a_smaller_picture_comes_along_where_the_tower_takes_one() -> None:
    case = tiny.build("qwen2_5_vl")
    found = quiet(case, [case.batch("single")], keep_ratios=[0.5], rounds=1)
    assert {each.stages[0].method for each in found.settings} == {"random", "uniform", "resize", "divprune"}
    (smaller,) = (each for each in found.settings if each.stages[0].method == "resize")
    assert smaller.name == "resize=0.5 compact"
    assert smaller.tokens < 0.6 * found.visual


def test_agreement_is_with_the_uncompressed_answer(
    case: tiny.TinyCase, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The untouched model says 1 2 3, a compressed one the same only at a half.
    def answer(model: Any, prompt: Any, _: int) -> tuple[list[int], torch.Tensor]:
        with torch.no_grad():
            model(**prompt)
        half = not vtc.is_compressed(model) or vtc.report(model).configs[0].keep_ratio == 0.5
        return ([1, 2, 3] if half else [1, 2, 4]), torch.tensor([0.25, 0.75]).log()

    monkeypatch.setattr(module, "_answer", answer)
    found = quiet(case, rows)
    assert {each.stages[0].keep_ratio: each.agreement for each in found.settings} == {0.5: 1.0, 0.25: 0.0}
    assert all(each.kl == 0.0 for each in found.settings)


def test_a_compressed_model_comes_back_as_it_was(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    with vtc.compressed(case.model, "uniform", keep_ratio=0.25) as model:
        found = quiet(case, rows, rounds=1)
        assert all(each.agreement <= 1 for each in found.settings)
        with torch.no_grad():
            model(**rows[0])
        assert vtc.report(model).configs[0].method == "uniform"


def test_stages_inside_the_tower_are_tried_and_have_no_overhead_of_a_line(
    case: tiny.TinyCase, rows: list[dict[str, Any]]
) -> None:
    setting = "divprune@vision:1=0.5+vtc=0.5"
    found = quiet(case, rows, settings=[setting])
    (two,) = (each for each in found.settings if len(each.stages) == 2)
    assert two.name == setting
    assert two.overhead is None
    with vtc.compressed(case.model, setting), torch.no_grad():
        case.model(**rows[0])
        assert two.tokens == vtc.report(case.model).average_visual_tokens


def test_without_names_the_tower_is_tried_too(
    case: tiny.TinyCase, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.api, "list_methods", lambda: {"divprune": ""})
    found = quiet(case, rows, methods=None, rounds=1)
    depth = case.model.config.vision_config.num_hidden_layers
    inside = {each.name for each in found.settings if len(each.stages) == 2}
    assert inside == {f"divprune@vision:{depth // 3}=0.5+vtc=0.5"}, "a quarter leaves nothing to choose at 0.25"


def test_smaller_pictures_are_tried_alone_and_in_front_of_vtc(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = tiny.build("qwen2_5_vl")
    monkeypatch.setattr(module.api, "list_methods", dict)
    found = quiet(qwen, [qwen.batch("single")], methods=None, rounds=1)
    names = {each.name for each in found.settings if each.stages[0].method == "resize"}
    assert names == {
        "resize=0.5 compact",
        "resize=0.25 compact",
        "resize=0.707 compact",
        "resize@pixels=0.707+vtc=0.707 compact",
        "resize@pixels=0.841+vtc=0.595 compact",
        "resize@pixels=0.5+vtc=0.5 compact",
        "resize@pixels=0.707+vtc=0.354 compact",
    }
    for each in found.settings:  # what is printed is what was measured
        assert tuple(parse_stages(each.name)) == each.stages


@pytest.mark.parametrize("settings", ["vtc=0.5", ["vtc"], ["divprune@vision:99=0.5"]])
def test_a_setting_that_cannot_be_tried_is_refused(
    case: tiny.TinyCase, rows: list[dict[str, Any]], settings: Any
) -> None:
    with pytest.raises(vtc.VtcError):
        quiet(case, rows, settings=settings)


# -------------------------------------------------------------------------------------------- measurements made up


def measured(settings: dict[tuple[str, float], tuple[float, bool]], *, visual: int = 100) -> _Measured:
    """(method, ratio) to (milliseconds to the first token, whether it agrees); all tokens take 50 ms."""
    found = _Measured([(vtc.CompressionConfig(method, keep_ratio=ratio),) for method, ratio in settings])
    for stages, (ms, agrees) in zip(found.tried, settings.values(), strict=True):
        tokens = stages[0].keep_ratio * visual
        found.tried[stages].append(_Tried(agrees, 0.1, tokens, visual, (0.05, 0.05), (ms / 1e3, ms / 1e3)))
    return found


def test_the_fastest_that_agrees_is_chosen() -> None:
    found = measured({("a", 0.5): (40, True), ("a", 0.25): (20, False), ("b", 0.5): (30, True)}).advice(0.9, {})
    assert found.stages == [vtc.CompressionConfig("b", keep_ratio=0.5)]
    assert found.chosen is not None
    assert found.chosen.speed_up == pytest.approx(5 / 3)
    assert 'vtc.compress(model, "b=0.5"): 1.67 times as fast' in str(found)


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("vtc=0.25", ["vtc ask IMAGE QUESTION --method vtc=0.25", "vtc serve CHECKPOINT --method vtc=0.25"]),
        ("fastv(layer=1)=0.5", ["vtc ask IMAGE QUESTION --method 'fastv(layer=1)=0.5'"]),
        ("resize=0.5 compact", ["vtc ask IMAGE QUESTION --method 'resize=0.5 compact'"]),
        ("resize=0.5+vtc=0.5 compact", ["vtc ask IMAGE QUESTION --method 'resize=0.5+vtc=0.5 compact'"]),
    ],
)
def test_the_commands_that_use_a_setting_are_those_that_can(line: str, commands: list[str]) -> None:
    (chosen,) = measured({("any", 0.5): (20, True)}).advice(0.9, {}).settings
    assert _commands(replace(chosen, stages=tuple(parse_stages(line)))) == commands


@pytest.mark.parametrize(
    ("ms", "agrees", "why"),
    [(60.0, True, "no setting that agrees often enough is faster"), (20.0, False, "no setting agrees often enough")],
)
def test_all_tokens_are_kept_where_nothing_better_is_found(ms: float, agrees: bool, why: str) -> None:
    found = measured({("a", 0.5): (ms, agrees), ("a", 0.25): (ms, agrees)}).advice(0.9, {})
    assert found.chosen is None
    assert found.stages is None
    assert f"keep all tokens: {why}" in str(found)


def test_the_break_even_follows_from_overhead_and_what_a_token_saves() -> None:
    # 0.4 ms a token and 6 ms of overhead: 50 dropped save 14 ms, 75 save 24; "b" has 1 ms of overhead.
    found = measured(
        {("a", 0.5): (36, True), ("a", 0.25): (26, True), ("b", 0.5): (31, False), ("b", 0.25): (21, False)}
    )
    advice = found.advice(0.9, {})
    assert advice.saved_per_token == pytest.approx(0.4e-3)
    overheads = {each.stages[0].method: each.overhead for each in advice.settings}
    assert overheads == {"a": pytest.approx(6e-3), "b": pytest.approx(1e-3)}
    assert advice.stages == [vtc.CompressionConfig("a", keep_ratio=0.25)]
    assert advice.break_even == 20, "6 ms / (0.4 ms x 0.75)"
    assert "a=0.25 pays above 20 visual tokens (6.00 ms of overhead, 400.0 us saved" in str(advice)
    with_others = found.advice(0.9, {"c": "it needs what this model has not"})
    assert "left out: c: it needs what this model has not" in str(with_others)


def test_a_break_even_that_cannot_be_known_is_not_made_up() -> None:
    one = measured({("a", 0.5): (30, True), ("b", 0.5): (20, True)}).advice(0.9, {})
    assert (one.saved_per_token, one.break_even) == (None, None)
    assert "it takes at least two numbers" in str(one)
    slower = measured({("a", 0.5): (60, True), ("a", 0.25): (70, True)}).advice(0.9, {})
    assert slower.break_even is None
    assert "never, dropping tokens saved no time" in str(slower)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"agreement": 0.0}, "agreement must lie above 0"),
        ({"agreement": 1.1}, "agreement must lie above 0"),
        ({"agreement": "all"}, "agreement must lie above 0"),
        ({"keep_ratios": []}, "keep_ratios is empty"),
        ({"keep_ratios": [0.5, 1.0]}, "between 0 and 1, got 1.0"),
        ({"rounds": 0}, "rounds must be an integer from 1 to 10,000"),
        ({"rounds": 10**5000}, "rounds must be an integer from 1 to 10,000"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_new_tokens": 10**9}, "max_new_tokens must be an integer from 1 to 100,000"),
        ({"methods": "divprune"}, "methods must be names"),
        ({"methods": []}, "methods must be names"),
        ({"methods": ["nonsense"]}, "Unknown method 'nonsense'"),
    ],
)
def test_nonsense_is_refused_by_name(
    case: tiny.TinyCase, rows: list[dict[str, Any]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(vtc.VtcError, match=message):
        quiet(case, rows, **more)


def test_samples_without_anything_to_compress_are_refused(case: tiny.TinyCase, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(vtc.InputError, match="at least one sample"):
        quiet(case, [])
    text = {name: value for name, value in rows[0].items() if not name.startswith("pixel")}
    with pytest.raises(vtc.InputError, match="sample 1 has no image or video"):
        quiet(case, [rows[0], text])


def test_what_a_model_cannot_run_is_left_out_or_refused() -> None:
    hybrid = tiny.build("qwen3_5")
    found = vtc.advise(
        hybrid.model, None, [hybrid.batch("single")], keep_ratios=[0.5], max_new_tokens=2, rounds=1, progress=False
    )
    assert {"fastv", "vtc-cls"} <= set(found.left_out)
    assert {each.stages[0].method for each in found.settings}.isdisjoint(found.left_out)
    with pytest.raises(vtc.UnsupportedMethodError):
        vtc.advise(hybrid.model, None, [hybrid.batch("single")], methods=["fastv"], progress=False)


@pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")
def test_the_command_advises_and_writes_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, output = tmp_path / "samples.jsonl", tmp_path / "config.json"
    line = {"image": str(reference.samples()[6]), "question": "What is left of the cup?"}
    samples.write_text(json.dumps(line) + "\n\n")
    command = ["advise", str(samples), "--methods", "divprune", "--keep-ratios", "0.5", "0.1", "--rounds", "1"]
    status = main([*command, "--max-new-tokens", "2", "-o", str(output)])
    printed = capsys.readouterr().out
    assert "all tokens" in printed
    assert "divprune" in printed
    assert "break-even" in printed
    # Whether anything is faster here is the machine's business.
    assert (status == 0) == output.exists() == ("vtc.compress(model" in printed)
    if status == 0:
        (only,) = vtc.load_stages(output)
        assert only.method in ("divprune", "random", "uniform", "pool")

    assert main(["advise", str(tmp_path / "nothing.jsonl")]) == 2
    assert main([*command, "--agreement", "2"]) == 2
    assert "agreement must lie" in capsys.readouterr().err
    samples.write_text('{"image": "a.png", "video": "b.mp4", "question": "both?"}\n')
    assert main(command) == 2
    assert "line 1: expected" in capsys.readouterr().err
