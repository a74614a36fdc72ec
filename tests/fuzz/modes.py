"""What the model fuzz draws from: settings of `compress`, kinds of batches, modes of calling a model.

`expected` is the oracle: what a fresh model says that was compressed once with the setting and then called once, alone.
Everything that a long-used model says is compared with it bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor, StaticCache
from transformers.utils import is_optimum_quanto_available

import vtc
from tests import reference, tiny
from tests.engine.test_training import labelled
from tests.engine.test_turns import Turn, question
from tests.invariants.matrix import METHODS, PREFILLS_IN_CHUNKS, Method
from vtc import CompressionConfig
from vtc.budget import resolve_budget
from vtc.engine.cache import CACHE

Inputs = dict[str, Any]
Values = tuple[torch.Tensor, ...]

STEPS = 4
SAY = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    # A random model would say the placeholder ids too, which transformers refuses without a cache.
    "suppress_tokens": [tiny.IMAGE, tiny.VIDEO],
    "return_dict_in_generate": True,
    "output_logits": True,
}
# How far a compressed answer may be from the masked model's: rounding, where one wrong token moves whole units.
MASKING_TOLERANCE = 1e-3

COUNTS: Counter[str] = Counter()
"""Calls of models, by mode, and what was refused, by message."""


# ------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """One way to compress: a list of configurations with a name."""

    name: str
    configs: tuple[CompressionConfig, ...]
    by_ratio: bool = True
    merges: bool = False
    tower: bool = False

    @property
    def keeps_all(self) -> bool:
        return all(config.keep_ratio == 1.0 and config.structural == "keep" for config in self.configs)

    @property
    def is_masking(self) -> bool:
        """Whether what it says is what the untouched model says with the same tokens masked."""
        plain = all(config.positions == "original" and config.structural == "keep" for config in self.configs)
        # What leaves in the tower changes the features of what stays; `test_8_towers.py` masks there.
        return plain and not self.merges and not self.tower and "cache" not in self.sites

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple("decoder:K" if "decoder:" in str(c.at) else str(c.at or "default") for c in self.configs)

    def compress(self, model: Any) -> None:
        vtc.compress(model, list(self.configs))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _of(method: Method, name: str, **changes: Any) -> Setting:
    stages = tuple(dataclasses.replace(stage, **changes) for stage in method.stages)
    # In the tower every crop has a budget of its own.
    return Setting(f"{method.name}{name}", stages, method.by_ratio and not method.tower, method.merges, method.tower)


def _composed(*stages: tuple[str, float, str | None]) -> Setting:
    configs = tuple(CompressionConfig(name, keep_ratio=ratio, at=at) for name, ratio, at in stages)
    return Setting("+".join(f"{name} {ratio:g} at {at or 'default'}" for name, ratio, at in stages), configs)


@functools.cache
def _candidates(family: tiny.Family) -> tuple[Setting, ...]:
    found: list[Setting] = []
    for method in METHODS:
        if not method.applies_to(family):
            continue
        found += [
            _of(method, ""),
            _of(method, " 0.2", keep_ratio=0.2),
            _of(method, " 3", keep_ratio=None, keep_tokens=3),
        ]
        found += [_of(method, " 0.9 seed 5", keep_ratio=0.9, seed=5)]
        found += [_of(method, " compact", positions="compact"), _of(method, " drop", structural="drop")]
        found.append(_of(method, " all", keep_ratio=1.0))
    for name in ("random", "uniform"):
        for at in ("decoder:1", "decoder:3", "cache"):
            found += [_composed((name, 0.4, at)), _composed((name, 1.0, at))]
    found += [
        _composed(("uniform", 0.6, "decoder"), ("uniform", 0.6, "decoder:2"), ("uniform", 0.5, "cache")),
        _composed(("divprune", 0.5, None), ("random", 0.5, "cache")),
        _composed(("random", 0.7, "decoder:1"), ("random", 0.6, "decoder:2"), ("uniform", 0.5, "decoder:3")),
        _composed(("uniform", 0.5, "decoder:2"), ("uniform", 0.5, "cache")),
    ]
    if family.modality == "video":
        found.append(_composed(("evs", 0.5, None), ("uniform", 0.5, "decoder:2")))
    return tuple(found)


@functools.cache
def _sorted_out(family: tiny.Family) -> tuple[tuple[Setting, ...], tuple[Setting, ...]]:
    model, taken, refused = tiny.build(family.name).model, [], []
    for setting in _candidates(family):
        try:
            setting.compress(model)
            taken.append(setting)
        except vtc.VtcError:
            refused.append(setting)
    vtc.restore(model)
    return tuple(taken), tuple(refused)


def settings(family: tiny.Family) -> tuple[Setting, ...]:
    """All settings that the family takes."""
    return _sorted_out(family)[0]


def refused(family: tiny.Family) -> tuple[Setting, ...]:
    """Settings that the family refuses; at least one."""
    nonsense = Setting("no such method", (CompressionConfig("no-such-method", keep_ratio=0.5),))
    return (*_sorted_out(family)[1], nonsense)


# -------------------------------------------------------------------------------------------------------- batches

DRAWN = 12
"""Batches of random rows beside the kinds of tests/tiny.py."""


def kinds(family: tiny.Family) -> tuple[str, ...]:
    return (*family.kinds, "pictures_only", *(f"drawn-{number}" for number in range(DRAWN)))


@functools.cache
def _inputs(family: tiny.Family, kind: str) -> Inputs:
    case = tiny.build(family.name)
    if kind == "pictures_only":
        return _without_text(case.batch("single"))
    if not kind.startswith("drawn-"):
        return case.batch(kind)
    draw = random.Random(kind)
    rows = []
    for number in range(draw.randint(1, 3)):
        visuals = tuple((None, draw.randint(0, 2)) for _ in range(draw.choice((0, 1, 1, 2, 3))))
        rows.append(tiny.Row(100 + 10 * draw.randint(0, 99) + number, draw.randint(0, 9), visuals, draw.randint(0, 9)))
    return case.collate(rows, side=draw.choice(("left", "left", "right")))


def inputs_of(family: tiny.Family, kind: str) -> Inputs:
    """Inputs of a batch, always the same; a fresh dictionary."""
    return dict(_inputs(family, kind))


def _without_text(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    visual = (tiny.IMAGE, tiny.VIDEO, tiny.VIDEO_START, tiny.VIDEO_END)
    (at,) = torch.where(torch.isin(ids, torch.tensor(visual))[0])
    columns = slice(int(at[0]), int(at[-1]) + 1)
    return {key: value[:, columns] if value.shape == ids.shape else value for key, value in inputs.items()}


# ---------------------------------------------------------------------------------------------------------- modes


@dataclass(frozen=True)
class Mode:
    """One way to call a model.

    Attributes
    ----------
    single
        It takes batches of one row only.
    concurrent
        Threads may do it on one untouched model: it draws nothing and changes nothing on the model.
    tolerance
        How far values may be from expected ones: transformers reuses a longer static cache of an earlier call, over
        which sums are rounded otherwise.
    agrees
        A mode of which the values are the first of this one, and one for what follows, heard of the batch `INNER`.
    """

    name: str
    run: Callable[[tiny.Family, Any, Inputs], Values]
    single: bool = False
    concurrent: bool = False
    tolerance: float = 0.0
    agrees: tuple[str, ...] = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        return f"<{self.name}>"


def values_of(output: Any) -> Values:
    found = (output.sequences, *output.logits)
    scores = getattr(output, "sequences_scores", None)
    return found if scores is None else (*found, scores)


def _generating(**options: Any) -> Callable[[tiny.Family, Any, Inputs], Values]:
    def run(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
        if options.get("do_sample"):
            torch.manual_seed(11)
        return values_of(model.generate(**inputs, **{**SAY, **options}))

    return run


def _embedded(**options: Any) -> Callable[[tiny.Family, Any, Inputs], Values]:
    def run(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
        inputs = dict(inputs)
        with torch.no_grad():
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.manual_seed(11)
        return values_of(model.generate(inputs_embeds=embeds, **inputs, **{**SAY, **options}))

    return run


def _assisted(seed: int) -> Callable[[tiny.Family, Any, Inputs], Values]:
    def run(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
        # A fresh one each time: transformers adapts on it how many tokens it drafts.
        draft = tiny.build(family.name, seed=seed).model
        return values_of(model.generate(**inputs, **SAY, assistant_model=draft))

    return run


def _in_given_cache(static: bool) -> Callable[[tiny.Family, Any, Inputs], Values]:
    def run(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
        config = model.config.get_text_config()
        cache = StaticCache(config=config, max_cache_len=400) if static else DynamicCache(config=config)
        return values_of(model.generate(**inputs, **SAY, **{CACHE: cache}))

    return run


INNER = "no_image_row"
"""The batch that nested calls ask about."""


class Nested(LogitsProcessor):
    """Asks the model something else in the middle of an answer."""

    def __init__(self, model: Any, inputs: Inputs, **options: Any) -> None:
        self.model, self.inputs, self.options = model, inputs, options
        self.heard: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.options.get("forward"):
            self.heard.append(self.model(**self.inputs).logits)
        else:
            self.heard.append(
                self.model.generate(**self.inputs, **{**SAY, "max_new_tokens": 2, **self.options}).sequences
            )
        return scores


def _nested(inner: dict[str, Any], **outer: Any) -> Callable[[tiny.Family, Any, Inputs], Values]:
    def run(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
        other = Nested(model, inputs_of(family, INNER), **inner)
        return (*values_of(model.generate(**inputs, **SAY, **outer, logits_processor=[other])), *other.heard)

    return run


class _Listener:
    """A streamer."""

    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.flatten())

    def end(self) -> None: ...


def _streamed(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    listener = _Listener()
    return (*values_of(model.generate(**inputs, **SAY, streamer=listener)), *listener.heard)


@torch.no_grad()
def _forward(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    return (model(**inputs).logits,)


@torch.no_grad()
def _hidden_states(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    return tuple(model(**inputs, output_hidden_states=True).hidden_states)


@torch.no_grad()
def _two_logits(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    return (model(**inputs, use_cache=False, logits_to_keep=2).logits,)


def _gradients(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    out = model(**labelled(inputs), use_cache=False)
    out.loss.backward()
    found = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return (out.loss.detach(), torch.stack(found))


@torch.no_grad()
def _loop(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    """A loop of bare forward passes as users write it."""
    mask, tokens = inputs["attention_mask"], question(len(inputs["input_ids"]), STEPS)
    out = model(**inputs, use_cache=True)
    logits = [out.logits]
    for step in range(STEPS):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        following = {"input_ids": tokens[:, step : step + 1], "attention_mask": mask, CACHE: out[CACHE]}
        out = model(**following, use_cache=True)
        logits.append(out.logits)
    return tuple(logits)


def turns(family: tiny.Family, model: Any, inputs: Inputs) -> Values:
    """Two turns on one cache; the first half of the values belongs to the first."""
    first = Turn(inputs, model.generate(**inputs, **SAY))
    return (*values_of(first.output), *values_of(model.generate(**following(first), **SAY)))


def following(first: Turn) -> Inputs:
    return first.then(question(len(first.inputs["input_ids"])))


_REUSED = 1e-4
_STATIC = {"cache_implementation": "static"}
_SAMPLING = {"do_sample": True, "top_k": 20}
_MODES = (
    Mode("greedy", _generating(), concurrent=True),
    Mode("sampling", _generating(**_SAMPLING)),
    Mode("beams", _generating(num_beams=3, output_scores=True), concurrent=True),
    Mode("beam-sampling", _generating(num_beams=2, output_scores=True, **_SAMPLING)),
    Mode("several", _generating(num_return_sequences=2, **_SAMPLING)),
    Mode("several-beams", _generating(num_beams=4, num_return_sequences=2, output_scores=True), concurrent=True),
    Mode("prompt-lookup", _generating(prompt_lookup_num_tokens=3), single=True),
    Mode("assisted-by-copy", _assisted(0), single=True),
    Mode("assisted-by-stranger", _assisted(1), single=True),
    Mode("static-cache", _generating(**_STATIC), tolerance=_REUSED),
    Mode("given-static-cache", _in_given_cache(static=True)),
    Mode("given-dynamic-cache", _in_given_cache(static=False), concurrent=True, agrees=("greedy",)),
    Mode("offloaded-cache", _generating(cache_implementation="offloaded")),
    Mode("no-cache", _generating(use_cache=False), concurrent=True),
    # Guidance is a second forward pass inside generate().
    Mode("guidance", _generating(guidance_scale=1.5)),
    Mode("guidance-static", _generating(guidance_scale=1.5, **_STATIC), tolerance=_REUSED),
    Mode("embeds", _embedded()),
    Mode("embeds-beams", _embedded(num_beams=3)),
    Mode("embeds-several", _embedded(num_return_sequences=2, **_SAMPLING)),
    Mode("embeds-static", _embedded(**_STATIC), tolerance=_REUSED),
    Mode("streamed", _streamed, single=True, concurrent=True, agrees=("greedy",)),
    Mode("nested-forward", _nested({"forward": True}), agrees=("greedy", "forward")),
    Mode("nested-generate", _nested({}), agrees=("greedy", "greedy")),
    Mode("nested-no-cache", _nested({"use_cache": False}), agrees=("greedy",)),
    Mode("nested-static", _nested({"forward": True}, **_STATIC), tolerance=_REUSED, agrees=("static-cache", "forward")),
    Mode("forward", _forward, concurrent=True),
    Mode("hidden-states", _hidden_states),
    Mode("two-logits", _two_logits, concurrent=True),
    Mode("gradients", _gradients),
    Mode("loop", _loop),
    Mode("turns", turns, concurrent=True),
)
_CHUNKED = (Mode("chunked-prefill", _generating(prefill_chunk_size=7)),) if PREFILLS_IN_CHUNKS else ()
_QUANTIZED = (
    (Mode("quantized-cache", _generating(cache_implementation="quantized")),) if is_optimum_quanto_available() else ()
)
MODES = (*_MODES, *_CHUNKED, *_QUANTIZED)


def mode(name: str) -> Mode:
    return next(mode for mode in MODES if mode.name == name)


@functools.cache
def modes(family: tiny.Family) -> tuple[Mode, ...]:
    """Modes that transformers can do with the untouched model."""
    found = [mode for mode in MODES if untouched(family, "single", mode).error is None]
    # In chunks transformers 5.24 forgets the videos of GLM-4V: the model does not see them, and nothing is compressed.
    return tuple(mode for mode in found if mode.name != "chunked-prefill" or _sees(family, mode))


def _sees(family: tiny.Family, mode: Mode) -> bool:
    """Whether what the untouched model says in this mode depends on what it is shown."""
    inputs = inputs_of(family, "single")
    other = {key: 1 - value if key.startswith("pixel_values") else value for key, value in inputs.items()}
    theirs = tuple(value.clone() for value in mode.run(family, tiny.build(family.name).model, other))
    return untouched(family, "single", mode).differs_from(Outcome(theirs)) is not None


# --------------------------------------------------------------------------------------------------------- oracle


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a call: values, or what was raised."""

    values: Values = ()
    error: Exception | None = None
    report: dict[str, Any] | None = None

    def differs_from(self, other: Outcome, tolerance: float = 0.0) -> str | None:
        """What differs, in words; None if all is bit-identical, or as near as `tolerance`."""
        if (self.error is None) != (other.error is None) or type(self.error) is not type(other.error):
            return f"raised {self.error!r}, expected {other.error!r}"
        if len(self.values) != len(other.values):
            return f"{len(self.values)} values, expected {len(other.values)}"
        for place, (mine, theirs) in enumerate(zip(self.values, other.values, strict=True)):
            if mine.shape != theirs.shape:
                return f"value {place} has shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
            if not torch.equal(mine, theirs) and not torch.equal(mine.isnan(), theirs.isnan()):
                return f"value {place} has NaN where the other has not"
            if not torch.equal(mine.nan_to_num(), theirs.nan_to_num()):
                error = float((mine.double() - theirs.double()).abs().nan_to_num().max())
                if not error <= tolerance:
                    return f"value {place} differs by {error:.3g}"
        return None


