"""What a run would cost at the shape of a real checkpoint: the whole call, from picture to first token, in seconds.

Scores are those of a small model, whose own times say nothing about a large one. A committed table holds measured
seconds of the parts of a call at a true shape, by number of tokens: preprocessing, vision tower, selectors and decoder.
The cost of a run is read off it: the tower by the share of patches that each of its layers sees, the decoder by the
mean number of tokens in its layers, the selectors by the share that they keep. What methods read inside the decoder is
not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vtc
from eval.conditions import conditions
from eval.runs import BLIND, BOUNDS, Run
from vtc.plain import parse_json
from vtc.registry import get_selector

TABLES = Path(__file__).parent / "costs"
LAYERS = {"qwen2.5-vl-3b": 32}
"""Shapes that can be measured, and the layers of their towers."""

WIDTHS = {"qwen2.5-vl-3b": 2048}
"""Of their embeddings."""

TOKENS = (16, 36, 64, 144, 324, 576)
"""Visual tokens at which a table is measured; costs are those of a picture of the last number."""

SHARES = (0.056, 0.11, 0.25, 0.5)
"""Shares kept at which selectors are measured, among the largest number of tokens."""

SETTINGS = ("divprune@vision:8=0.5+divprune@decoder=0.5", "divprune@vision:11=0.25+divprune@decoder=0.4")
"""Stages in the tower whose realised share the table takes over."""


@dataclass(frozen=True)
class CostTable:
    """Measured seconds at the shape of one checkpoint.

    Attributes
    ----------
    name : str
    layers : int
        Of the vision tower.
    tokens : tuple of int
        Visual tokens at which was measured, ascending.
    preprocessing, tower, decoder : tuple of float
        Seconds at these numbers.
    realised : float
        What shortening the tower inside saves in fact: the computed time divided by the measured one.
    selectors : mapping of str to tuple of float
        Seconds of methods that choose among the largest number of tokens, at `SHARES`.
    conditions : dict
        Machine, versions and commands.
    """

    name: str
    layers: int
    tokens: tuple[int, ...]
    preprocessing: tuple[float, ...]
    tower: tuple[float, ...]
    decoder: tuple[float, ...]
    realised: float
    selectors: Mapping[str, tuple[float, ...]]
    conditions: Mapping[str, Any]

    @classmethod
    def load(cls, name: str, folder: Path = TABLES) -> CostTable:
        """Read the table of a shape.

        Raises
        ------
        ConfigError
            It was not measured, or is not such a table.
        """
        path = folder / f"{name}.json"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in folder.glob("*.json"))) or "none yet"
            raise vtc.ConfigError(
                f"no costs of {name!r} were measured (there are: {known}); run `{bench_command(name)}`, then "
                f"`python -m eval cost {name} --bench bench.json`"
            )
        try:
            data = parse_json(path.read_bytes())
            columns = {key: tuple(data[key]) for key in ("tokens", "preprocessing", "tower", "decoder")}
            return cls(
                data["name"],
                data["layers"],
                **columns,
                realised=data["realised"],
                selectors={name: tuple(seconds) for name, seconds in data["selectors"].items()},
                conditions=data["conditions"],
            )
        except (KeyError, TypeError) as error:
            raise vtc.ConfigError(f"{path}: not a table of costs ({error!r})") from error

    def described(self) -> str:
        """Say in a line what the seconds are."""
        bench = self.conditions["bench"]
        where = bench["machine"].get("gpu") or f"{bench['machine']['cpu']}, {bench['machine']['threads']} threads"
        return (
            f"{self.name}, a picture of {self.tokens[-1]} visual tokens, {bench.get('text_tokens')} of text, batch 1, "
            f"{bench.get('dtype')}, {where}; preprocessing, tower, selectors and decoder, interpolated; without what "
            "methods read inside the decoder"
        )

    def seconds(self, run: Run, kept: float, tower_layers: int | None) -> float | None:
        """Return the seconds of a call of a run; None for bounds and the blind model, which nobody deploys.

        Parameters
        ----------
        run : Run
        kept : float
            Share of the visual tokens, mean over decoder layers.
        tower_layers : int or None
            Of the model that was scored: its layer k stands for the layer at the same depth of this tower. None: not
            known, and then a run with stages in the tower has no cost; nor has a method that is made for the tower.
        """
        if run == BLIND or run.method in BOUNDS:
            return None
        whole = self.tokens[-1]
        if run.resizes:
            return self._of_smaller_picture(kept * whole) + self._at(self.decoder, kept * whole)
        tower = self._tower(run, kept, tower_layers)
        choosing = self.selector_seconds(run) or 0.0
        return None if tower is None else tower + choosing + self._at(self.decoder, kept * whole)

    def _of_smaller_picture(self, tokens: float) -> float:
        return self._at(self.preprocessing, tokens) + self._at(self.tower, tokens)

    def selector_seconds(self, run: Run) -> float | None:
        """Sum what the selectors of a run take, each in proportion to the tokens that it chooses among.

        None if none of them was measured: methods that choose inside the tower or the decoder were not.
        """
        if run.method in BOUNDS or not any(config.method in self.selectors for config in run.plan()):
            return None
        seconds, left = 0.0, 1.0
        for config in run.plan():
            share = config.keep_ratio
            if share is None:
                share = min(1.0, (config.keep_tokens or 0) / self.tokens[-1])
            if config.method in self.selectors and share < 1:
                seconds += left * float(np.interp(share, SHARES, self.selectors[config.method]))
            left *= share
        return seconds

    def _tower(self, run: Run, kept: float, tower_layers: int | None) -> float | None:
        """Return the seconds of preprocessing and tower; None if it is not known how deep a stage of the tower is."""
        whole, seen, smaller, others = self.tokens[-1], np.ones(self.layers), False, 1.0
        for config in run.plan():
            site = config.site
            if site is None:
                own = get_selector(config.method, **config.options).stages()
                if own and isinstance(own[0].site, (vtc.Pixels, vtc.VisionLayer)) and config.method != "resize":
                    return None  # methods of the tower settle by themselves what its layers see
            if config.method == "resize":
                smaller = True
                continue
            others *= config.keep_ratio or 1.0
            if not isinstance(site, (vtc.Pixels, vtc.VisionLayer)):
                continue
            if tower_layers is None or config.keep_ratio is None:
                return None
            first = site.layer if isinstance(site, vtc.VisionLayer) else 0
            seen[round(first / tower_layers * self.layers) :] *= config.keep_ratio
        if smaller:
            whole *= min(1.0, kept / others)  # a picture shrinks by whole tokens: what came out, not what was asked for
        if (seen == 1).all():
            return self._of_smaller_picture(whole)
        preprocessing = self._at(self.preprocessing, whole)
        return preprocessing + float(np.mean([self._at(self.tower, share * whole) for share in seen])) / self.realised

    def _at(self, seconds: Sequence[float], tokens: float) -> float:
        """Interpolate; fewer tokens than were measured cost as much as the fewest."""
        return float(np.interp(tokens, self.tokens, seconds))


def bench_command(name: str) -> str:
    """Return the command that measures tower and decoder."""
    settings = " ".join(f"--setting {text}" for text in SETTINGS)
    return f"vtc bench tower --model {name} --visual-tokens {' '.join(map(str, TOKENS))} {settings} --json bench.json"


def selectors_command(name: str, share: float) -> str:
    """Return the command that measures the selectors at a share kept."""
    return (
        f"vtc bench selectors --tokens {TOKENS[-1]} --width {WIDTHS[name]} --keep-ratio {share} "
        f"--json selectors-{share}.json"
    )


def from_bench(name: str, bench: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    """Return a table as JSON types, of the results of `bench_command` and of preprocessing measured now.

    Raises
    ------
    ConfigError
        The results are of another shape or benchmark.
    """
    results = [each for each in bench.get("results", ()) if each.get("model") == name and "realised_share" in each]
    plain = sorted((each for each in results if each["setting"] == "untouched"), key=lambda each: each["visual_tokens"])
    if not plain:
        raise vtc.ConfigError(
            f"no results of `vtc bench tower` for {name!r}; measure them with `{bench_command(name)}`"
        )
    tokens = [each["visual_tokens"] for each in plain]
    largest = [each for each in results if each["visual_tokens"] == tokens[-1]]
    inside = [each["realised_share"] for each in largest if "@vision:" in each["setting"]]
    return {
        "name": name,
        "layers": LAYERS[name],
        "tokens": tokens,
        "preprocessing": [_preprocessing(processor, n) for n in tokens],
        "tower": [each["front"]["median"] for each in plain],
        "decoder": [each["decoder"] for each in plain],
        "realised": statistics.median(inside) if inside else 1.0,
        "selectors": {},
        "conditions": {"bench": bench["conditions"], "preprocessing": conditions()},
    }


def with_selectors(table: Mapping[str, Any], selectors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a table with the selectors' seconds, of the results of `selectors_command` at each of `SHARES`.

    Raises
    ------
    ConfigError
        A share is missing, or the results are of another shape or benchmark.
    """
    name, tokens = table["name"], table["tokens"][-1]
    by_share = {each.get("conditions", {}).get("keep_ratio"): each for each in selectors}
    if missing := [share for share in SHARES if share not in by_share]:
        raise vtc.ConfigError(
            "no results of `vtc bench selectors` at every share; measure the missing ones with "
            + ", ".join(f"`{selectors_command(name, share)}`" for share in missing)
        )
    seconds: dict[str, list[float]] = {}
    for share in SHARES:
        for each in by_share[share]["results"]:
            if (each["tokens"], each["width"]) == (tokens, WIDTHS[name]):
                seconds.setdefault(each["method"], []).append(each["ours"]["median"])
    if not seconds or any(len(found) != len(SHARES) for found in seconds.values()):
        raise vtc.ConfigError(
            f"the results of `vtc bench selectors` are not of the same methods, {tokens} tokens and a width of "
            f"{WIDTHS[name]} at every share"
        )
    measured = {**table["conditions"], "selectors": by_share[SHARES[0]]["conditions"]}
    return {**table, "selectors": seconds, "conditions": measured}


def _preprocessing(processor: Any, tokens: int, repeats: int = 5) -> float:
    """Time the image processor on a square picture of about so many tokens, from decoded pixels."""
    images = processor.image_processor
    side = round(tokens**0.5) * images.patch_size * images.merge_size
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        images(images=[picture], return_tensors="pt", size={"shortest_edge": 1, "longest_edge": 2 * side * side})
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
