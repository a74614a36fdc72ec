"""Runs: one method at one budget, and the set of runs that a sweep consists of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import vtc
from eval.bounds import TruthSelector
from vtc import CompressionConfig
from vtc.notation import parse_stages, split_positions, split_stages

BASELINES = ("random", "uniform", "pool", "resize")
"""Part of every comparison, requested or not, as far as the model supports them."""

BOUNDS = ("oracle", "anti-oracle")
"""Selections that use the ground truth of a generated task: the upper and lower bound of a method, not methods."""

REGIONAL = ("pixelrefer",)
"""Methods that are asked about a marked part of a picture, which no task has."""

_BLIND, _RESIZE, _COMPACT = "blind", "resize", " compact"


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Attributes
    ----------
    method : str or None
        A method of `vtc`, several with their sites, one of `BOUNDS`, "blind", "resize", or None for the uncompressed
        model.
    keep_ratio : float or None
    keep_tokens : int or None
        The budget, one of the two; None and None for the uncompressed and the blind model.
    positions : str
    options : dict
        Options of the method.
    stages : str or None
        The stages in the notation of `vtc.notation`, where they are more than a method and a budget.
    """

    method: str | None = None
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: str = "original"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    stages: str | None = None

    @classmethod
    def of_stages(cls, text: str) -> Run:
        """Return a run of stages in the notation of `vtc.notation`; its budget is what is left behind all of them.

        Raises
        ------
        ConfigError
            The text is not in this notation.
        """
        text, positions = split_positions(text)
        configs = parse_stages(text)
        method = "+".join(setting for setting, _ in split_stages(text))
        if configs[-1].keep_tokens is not None:
            return cls(method, keep_tokens=configs[-1].keep_tokens, positions=positions, stages=text)
        shares = [config.keep_ratio for config in configs if config.keep_ratio is not None]
        share = math.prod(shares) if len(shares) == len(configs) else None
        return cls(method, keep_ratio=share, positions=positions, stages=text)

    @property
    def name(self) -> str:
        """The name in rows and tables, unique among runs."""
        if self.method is None:
            return "all tokens"
        if self.method == _BLIND:
            return _BLIND
        if self.stages is not None:
            return self.stages + (_COMPACT if self.positions == "compact" else "")
        keep = f"{self.keep_ratio:g}" if self.keep_ratio is not None else f"{self.keep_tokens} tokens"
        extra = "".join(f" {key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method} {keep}{'' if self.positions == 'original' else ' ' + self.positions}{extra}"

    @property
    def resizes(self) -> bool:
        """Whether the pictures themselves become smaller."""
        return self.method == _RESIZE

    def plan(self, seed: int = 0) -> list[CompressionConfig]:
        """Return the configurations for `vtc.compress`; none where nothing is compressed.

        Raises
        ------
        ConfigError
            A number or an option is out of range.
        """
        if self.method in (None, _BLIND, _RESIZE):
            return []
        if self.stages is not None:
            shared = {"seed": seed, "positions": self.positions}
            return [dataclasses.replace(config, **shared) for config in parse_stages(self.stages)]
        config = CompressionConfig(
            self.method,
            keep_ratio=self.keep_ratio,
            keep_tokens=self.keep_tokens,
            positions=self.positions,
            seed=seed,
            options=self.options,
        )
        return [config]

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as plain JSON types; `from_dict` reads them."""
        fields = dataclasses.asdict(self)
        if self.stages is None:
            del fields["stages"]
        return {"name": self.name, **fields}

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
    settings: Sequence[str] = (),
) -> list[Run]:
    """Return the uncompressed and the blind model, every method and baseline at every budget, and the settings.

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
    settings : sequence of str
        Stages in the notation of `vtc.notation`, with their own budgets.

    Raises
    ------
    ConfigError
        A method does not exist, or a budget or an option is out of range.
    """
    known = [name for name in vtc.list_methods() if name != TruthSelector.name]
    everything = [name for name in known if name != "kvpress"]
    names = [name for each in methods for name in (everything if each == "all" else [each])]
    unknown = [name for name in names if name not in (*known, _RESIZE)]
    if unknown:
        raise vtc.ConfigError(f"unknown method(s) {', '.join(unknown)}; there are: {', '.join(known)}")
    names = list(dict.fromkeys([*BASELINES, *names, *(BOUNDS if bounds else ())]))
    if wrong := [budget for budget in keep if not 0 < budget < 2**31 or (budget > 1 and budget != int(budget))]:
        raise vtc.ConfigError(f"--keep takes fractions up to 1 and counts above it, got {', '.join(map(str, wrong))}")
    runs = [FULL, BLIND]
    for name in names:
        for budget in keep:
            share = {"keep_ratio": float(budget)} if budget <= 1 else {"keep_tokens": int(budget)}
            for where in positions if name != _RESIZE else ("original",):
                runs.append(Run(name, positions=where, options=(options or {}).get(name, {}), **share))
    runs += [Run.of_stages(text) for text in dict.fromkeys(settings)]
    for run in runs:
        run.plan()  # raises now, before a model is loaded
    return runs


def supported_runs(
    runs: Sequence[Run], model: Any, requested: Sequence[str], resize_refused: str | None = None
) -> tuple[list[Run], dict[str, str]]:
    """Return the runs that the model supports, and for the others, by name, the reason.

    Parameters
    ----------
    runs : sequence of Run
    model : PreTrainedModel
    requested : sequence of str
        Methods and settings that were asked for by name.
    resize_refused : str, optional
        Why pictures cannot be made smaller for this model.

    Raises
    ------
    UnsupportedMethodError, ConfigError
        The model supports no run of a method that was requested by name.
    """
    supported: list[Run] = []
    errors: dict[str, vtc.VtcError] = {}
    for run in runs:
        plan = [] if run.method in BOUNDS else run.plan()
        try:
            if run.resizes and resize_refused is not None:
                raise vtc.UnsupportedMethodError(f"resize: {resize_refused}")
            if plan:
                with vtc.compressed(model, plan):
                    pass
                if any(config.method in REGIONAL for config in plan):
                    raise vtc.UnsupportedMethodError(f"{run.name}: the tasks mark no regions; see eval.regions")
            supported.append(run)
        except (vtc.UnsupportedMethodError, vtc.ConfigError) as error:
            errors[run.name] = error
    for name in requested:
        asked = [run for run in runs if name in (run.method, run.stages, run.name)]
        refused = [errors[run.name] for run in asked if run.name in errors]
        if refused and not any(run in supported for run in asked):
            raise refused[0]
    return supported, {name: str(error) for name, error in errors.items()}