def ask(family: tiny.Family, model: Any, kind: str, mode: Mode, *, with_report: bool = False) -> Outcome:
    """Call the model in this mode. Errors are part of the outcome."""
    COUNTS[mode.name] += 1
    try:
        values = tuple(value.detach().clone() for value in mode.run(family, model, inputs_of(family, kind)))
    except Exception as error:  # whatever it is, it is compared
        return Outcome(error=error)
    report = vtc.report(model) if with_report else None
    return Outcome(values, report=None if report is None else plain_report(report))


def plain_report(report: vtc.Report) -> dict[str, Any]:
    """The report as plain values, without the times."""
    plain = {key: value for key, value in report.to_dict().items() if key != "selector_ms"}
    return plain | {"sites": [{**site, "selector_ms": None} for site in plain["sites"]]}


def can(family: tiny.Family, kind: str, mode: Mode) -> bool:
    """Whether transformers can do this with an untouched model."""
    if mode.single and len(_inputs(family, kind)["input_ids"]) > 1:
        return False
    return untouched(family, kind, mode).error is None


@functools.lru_cache(maxsize=20000)
def untouched(family: tiny.Family, kind: str, mode: Mode) -> Outcome:
    """What an untouched model says."""
    return ask(family, tiny.build(family.name).model, kind, mode)


