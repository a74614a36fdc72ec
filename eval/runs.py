"""Runs: one method at one budget, and the set of runs that a sweep consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import vtc
from eval.bounds import TruthSelector
from vtc import CompressionConfig

BASELINES = ("random", "uniform")
"""Part of every comparison, requested or not."""

BOUNDS = ("oracle", "anti-oracle")
"""Selections that use the ground truth of a generated task: the upper and lower bound of a method, not methods."""

_BLIND = "blind"


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes
    ----------
    method : str or None
        A method of `vtc`, one of `BOUNDS`, "blind", or None for the uncompressed model.
    keep_ratio : float or None
    keep_tokens : int or None
        The budget, one of the two; None and None for the uncompressed and the blind model.
    positions : str
    options : dict
        Options of the method.
    """

    method: str | None = None
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: str = "original"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The name in rows and tables, unique among runs."""
        if self.method is None:
            return "all tokens"
        if self.method == _BLIND:
            return _BLIND
        keep = f"{self.keep_ratio:g}" if self.keep_ratio is not None else f"{self.keep_tokens} tokens"
        extra = "".join(f" {key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method} {keep}{'' if self.positions == 'original' else ' ' + self.positions}{extra}"

    def config(self, seed: int = 0) -> CompressionConfig | None:
        """Return the configuration for `vtc.compress`; None where nothing is compressed.

        Raises
        ------
        ConfigError
            A number or an option is out of range.
        """
        if self.method in (None, _BLIND):
            return None
        return CompressionConfig(
            self.method,
            keep_ratio=self.keep_ratio,
            keep_tokens=self.keep_tokens,
            positions=self.positions,
            seed=seed,
            options=self.options,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as plain JSON types; `from_dict` reads them."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Run:
        """Return the run that `to_dict` described."""
        return cls(**{key: value for key, value in data.items() if key != "name"})


FULL = Run()
"""The uncompressed model."""

BLIND = Run(_BLIND)
"""The uncompressed model on uniform grey images: the score that the question alone gives, a lower bound."""


def sweep_runs(
    methods: Sequence[str],
    keep: Iterable[float],
    *,
    positions: Sequence[str] = ("original",),
    bounds: bool = False,
    options: dict[str, dict[str, Any]] | None = None,
) -> list[Run]:
    """Return the uncompressed and the blind model, then every method and baseline at every budget.

    Parameters
    ----------
    methods : sequence of str
        Names, or "all".
    keep : iterable of float
        Fractions up to 1, numbers of tokens above.
    positions : sequence of str
    bounds : bool
        Include `BOUNDS`, for tasks that know the truth.
    options : dict of str to dict, optional
        Options by method.

    Raises
    ------
    ConfigError
        A method does not exist, or a budget or an option is out of range.
    """
    known = [name for name in vtc.list_methods() if name != TruthSelector.name]
    names = known if list(methods) == ["all"] else list(methods)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise vtc.ConfigError(f"unknown method(s) {', '.join(unknown)}; there are: {', '.join(known)}")
    names = list(dict.fromkeys([*BASELINES, *names, *(BOUNDS if bounds else ())]))
    if wrong := [budget for budget in keep if not 0 < budget < 2**31 or (budget > 1 and budget != int(budget))]:
        raise vtc.ConfigError(f"--keep takes fractions up to 1 and counts above it, got {', '.join(map(str, wrong))}")
    runs = [FULL, BLIND]
    for name in names:
        for budget in keep:
            share = {"keep_ratio": float(budget)} if budget <= 1 else {"keep_tokens": int(budget)}
            for where in positions:
                runs.append(Run(name, positions=where, options=(options or {}).get(name, {}), **share))
    for run in runs:
        run.config()  # raises now, before a model is loaded
    return runs


def supported_runs(runs: Sequence[Run], model: Any, requested: Sequence[str]) -> tuple[list[Run], dict[str, str]]:
    """Return the runs that the model supports, and for the others, by name, the reason.

    Raises
    ------
    UnsupportedMethodError, ConfigError
        The model supports no run of a method that was requested by name.
    """
    supported, errors = [], {}
    for run in runs:
        config = None if run.method in BOUNDS else run.config()
        try:
            if config is not None:
                with vtc.compressed(model, config):
                    pass
            supported.append(run)
        except (vtc.UnsupportedMethodError, vtc.ConfigError) as error:
            errors[run.name] = error
    for name in requested:
        refused = [errors[run.name] for run in runs if run.method == name and run.name in errors]
        if refused and not any(run.method == name for run in supported):
            raise refused[0]
    return supported, {name: str(error) for name, error in errors.items()}
