"""Confirms a rule on pictures that nobody has looked at: the rule is written down first, and there is one look.

A lock file per task and confirming seed holds the fingerprint of the rule: its settings, what it is compared with, how
many questions there will be, and the source of the selector files that it uses. It is written before a question is
drawn. The same rule may be asked again, on another model or to continue; another rule is refused.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtc
from eval import comparison, seeds, sweep
from eval.conditions import conditions
from eval.runs import Run
from eval.sweep import Job
from vtc.files import write_text
from vtc.plain import parse_json
from vtc.registry import get_selector

LOCKS = Path(__file__).parent / "locks"


@dataclass(frozen=True)
class Rule:
    """What is to be confirmed.

    Attributes
    ----------
    settings : tuple of str
        In the notation of `vtc.notation`.
    against : tuple of str
        Methods that each setting is compared with, at its budget.
    task : str
    pictures, per_picture : int
    rivals : tuple of str
        Settings that the rule's are compared with, one by one: those of equal cost, say. None, or as many.
    """

    settings: tuple[str, ...]
    against: tuple[str, ...]
    task: str
    pictures: int
    per_picture: int
    rivals: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return everything that the fingerprint depends on as plain JSON types.

        Raises
        ------
        ConfigError, UnsupportedMethodError
            A setting is not in the notation, or a method does not exist.
        """
        methods = {config.method for text in (*self.settings, *self.rivals) for config in Run.of_stages(text).plan()}
        files = {path for method in methods for path in _sources(Path(inspect.getfile(type(get_selector(method)))))}
        return {
            "settings": list(self.settings),
            "against": list(self.against),
            "task": self.task,
            "pictures": self.pictures,
            "per_picture": self.per_picture,
            **({"rivals": list(self.rivals)} if self.rivals else {}),
            "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)},
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `described`."""
        return hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()

    def pairs(self) -> list[tuple[str, str]]:
        """Return the names of the runs to compare: every rival or method of the same budget, and the setting."""
        found = list(zip(self.rivals, self.settings, strict=False))
        for run in map(Run.of_stages, self.settings):
            for method in self.against:
                other = Run(method, _short(run.keep_ratio), run.keep_tokens)
                found.append((other.name, run.name))
        return found

    def budgets(self) -> tuple[float, ...]:
        """Return the budgets of the settings at which methods are compared with them.

        Raises
        ------
        ConfigError
            A setting mixes counts and fractions, so that no other method has the same budget.
        """
        runs = [Run.of_stages(text) for text in self.settings if self.against]
        if bare := [run.name for run in runs if run.keep_ratio is None and run.keep_tokens is None]:
            raise vtc.ConfigError(f"{bare[0]} has no one budget that a method could be compared at")
        return tuple(dict.fromkeys(_short(run.keep_ratio) or float(run.keep_tokens or 0) for run in runs))


def lock(rule: Rule, number: int | None, folder: Path = LOCKS) -> int:
    """Write the rule down for one confirming seed, by default the first that is free, and return its number.

    Raises
    ------
    ConfigError
        Another rule was confirmed on that seed.
    """
    fingerprint = rule.fingerprint
    for candidate in range(len(seeds.RANGES["confirming"])) if number is None else (number,):
        seeds.seed_of(f"confirming:{candidate}", confirm=True)
        path = folder / f"{rule.task}-{candidate}.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            stated = {"fingerprint": fingerprint, "rule": rule.described(), "conditions": conditions()}
            write_text(path, json.dumps(stated, indent=2) + "\n")
            return candidate
        if parse_json(path.read_bytes()).get("fingerprint") == fingerprint:
            return candidate
        if number is not None:
            raise vtc.ConfigError(
                f"{path}: confirming:{number} was looked at with another rule, or its selectors have changed since; a "
                "second look confirms nothing, so take another --number"
            )
    raise vtc.ConfigError(f"every confirming seed of {rule.task} has been looked at")


def confirm(rule: Rule, job: Job, number: int | None, folder: Path = LOCKS) -> str:
    """Write the rule down, draw the questions, answer them, and return the table of differences."""
    drawn = f"confirming:{lock(rule, number, folder)}"
    job = job.confirming(drawn)
    sweep.answer(job, job.load())
    found = sweep.results(job.out)
    found.write(job.out)
    answered = set(found.frame["run"])
    pairs = [(a, b) for a, b in rule.pairs() if {a, b} <= answered]
    parts = [f"{drawn}, {rule.task}, {job.model}; rule {rule.fingerprint[:12]}", found.markdown()]
    if pairs:
        parts.append(comparison.to_markdown([each for a, b in pairs for each in comparison.compare(a, b, job.out)]))
    missing = dict.fromkeys(name for pair in rule.pairs() for name in pair if name not in answered)
    parts += [f"Not on this model: {', '.join(missing)}."] if missing else []
    return "\n\n".join(part.strip() for part in parts)


def _short(keep: float | None) -> float | None:
    return None if keep is None else float(f"{keep:.6g}")


def _sources(path: Path, seen: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """Return a selector's file and the files beside it that it imports, and so on."""
    found = seen | {path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            beside = path.parent / f"{node.module.rpartition('.')[2]}.py"
            local = node.level == 1 or node.module.startswith("vtc.selectors")
            if local and beside.is_file() and beside not in found:
                found = _sources(beside, found)
    return found


def rule_of(
    settings: Sequence[str],
    against: Sequence[str],
    task: str,
    pictures: int,
    per_picture: int,
    rivals: Sequence[str] = (),
) -> Rule:
    """Return the rule, after a look at whether it can be one.

    Raises
    ------
    ConfigError
        A setting has no one budget, or there are rivals, but not one for each setting.
    """
    if rivals and len(rivals) != len(settings):
        raise vtc.ConfigError(f"{len(settings)} settings were given, but {len(rivals)} rivals; give one for each")
    if not rivals:
        settings = tuple(dict.fromkeys(settings))
    rule = Rule(tuple(settings), tuple(dict.fromkeys(against)), task, pictures, per_picture, tuple(rivals))
    rule.budgets()
    return rule
