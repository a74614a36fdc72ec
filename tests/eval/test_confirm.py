"""Confirming: the rule is written down before anything is drawn, and there is one look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pandas")

import vtc
from eval import confirm, seeds
from eval.__main__ import main
from eval.confirm import Rule, lock
from eval.tasks.generated import ScenesTask
from vtc import reference

RULE = Rule(("divprune=0.25",), ("uniform",), "scenes", 2, 2)
OTHER = Rule(("divprune=0.25", "pool=0.25"), ("uniform",), "scenes", 2, 2)


def test_the_purposes_have_seeds_of_their_own() -> None:
    drawn = [seed for numbers in seeds.RANGES.values() for seed in numbers]
    assert len(drawn) == len(set(drawn))
    assert seeds.seed_of("exploring") == 0, "what was measured before there were purposes"
    assert seeds.seed_of("comparing:3") == 1003
    assert seeds.seed_of("confirming:3", confirm=True) == 2003
    for text, confirming in (
        ("confirming:3", False),
        ("comparing:3", True),
        ("guessing:1", False),
        ("exploring:x", False),
    ):
        with pytest.raises(vtc.ConfigError):
            seeds.seed_of(text, confirm=confirming)


def test_a_second_look_with_another_rule_is_refused(tmp_path: Path) -> None:
    assert lock(RULE, 0, tmp_path) == 0
    assert lock(RULE, 0, tmp_path) == 0, "the same rule may go on, on other models too"
    for other in (OTHER, Rule(("divprune=0.11",), ("uniform",), "scenes", 2, 2), Rule(*RULE_FIELDS, 3, 2)):
        with pytest.raises(vtc.ConfigError, match=r"confirming:0 was looked at with another rule"):
            lock(other, 0, tmp_path)
    assert lock(OTHER, None, tmp_path) == 1, "the first seed that nobody has looked at"
    assert lock(RULE, None, tmp_path) == 0
    stated = json.loads((tmp_path / "scenes-0.json").read_text())
    assert stated["fingerprint"] == RULE.fingerprint
    assert stated["rule"]["settings"] == ["divprune=0.25"]
    assert "git" in stated["conditions"]


RULE_FIELDS = (RULE.settings, RULE.against, RULE.task)


def test_settings_are_compared_with_rivals_one_by_one(tmp_path: Path) -> None:
    settings, rivals = ("resize@pixels=0.5+vtc=0.5 compact", "vtc=0.3"), ("resize@pixels=0.4 compact", "random=0.5")
    rule = confirm.rule_of(settings, (), "scenes", 2, 2, rivals)
    assert rule.pairs() == list(zip(rivals, settings, strict=True))
    assert rule.budgets() == ()
    assert "resize.py" in rule.described()["sources"]
    assert rule.fingerprint != confirm.rule_of(settings, (), "scenes", 2, 2, rivals[::-1]).fingerprint
    with pytest.raises(vtc.ConfigError, match="2 settings were given, but 1 rivals"):
        confirm.rule_of(settings, (), "scenes", 2, 2, rivals[:1])


def test_the_source_of_the_selectors_is_part_of_the_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = Rule(("fastv@decoder:2=0.5", "aim=0.25"), ("uniform",), "scenes", 2, 2).described()["sources"]
    assert {"fastv.py", "aim.py", "schedule.py"} <= set(sources), "files beside them that they import, too"
    copy = tmp_path / "divprune.py"
    copy.write_text("changed = 1\n")
    before = RULE.fingerprint
    monkeypatch.setattr(confirm.inspect, "getfile", lambda _: str(copy))
    assert RULE.fingerprint != before


def test_a_rule_without_one_budget_cannot_be_compared() -> None:
    with pytest.raises(vtc.ConfigError, match="no one budget"):
        confirm.rule_of(["random@vision:4=64+divprune@decoder=0.5"], ["uniform"], "scenes", 2, 2)


@pytest.mark.skipif(not reference.available(), reason="vtc-reference is not installed")
def test_the_command_writes_the_rule_down_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    arguments = ["--against", "uniform", "--pictures", "2", "--per-picture", "2", "--locks", str(tmp_path / "locks")]
    genuine, drawn = ScenesTask.samples, []

    def samples(self: ScenesTask, folder: Path | None) -> object:
        drawn.append(self.seed)
        assert (tmp_path / "locks" / "scenes-0.json").exists(), "drawn before the rule was written down"
        return genuine(self, folder)

    monkeypatch.setattr(ScenesTask, "samples", samples)
    assert main(["confirm", "divprune@decoder=0.25", *arguments, "--check", "1"]) == 0
    printed = capsys.readouterr().out
    assert set(drawn) == {2000}
    assert "| uniform 0.25 | divprune@decoder=0.25 |" in printed
    assert main(["confirm", "pool=0.25", *arguments, "--number", "0"]) == 2
    assert "another rule" in capsys.readouterr().err
    assert main(["run", "--draw", "confirming:0", "--limit", "1", "--out", str(tmp_path / "x")]) == 2
    assert "for `python -m eval confirm`" in capsys.readouterr().err