@functools.lru_cache(maxsize=20000)
def expected(family: tiny.Family, setting: Setting | None, kind: str, mode: Mode) -> Outcome:
    """What a fresh model says that was compressed once and is asked once, checked against what is known of it."""
    if setting is None:
        return untouched(family, kind, mode)
    model = tiny.build(family.name).model
    setting.compress(model)
    try:
        outcome = ask(family, model, kind, mode, with_report=True)
        report = vtc.report(model) if mode.name == "forward" and outcome.error is None else None
    finally:
        vtc.restore(model)  # not only when it is collected: other models are compared with what they were
    if outcome.error is not None:
        if not isinstance(outcome.error, vtc.VtcError):
            raise outcome.error
        COUNTS[f"refused: {mode.name}: {type(outcome.error).__name__}: {outcome.error}"] += 1
        return outcome
    if setting.keeps_all:
        difference = outcome.differs_from(untouched(family, kind, mode), mode.tolerance)
        assert difference is None, f"keeping everything: {difference}"
    if outcome.report is not None:
        check_report(family, setting, kind, outcome.report)
    check_agreement(family, setting, kind, mode, outcome)
    if report is not None:
        check_masking(family, setting, kind, outcome, report)
    return outcome


def check_report(family: tiny.Family, setting: Setting, kind: str, report: dict[str, Any]) -> None:
    """The numbers of a report agree with each other, with the prompt and with what was asked for."""
    inputs = _inputs(family, kind)
    assert report["lengths_before"] == inputs["attention_mask"].sum(dim=1).tolist(), "report: rows"
    visual = (inputs["input_ids"] == tiny.IMAGE) | (inputs["input_ids"] == tiny.VIDEO)
    assert report["visual_tokens_before"] == int(visual.sum()), "report: visual tokens"
    for segment in report["segments"]:
        kept, scored = segment["kept"], segment["tokens_before"] - segment["structural"]
        assert kept == sorted(set(kept)), "report: kept indices ascend"
        assert len(kept) == segment["tokens_after"], "report: tokens_after"
        assert not kept or 0 <= kept[0] <= kept[-1] < segment["tokens_before"], "report: kept indices are valid"
        assert sum(t * h * w for t, h, w in segment["grids"]) == scored, "report: grids"
        for place, selection in enumerate(segment["selections"]):
            assert selection["n"] == scored, "report: a selection is made from what the one before left"
            config = setting.configs[min(place, len(setting.configs) - 1)]
            scored = len(selection["keep"])
            if setting.by_ratio:
                budget = resolve_budget(selection["n"], config.keep_ratio, config.keep_tokens)
                assert scored == budget, f"report: {scored} tokens kept of {selection['n']}, asked for {budget}"
    before = report["visual_tokens_before"] - report["visual_tokens_after"]
    dropped = sum(s["tokens_before"] - s["tokens_after"] for s in report["segments"])
    assert before == dropped, "report: totals"


