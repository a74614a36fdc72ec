"""Find the setting to use: try methods and budgets on the user's own prompts, without labels.

What is asked of a setting is that the model says with it what it says with all its tokens, and that it says so sooner.
Both are measured, on the machine and the prompts that matter; no ground truth is needed, and none is claimed: agreement
is not accuracy.

**Break-even.** Compression costs something before it saves anything: scores, selection, packing, hooks. The time it
saves is taken to be linear in the visual tokens dropped, D (averaged over decoder layers, as papers count)::

    saving = s D - c_m

with one s, seconds per token that the decoder does not see, for all methods, and an overhead c_m for each: least
squares over every prompt and budget, so c_m is what is left where no token is dropped. A setting that keeps the share
r of N visual tokens drops (1 - r) N and breaks even at N = c_m / (s (1 - r)). That is a straight line through bent
things: a selector is quicker on a shorter prompt than on those measured, and a shorter prompt also saves less per
token, because attention is quadratic. Far below the prompts measured the figure is an order of magnitude.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vtc import api
from vtc.bench.timing import Case, Figures, Stopwatch, Timing, conditions, describe, interleave
from vtc.config import CompressionConfig
from vtc.core.sites import Pixels, VisionLayer
from vtc.engine.install import adapter_for
from vtc.engine.plan import make_plan
from vtc.errors import ConfigError, InputError, UnsupportedMethodError
from vtc.limits import MAX_NEW_TOKENS, MAX_ROUNDS, check_count
from vtc.notation import parse_stages, write_stages
from vtc.plain import real, shown
from vtc.tuning.samples import as_found, prompts

__all__ = ["Advice", "AdvisedSetting", "advise"]

_TOWER_SHARES = (0.5, 0.25)
"""What a stage inside the tower leaves for "vtc" behind it, in the settings that are tried beside the methods."""

_PICTURE_EXPONENTS = (0.5, 0.25)
"""Of the share that is to be left: what a smaller picture takes of it, in those settings."""

Stages = tuple[CompressionConfig, ...]
_ALL = "all tokens"


@dataclass(frozen=True)
class AdvisedSetting:
    """One method at one budget, as measured.

    Attributes
    ----------
    stages : tuple of CompressionConfig
    agreement : float
        Share of prompts with the uncompressed answer, token for token.
    kl : float
        Mean divergence of the first token's distribution from the uncompressed model's, in nats.
    tokens : float
        Visual tokens kept, mean over decoder layers and prompts.
    kept : float
        The same as a share.
    ttft : float
        Seconds to the first token, vision tower included: median over prompts and rounds.
    speed_up : float
        Median ratio of the uncompressed model's time to this one's in the same round.
    overhead : float or None
        c_m in seconds (see the module); None where fewer than two numbers of tokens were dropped, and where tokens
        leave in front of the decoder, which saves what no line in D describes.
    """

    stages: Stages
    agreement: float
    kl: float
    tokens: float
    kept: float
    ttft: float
    speed_up: float
    overhead: float | None

    @property
    def name(self) -> str:
        """The stages in the notation that `compress` reads."""
        return write_stages(self.stages)


@dataclass(frozen=True)
class Advice:
    """The advised setting, and all that was measured.

    Attributes
    ----------
    chosen : AdvisedSetting or None
        The fastest setting that agrees often enough; None if none does, or if none of those is faster than no
        compression.
    settings : tuple of AdvisedSetting
        All of them, the fastest first.
    level : float
        The agreement that was asked for.
    prompts : int
        How many prompts were measured.
    visual : float
        Visual tokens of a prompt, mean.
    ttft : float
        Seconds to the first token with all tokens, median.
    saved_per_token : float or None
        s in seconds (see the module); None where it could not be measured.
    break_even : int or None
        Visual tokens of a prompt below which the chosen setting does not pay on this machine; if none was chosen, of
        the fastest one. 0: its overhead is too small to be measured. None: no time per token is saved at all, or s is
        not known.
    left_out : mapping of str to str
        Methods that this model cannot run, and why.
    conditions : str
        Machine and versions.
    """

    chosen: AdvisedSetting | None
    settings: tuple[AdvisedSetting, ...]
    level: float
    prompts: int
    visual: float
    ttft: float
    saved_per_token: float | None
    break_even: int | None
    left_out: Mapping[str, str] = field(default_factory=dict)
    conditions: str = ""

    @property
    def stages(self) -> list[CompressionConfig] | None:
        """The configurations of the chosen setting for `compress`, or None."""
        return None if self.chosen is None else list(self.chosen.stages)

    def __str__(self) -> str:
        header = ("", "setting", "tokens", "agreement", "KL", "TTFT", "speed-up", "overhead")
        rows = [("", _ALL, f"{self.visual:.1f}", "1.000", "0.000", _ms(self.ttft), "1.00x", "")]
        for each in self.settings:
            rows.append(
                (
                    "*" if each is self.chosen else "+" if each.agreement >= self.level else "",
                    each.name,
                    f"{each.tokens:.1f}",
                    f"{each.agreement:.3f}",
                    f"{each.kl:.3f}",
                    _ms(each.ttft),
                    f"{each.speed_up:.2f}x",
                    "" if each.overhead is None else _ms(each.overhead),
                )
            )
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        table = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join([*table, "", *self._conclusions()])

    def _conclusions(self) -> list[str]:
        lines = [
            f"{self.prompts} prompt{'s' * (self.prompts > 1)}; agreement moves in steps of {1 / self.prompts:.3f}; "
            f"+ agrees on {100 * self.level:g} % or more"
        ]
        if self.chosen is not None:
            lines.append(
                f'* vtc.compress(model, "{self.chosen.name}"): '
                f"{self.chosen.speed_up:.2f} times as fast to the first token, vision tower included"
            )
        elif any(each.agreement >= self.level for each in self.settings):
            lines.append("keep all tokens: no setting that agrees often enough is faster on this machine")
        else:
            lines.append("keep all tokens: no setting agrees often enough")
        about = self.chosen or self.settings[0]
        if self.saved_per_token is None:
            lines.append("break-even: not known, it takes at least two numbers of dropped tokens per method")
        elif about.overhead is None:
            lines.append("break-even: not known for tokens that leave in front of the decoder")
        elif self.break_even is None:
            lines.append("break-even: never, dropping tokens saved no time on this machine")
        else:
            lines.append(
                f"break-even: {about.name} pays above {self.break_even} visual "
                f"tokens ({_ms(about.overhead)} of overhead, {1e6 * self.saved_per_token:.1f} us saved per "
                f"token dropped; these prompts have {self.visual:.0f})"
            )
        lines += [f"left out: {method}: {why}" for method, why in self.left_out.items()]
        return [*lines, self.conditions] if self.conditions else lines


def advise(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    *,
    agreement: float = 0.9,
    methods: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.11, 0.056),
    max_new_tokens: int = 16,
    rounds: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Advice:
    """Find the cheapest setting with which the model gives the answers that it gives with all tokens.

    Every method at every ratio answers every prompt greedily; then times to the first token, from pixels on, are taken,
    the uncompressed model's among them, in rounds that go through all settings in an order of their own. The model is
    left as it was found.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin or None
        The model's; None if `samples` are ready-made inputs.
    samples : sequence
        (image, question) pairs, the image a picture or a list of them; or mappings of one row, as a processor returns
        them: that is how videos come. A dozen or more: agreement moves in steps of one prompt.
    agreement : float
        In (0, 1]: the share of prompts whose answer must stay the same, token for token.
    methods : sequence of str, optional
        All that the model can run unless given. The baselines come along: "random", "uniform", and a smaller picture,
        which is "resize", or "pool" where the tower takes pictures of one size. Smaller pictures have their own
        positions (``positions="compact"``): at those of the large picture they are read worse.
    settings : sequence of str, optional
        Stages in the notation of `compress`, such as "resize@pixels=0.5+vtc=0.25 compact", tried beside the methods.
        With neither these nor methods: half and a quarter of the patches from a third of the tower's depth on, and
        then "vtc". Where the tower takes smaller pictures also, for every ratio r, a picture with the share r^(1/2) of
        its pixels alone, and with "vtc" behind it, which leaves r of the tokens; or r^(1/4) of the pixels and "vtc".
    keep_ratios : sequence of float
        In (0, 1).
    max_new_tokens : int
        Length of the answers that are compared.
    rounds : int
        Timed rounds per prompt.
    seed : int
        For methods that draw.
    progress : bool
        Whether to show a bar.

    Raises
    ------
    ConfigError
        An argument is out of range.
    InputError
        There are no samples, or one shows nothing.
    UnsupportedMethodError
        A method was asked for by name that this model cannot run.
    """
    _check(agreement, keep_ratios, max_new_tokens, rounds)
    tried, left_out = _settings(model, methods, settings, keep_ratios, seed)
    encoded = prompts(processor, samples, model)
    measured = _Measured(tried)
    with as_found(model), _bar(len(encoded), progress) as bar:
        for prompt in encoded:
            measured.add(model, prompt, max_new_tokens, rounds)
            bar.update(1)
    return measured.advice(agreement, left_out)


@dataclass
class _Tried:
    """One setting on one prompt."""

    agrees: bool
    kl: float
    tokens: float
    visual: int
    whole: tuple[float, ...]
    seconds: tuple[float, ...]
    in_front: bool = False  # tokens leave in front of the decoder

    @property
    def dropped(self) -> float:
        return self.visual - self.tokens

    @property
    def saving(self) -> float:
        return statistics.median(w - s for w, s in zip(self.whole, self.seconds, strict=True))


class _Measured:
    """Everything that was tried, by setting."""

    def __init__(self, settings: Sequence[Stages]) -> None:
        self.tried: dict[Stages, list[_Tried]] = {stages: [] for stages in settings}

    def add(self, model: nn.Module, prompt: Mapping[str, Any], max_new_tokens: int, rounds: int) -> None:
        """Answer the prompt with every setting, then time all of them; the answers warm up what is timed."""
        whole, whole_logp = _answer(model, prompt, max_new_tokens)
        answers = {}
        for stages in self.tried:
            with api.compressed(model, stages):
                text, logp = _answer(model, prompt, max_new_tokens)
                report = api.report(model)
            kl = float((whole_logp.exp() * (whole_logp - logp)).nan_to_num(0.0).sum())
            if not report.visual_tokens_before:
                raise InputError("a sample has no visual tokens, so there is nothing to compress in it")
            in_front = any(isinstance(site, (Pixels, VisionLayer)) for site, _, _ in report.sites)
            kept = report.average_visual_tokens, report.visual_tokens_before
            answers[stages] = (text == whole, max(0.0, kl), *kept), in_front
        run = partial(_first_token, model, prompt)
        cases = {_ALL: Case(run)}
        cases |= {
            str(number): Case(run, partial(api.compressed, model, stages)) for number, stages in enumerate(answers)
        }
        times = interleave(cases, repeats=rounds, warmup=0)
        for number, (stages, (answered, in_front)) in enumerate(answers.items()):
            self.tried[stages].append(
                _Tried(*answered, times[_ALL]["ttft"].seconds, times[str(number)]["ttft"].seconds, in_front)
            )

    def advice(self, level: float, left_out: Mapping[str, str]) -> Advice:
        slope, overheads = self._saving()
        found = [
            self._setting(stages, tried, overheads.get(_line(stages, tried))) for stages, tried in self.tried.items()
        ]
        settings = tuple(sorted(found, key=lambda each: -each.speed_up))
        good = [each for each in settings if each.agreement >= level and each.speed_up > 1]
        chosen = good[0] if good else None
        about = chosen or settings[0]
        every = next(iter(self.tried.values()))
        break_even = None
        if slope is not None and slope > 0 and about.overhead is not None:
            break_even = max(0, round(about.overhead / (slope * (1 - about.kept))))
        return Advice(
            chosen=chosen,
            settings=settings,
            level=level,
            prompts=len(every),
            visual=statistics.fmean(each.visual for each in every),
            ttft=statistics.median(second for each in every for second in each.whole),
            saved_per_token=slope,
            break_even=break_even,
            left_out=dict(left_out),
            conditions=describe(conditions()),
        )

    def _setting(self, stages: Stages, tried: Sequence[_Tried], overhead: float | None) -> AdvisedSetting:
        seconds = Timing(tuple(second for each in tried for second in each.seconds))
        ratios = [w / s for each in tried for w, s in zip(each.whole, each.seconds, strict=True)]
        return AdvisedSetting(
            stages=stages,
            agreement=statistics.fmean(each.agrees for each in tried),
            kl=statistics.fmean(each.kl for each in tried),
            tokens=statistics.fmean(each.tokens for each in tried),
            kept=statistics.fmean(each.tokens / each.visual for each in tried),
            ttft=seconds.median,
            speed_up=statistics.median(ratios),
            overhead=overhead,
        )

    def _saving(self) -> tuple[float | None, dict[str | None, float]]:
        """Fit s, and c by method; nothing where no method dropped two different numbers of tokens."""
        points: dict[str, list[tuple[float, float]]] = {}
        for stages, tried in self.tried.items():
            if (line := _line(stages, tried)) is not None:
                points.setdefault(line, []).extend((each.dropped, each.saving) for each in tried)
        means = {m: [statistics.fmean(axis) for axis in zip(*pairs, strict=True)] for m, pairs in points.items()}
        centred = [(d - means[m][0], saved - means[m][1]) for m, pairs in points.items() for d, saved in pairs]
        spread = sum(d * d for d, _ in centred)
        if spread < 1e-9:
            return None, {}
        slope = sum(d * saved for d, saved in centred) / spread
        return slope, {line: slope * dropped - saved for line, (dropped, saved) in means.items()}


def _check(agreement: Any, keep_ratios: Sequence[float], max_new_tokens: int, rounds: int) -> None:
    if not 0 < (real(agreement) or 0) <= 1:
        raise ConfigError(f"agreement must lie above 0 and at most at 1, got {shown(agreement)}")
    if not len(keep_ratios):
        raise ConfigError("keep_ratios is empty; give at least one fraction, and two to learn the break-even")
    for ratio in keep_ratios:
        if not 0 < (real(ratio) or 0) < 1:
            raise ConfigError(
                f"keep_ratios must lie between 0 and 1, got {shown(ratio)}; keeping all is what is compared with"
            )
    check_count("max_new_tokens", max_new_tokens, MAX_NEW_TOKENS)
    check_count("rounds", rounds, MAX_ROUNDS)


def _line(stages: Stages, tried: Sequence[_Tried]) -> str | None:
    """Return the method whose overhead a setting tells of; None where tokens leave in front of the decoder as well."""
    return None if len(stages) > 1 or any(each.in_front for each in tried) else stages[0].method


def _settings(
    model: nn.Module,
    methods: Sequence[str] | None,
    settings: Sequence[str] | None,
    keep_ratios: Sequence[float],
    seed: int,
) -> tuple[list[Stages], dict[str, str]]:
    """Return the settings to try, and why others cannot be tried; what was named must be possible."""
    if isinstance(methods, str) or (methods is not None and not len(methods)):
        raise ConfigError(f"methods must be names of methods, or None for all, got {methods!r}")
    if isinstance(settings, str):
        raise ConfigError(f"settings must be a sequence of lines such as 'vtc=0.25', got {settings!r}")
    adapter = adapter_for(model)
    ratios = [float(ratio) for ratio in dict.fromkeys(keep_ratios)]
    found: dict[Stages, None] = {}
    left_out = {}

    def add(name: str, candidates: Sequence[Sequence[CompressionConfig]], named: bool) -> None:
        try:
            plans = [tuple(replace(config, seed=seed) for config in stages) for stages in candidates]
            for stages in plans:
                if any(signal.reads_regions for signal in make_plan(list(stages), adapter).signals):
                    raise UnsupportedMethodError(f"{name} is asked about regions, and samples mark none")
            found.update(dict.fromkeys(plans))
        except (UnsupportedMethodError, ConfigError) as error:
            if named:
                raise
            left_out[name] = str(error)

    baselines = ("random", "uniform", "pool" if adapter.resampling_refused else "resize")
    for name in dict.fromkeys([*baselines, *(api.list_methods() if methods is None else methods)]):
        positions = "compact" if name == "resize" else "original"
        candidates = [[CompressionConfig(name, keep_ratio=ratio, positions=positions)] for ratio in ratios]
        add(name, candidates, methods is not None)
    for text in settings or ():
        add(text, [parse_stages(text)], True)
    if methods is None and settings is None:
        depth = len(adapter.tower_blocks("image" if "image" in adapter.modalities else "video"))
        for share in _TOWER_SHARES:
            first = f"divprune@vision:{depth // 3}={share:g}"
            lines = [f"{first}+vtc={ratio / share:.6g}" for ratio in ratios if ratio < share]
            add(f"{first} and vtc", [parse_stages(line) for line in lines], False)
        if not adapter.resampling_refused:
            add("resize and vtc", [parse_stages(line) for line in _smaller_pictures(ratios)], False)
    return list(found), left_out


def _smaller_pictures(ratios: Sequence[float]) -> list[str]:
    """Return lines of smaller pictures, alone and with "vtc" behind them."""
    lines = []
    for ratio in ratios:
        pixels = [float(f"{ratio**exponent:.3g}") for exponent in _PICTURE_EXPONENTS]
        lines.append(f"resize={pixels[0]:g} compact")
        lines += [f"resize@pixels={share:g}+vtc={ratio / share:.3g} compact" for share in pixels if share > ratio]
    return lines


@torch.inference_mode()
def _answer(model: Any, prompt: Mapping[str, Any], max_new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Return the greedy tokens, and the log-probabilities (V,) of the first."""
    out = model.generate(
        **prompt,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, prompt["input_ids"].shape[1] :]
    return new.tolist(), out.logits[0][0].float().log_softmax(dim=-1)


@torch.inference_mode()
def _first_token(model: Any, prompt: Mapping[str, Any]) -> Figures:
    watch = Stopwatch(model.device)
    with watch.part("ttft"):
        model(**prompt, use_cache=True, logits_to_keep=1)
    return watch.figures


def _bar(total: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="prompt", disable=not show, dynamic_ncols=True)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
