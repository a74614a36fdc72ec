"""What is measured: one setting of one method, and which settings a sweep is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import vtc
from eval.bounds import TruthSelector
from vtc import CompressionConfig

BASELINES = ("random", "uniform")
"""Stand in every comparison, asked for or not."""

BOUNDS = ("oracle", "anti-oracle")
"""Selections that know the truth of a generated task: not methods, but the frame that methods are seen in."""


_BLIND = "blind"


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes
    ----------
    method : str or None
        A method of `vtc`, one of `BOUNDS`, "blind", or None for the model with all its tokens.
    keep_ratio : float or None
    keep_tokens : int or None
        One of the two, neither with all tokens or blind.
    positions : str
    options : dict
        Of the method.
    """

    method: str | None = None
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: str = "original"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Unique among cells; what rows are filed under."""
        if self.method is None:
            return "all tokens"
        if self.method == _BLIND:
            return _BLIND
        keep = f"{self.keep_ratio:g}" if self.keep_ratio is not None else f"{self.keep_tokens} tokens"
        extra = "".join(f" {key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method} {keep}{'' if self.positions == 'original' else ' ' + self.positions}{extra}"

    def config(self, seed: int = 0) -> CompressionConfig | None:
        """The configuration that `vtc.compress` takes; None for all tokens, and for the blind model that has them too.

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
        """Name and fields as plain JSON types; `from_dict` reads them."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that `to_dict` wrote down."""
        return cls(**{key: value for key, value in data.items() if key != "name"})


FULL = Cell()

BLIND = Cell(_BLIND)
"""Every picture and frame is an even grey: what the question alone gives away, the floor of every score."""


def sweep_cells(
    methods: Sequence[str],
    keep: Iterable[float],
    *,
    positions: Sequence[str] = ("original",),
    bounds: bool = False,
    options: dict[str, dict[str, Any]] | None = None,
) -> list[Cell]:
    """All tokens, none to see, then every method at every budget; baselines come along, asked for or not.

    Parameters
    ----------
    methods : sequence of str
        Names, or "all".
    keep : iterable of float
        At most 1: fractions. Above: numbers of tokens.
    positions : sequence of str
    bounds : bool
        Whether the task can frame the methods by `BOUNDS`.
    options : dict of str to dict, optional
        Options by method.

    Raises
    ------
    ConfigError
        A method or a budget does not exist.
    """
    known = [name for name in vtc.list_methods() if name != TruthSelector.name]
    names = known if list(methods) == ["all"] else list(methods)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise vtc.ConfigError(f"unknown method(s) {', '.join(unknown)}; there are: {', '.join(known)}")
    names = list(dict.fromkeys([*BASELINES, *names, *(BOUNDS if bounds else ())]))
    cells = [FULL, BLIND]
    for name in names:
        for budget in keep:
            share = {"keep_ratio": float(budget)} if budget <= 1 else {"keep_tokens": int(budget)}
            for where in positions:
                cells.append(Cell(name, positions=where, options=(options or {}).get(name, {}), **share))
    for cell in cells:
        cell.config()  # says now what is wrong with a number
    return cells


def fitting(cells: Sequence[Cell], model: Any, asked: Sequence[str]) -> tuple[list[Cell], dict[str, str]]:
    """Cells that the model can run, and why not the others, by name.

    Raises
    ------
    UnsupportedMethodError, ConfigError
        A method that was asked for by name cannot run on this model at all.
    """
    good, bad = [], {}
    for cell in cells:
        config = None if cell.method in BOUNDS else cell.config()
        try:
            if config is not None:
                with vtc.compressed(model, config):
                    pass
            good.append(cell)
        except (vtc.UnsupportedMethodError, vtc.ConfigError) as error:
            bad[cell.name] = error
    for name in asked:
        runs = any(cell.method == name for cell in good)
        refused = [bad[cell.name] for cell in cells if cell.method == name and cell.name in bad]
        if refused and not runs:
            raise refused[0]
    return good, {name: str(error) for name, error in bad.items()}