def check_agreement(family: tiny.Family, setting: Setting, kind: str, in_words: Mode, outcome: Outcome) -> None:
    """Some modes are others in other words, or several of them in one."""
    if not in_words.agrees:
        return
    outer = expected(family, setting, kind, mode(in_words.agrees[0])).values
    difference = Outcome(outcome.values[: len(outer)]).differs_from(Outcome(outer))
    assert difference is None, f"{in_words.name} and {in_words.agrees[0]}: {difference}"
    for inner in in_words.agrees[1:]:
        wanted = expected(family, setting, INNER, mode(inner)).values[0]
        for heard in outcome.values[len(outer) :]:
            part = wanted[:, : heard.shape[1]]  # answers inside are shorter
            difference = Outcome((heard,)).differs_from(Outcome((part,)))
            assert difference is None, f"{in_words.name}, the {inner} inside: {difference}"


def check_masking(family: tiny.Family, setting: Setting, kind: str, outcome: Outcome, report: vtc.Report) -> None:
    """A dropped token is as if masked, at the prefill."""
    inputs = _inputs(family, kind)
    if not setting.is_masking or family.hybrid or kind == "mixed" or not report.segments:
        return
    theirs = reference.Reference.of(tiny.build(family.name).model, dict(inputs), report)
    with torch.no_grad():
        logits = theirs.prefill().logits
    error = reference.max_error(outcome.values[0][theirs.visible], logits[theirs.visible])
    assert error <= MASKING_TOLERANCE, f"masking: logits differ by {error:.3g}"
