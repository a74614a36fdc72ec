"""Running hypothesis for long: counting, telling failures apart, and going on behind one that is known."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.internal.conjecture import engine as hypothesis_engine

from tests.fuzz import modes

ROOT = Path(__file__).parent.parent.parent
SHRINKING_SECONDS = 45


@dataclass
class Campaign:
    """Failures found so far; `active` one is told of every failure before hypothesis is."""

    known: dict[str, str] = field(default_factory=dict)
    """Signature to reproducer."""
    current: str | None = None
    """Signature of the failure that hypothesis is making smaller."""


ACTIVE: Campaign | None = None
COUNTS: Counter[str] = Counter()
"""Selections, configurations and files."""


def signature(error: BaseException) -> str:
    """What tells one failure from another: its type, where in this repository it arose, and its words."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "vtc")] or frames
    words = re.sub(r"[-+]?\d[\d.e+-]*", "#", str(error).split("\n")[0])
    where = "" if isinstance(error, AssertionError) else f"{Path(ours[-1].filename).name}:{ours[-1].name}: "
    return f"{type(error).__name__}: {where}{words}"[:160]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """In a long run, give up examples that fail in a way that is known: they hide what else there is to find."""
    try:
        yield
    except (hypothesis.errors.UnsatisfiedAssumption, hypothesis.errors.StopTest):
        raise
    except Exception as error:
        if ACTIVE is not None:
            found = signature(error)
            if ACTIVE.current is None and found not in ACTIVE.known:
                ACTIVE.current = found
            if found != ACTIVE.current:
                hypothesis.reject()
        raise


def settings(examples: int, *, steps: int = 12, derandomize: bool = False) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=derandomize,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


def counter_line(campaign: Campaign | None = None) -> str:
    calls = sum(count for name, count in modes.COUNTS.items() if not name.startswith("refused"))
    refusals = sum(count for name, count in modes.COUNTS.items() if name.startswith("refused"))
    counted = ", ".join(f"{COUNTS[name]:,} {name}" for name in ("selections", "configurations", "files", "faults"))
    failures = 0 if campaign is None else len(campaign.known)
    return f"{calls:,} model calls ({refusals:,} refused), {counted}, {failures} failures"


def explore(parts: dict[str, Callable[[int], None]], *, minutes: float, seed: int) -> Campaign:
    """Run the parts in turn, each with seeds of its own, until the time is up; print failures as they come.

    A part is a function that runs some examples from a seed and raises what it finds, with hypothesis' notes on it.
    """
    global ACTIVE
    ACTIVE = campaign = Campaign()
    hypothesis_engine.MAX_SHRINKING_SECONDS = SHRINKING_SECONDS
    end, round_number, told = time.monotonic() + 60 * minutes, 0, time.monotonic()
    try:
        while time.monotonic() < end:
            for name, part in parts.items():
                if time.monotonic() >= end:
                    break
                campaign.current = None
                try:
                    part(1000 * seed + round_number)
                except hypothesis.errors.UnsatisfiedAssumption:
                    pass  # what is known, in a part without hypothesis
                except Exception as error:  # every kind of failure is collected
                    _note(campaign, name, error)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    print(counter_line(campaign), flush=True)
            round_number += 1
    finally:
        ACTIVE = None
    print(counter_line(campaign), flush=True)
    return campaign


def _note(campaign: Campaign, name: str, error: BaseException) -> None:
    found = campaign.current or signature(error)
    if found in campaign.known:
        return
    notes = "\n".join(getattr(error, "__notes__", ()))
    innermost: list[Any] = traceback.format_tb(error.__traceback__)[-3:]
    campaign.known[found] = f"{notes}\n{''.join(innermost)}{type(error).__name__}: {error}"
    print(f"\n==== failure {len(campaign.known)} in {name}: {found}\n{campaign.known[found]}\n", flush=True)
