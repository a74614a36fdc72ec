"""Fit a method's options to a model and a budget, on the user's own inputs and without labels.

The aim is VFlowOpt's (arXiv 2508.05211, section 3): the final hidden state of the last prompt token, from which the
first word of the answer is read, should point where it points with all tokens. It serves any method that declares a
search space.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vtc import api
from vtc.budget import check_seed
from vtc.config import CompressionConfig
from vtc.core.eviction import CacheSelector
from vtc.core.ranges import Range
from vtc.core.selector import Selector
from vtc.engine.install import adapter_for, engine_of
from vtc.engine.memory import EncoderMemory
from vtc.engine.plan import make_plan
from vtc.errors import ConfigError, InputError, StateError, UnsupportedMethodError
from vtc.files import check_writable, cut_incomplete_line, replacing
from vtc.limits import MAX_ROUNDS, check_count
from vtc.plain import parse_json, real, shown
from vtc.registry import get_selector
from vtc.tuning.layers import evolve_layer_budgets, fit_layer_budgets
from vtc.tuning.samples import as_found, prompts
from vtc.tuning.search import suggest

__all__ = ["PlotError", "calibrate"]

_NO_CEILING = 2**31 - 1  # tokens per image: adaptive methods then keep what their thresholds say
_SAMPLERS = ("tpe", "gp", "random", "cma-es")
_SLACK = 1e-3  # by which a budget may be missed, relative to it
_PENALTY = 10.0  # cosine taken off per share of tokens too many: no gain in cosine can pay for it


def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    *,
    keep_ratio: float,
    method: str = "vflowopt",
    trials: int = 50,
    space: Mapping[str, Range] | None = None,
    sampler: str = "tpe",
    seed: int = 0,
    patience: int | None = None,
    storage: str | Path | None = None,
    plot: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> CompressionConfig:
    """Find the options of `method` that move the model's last prompt state least; return a configuration.

    The method's defaults come first, so the result is never worse than they are, on these samples. Nothing is chosen
    that keeps more tokens, on average over layers and samples, than the defaults do; methods that decide themselves how
    many stay are held to `keep_ratio`. Images are encoded once: what a method reads inside the vision tower is kept,
    and the tower runs again only where a trial reads a layer that none has read before. The model is left as it was
    found.

    Of methods at the caches the layer budgets are fitted, without a search and without trials: what each decoder layer
    keeps on average over the samples becomes the fraction that it keeps (`vtc.tuning.layers`). With
    ``sampler="cma-es"`` they are evolved instead, such that the answers change least (EvolKV, `vtc.tuning.evolve`).

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin or None
        The model's; None if `samples` are ready-made inputs.
    samples : sequence
        (image, question) pairs, the image a picture or a list of them; or mappings of one row, as a processor returns
        them. A few dozen are enough: the paper takes 30.
    keep_ratio : float
        Budget in (0, 1).
    method : str
    trials : int
        How many settings to try, those of an interrupted run included.
    space : mapping of str to Range, optional
        Options to search instead of the method's own (see `vtc.core.ranges`).
    sampler : {"tpe", "gp", "random", "cma-es"}
        The first three are optuna's; "gp" needs scipy. "cma-es" evolves layer budgets and needs neither.
    seed : int
    patience : int, optional
        Stop after so many trials without a better one.
    storage : path, optional
        File in which trials are kept; the same call goes on where an interrupted one stopped. Other calls are refused
        if they would mix their trials with those in the file.
    plot : path, optional
        Picture of the search.
    progress : bool
        Whether to show a bar.
    **options
        Options of the method that stay as they are. `mean` and `std`, where a method has them, are the processor's if
        they are not given.

    Raises
    ------
    ConfigError
        There is nothing to search, none of the settings tried is possible, an argument is wrong, or optuna is missing.
    InputError
        There are no samples, or one has no image; `plot` or `storage` cannot be written, or `storage` is another file.
    UnsupportedMethodError
        The model cannot be compressed by this method at all.
    PlotError
        An `OSError` whose `config` is the result: the disk was full when the picture was written.
    """
    if not 0 < (real(keep_ratio) or 0) < 1:
        raise ConfigError(
            f"keep_ratio must lie between 0 and 1, got {shown(keep_ratio)}; keeping all needs no calibration"
        )
    keep_ratio, seed = float(keep_ratio), check_seed(seed)
    check_count("trials", trials, MAX_ROUNDS)
    if patience is not None:
        check_count("patience", patience, MAX_ROUNDS)
    if sampler not in _SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(_SAMPLERS)}, got {sampler!r}")
    selector = type(get_selector(method, **options))
    if issubclass(selector, CacheSelector):
        unused = (("space", space), ("storage", storage), ("plot", plot), ("patience", patience))
        if searching := [name for name, value in unused if value]:
            how = "evolves them by itself" if sampler == "cma-es" else "fits its layer budgets without a search"
            raise ConfigError(f"{', '.join(searching)}: {method} {how}")
        common = {"keep_ratio": keep_ratio, "method": method, "seed": seed, **options}
        if sampler != "cma-es":
            return fit_layer_budgets(model, processor, samples, **common)
        with _bar(trials, progress) as bar:
            return evolve_layer_budgets(model, processor, samples, trials=trials, bar=bar, **common)
    if sampler == "cma-es":
        raise ConfigError(
            f"sampler cma-es evolves the layer budgets of methods at the caches, which {method} is none of"
        )
    optuna = _optuna()
    adapter = adapter_for(model)
    options = {**_normalisation(selector, processor), **options}
    ranges = dict(selector.search_space(len(adapter.text_model.layers), keep_ratio) if space is None else space)
    ranges = {name: values for name, values in ranges.items() if name not in options}
    if not ranges:
        raise ConfigError(
            f"{method} has no options to search; give `space`, or choose a method that has: vflowopt, for example"
        )
    unknown = sorted(set(ranges) - set(selector.options()))
    if unknown:
        raise ConfigError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(selector.options())}")

    def config(found: Mapping[str, Any]) -> CompressionConfig:
        budget = {"keep_tokens": _NO_CEILING} if selector.adaptive else {"keep_ratio": float(keep_ratio)}
        return CompressionConfig(method, seed=seed, options={**options, **found}, **budget)

    check_writable(*(path for path in (plot, storage) if path is not None))
    make_plan([config({})], adapter)  # refuse what no setting can change before anything runs
    encoded = prompts(processor, samples, model)
    study = _study(optuna, storage, f"{method}, keep {keep_ratio:g}, seed {seed}", _mark(encoded, options, ranges))
    # A sitting that goes on draws other numbers than the first did.
    study.sampler = _sampler(optuna, sampler, seed + len(study.trials))
    with as_found(model):
        trial = _Trial(model, encoded)
        base, kept = trial(config({}))
        allowed = float(keep_ratio) if selector.adaptive else kept

        def value(of: CompressionConfig) -> float:
            cosine, share = trial(of)
            return cosine - _PENALTY * max(0.0, share / allowed - 1 - _SLACK)

        first = base - _PENALTY * max(0.0, kept / allowed - 1 - _SLACK)
        best, chosen = first, config({})
        with _bar(trials, progress) as bar:
            waited, impossible = 0, None
            for asked in _asked(study, trials, bar):
                found = {name: suggest(asked, name, values) for name, values in ranges.items()}
                try:
                    score = value(config(found))
                except (ConfigError, UnsupportedMethodError) as error:  # a combination that is not possible
                    study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                    impossible = error
                    continue
                study.tell(asked, score)
                waited = 0 if score > best else waited + 1
                if score > best:
                    best, chosen = score, config(found)
                bar.set_postfix(cosine=f"{best:.4f}", default=f"{first:.4f}")
                if patience is not None and waited >= patience:
                    break
    if impossible is not None and all(done.value is None for done in study.trials):
        raise ConfigError(f"none of {len(study.trials)} settings that were tried is possible: {impossible}")
    for done in study.trials:  # those of earlier sittings too
        if done.value is not None and done.value > best:
            fixed = optuna.trial.FixedTrial(done.params)
            best, chosen = done.value, config({name: suggest(fixed, name, values) for name, values in ranges.items()})
    if plot is not None:
        try:
            _plot(study, first, Path(plot))
        except OSError as error:
            raise PlotError(chosen, error) from error
    return chosen


class PlotError(OSError):
    """The picture of a search could not be written.

    Attributes
    ----------
    config
        What the search found.
    """

    def __init__(self, config: CompressionConfig, error: OSError) -> None:
        super().__init__(error.errno, error.strerror, error.filename)
        self.config = config


class _Trial:
    """Mean cosine to the uncompressed model, and share of visual tokens kept.

    The first trial encodes the images; the uncompressed model then answers once, from what was encoded.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.prompts = model, prompts
        self.memories = [EncoderMemory(observations=True) for _ in prompts]
        self.whole: list[torch.Tensor] = []

    def __call__(self, config: CompressionConfig) -> tuple[float, float]:
        states, shares = [], []
        with api.compressed(self.model, config):
            engine = engine_of(self.model)
            for prompt, memory in zip(self.prompts, self.memories, strict=True):
                with engine.remember(memory):
                    states.append(_last_state(self.model, prompt))
                report = api.report(self.model)
                if not report.visual_tokens_before:
                    raise InputError("a sample has no image; calibration compares what is kept of images")
                shares.append(report.average_visual_tokens / report.visual_tokens_before)
            if not self.whole:
                for prompt, memory in zip(self.prompts, self.memories, strict=True):
                    with api.disabled(self.model), engine.remember(memory):
                        self.whole.append(_last_state(self.model, prompt))
        cosines = [
            float(functional.cosine_similarity(state, whole, dim=-1))
            for state, whole in zip(states, self.whole, strict=True)
        ]
        return statistics.fmean(cosines), statistics.fmean(shares)


@torch.inference_mode()
def _last_state(model: nn.Module, prompt: Mapping[str, Any]) -> torch.Tensor:
    """Return (D,) float32: the state from which the head reads the first word of the answer."""
    seen: list[torch.Tensor] = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1].float()))
    try:
        model(**prompt, logits_to_keep=1)
    finally:
        handle.remove()
    return seen[-1]


def _normalisation(selector: type[Selector], processor: Any) -> dict[str, Any]:
    """Return how the processor normalises pixels, for methods that undo it."""
    images = getattr(processor, "image_processor", None)
    found = {"mean": getattr(images, "image_mean", None), "std": getattr(images, "image_std", None)}
    known = selector.options()
    return {name: tuple(value) for name, value in found.items() if name in known and value is not None}


# -------------------------------------------------------------------------------------------------------------- optuna


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError('Calibration needs optuna: pip install "vtc[calibrate]".') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    kinds = {"tpe": "TPESampler", "gp": "GPSampler", "random": "RandomSampler"}
    return getattr(optuna.samplers, kinds[name])(seed=seed % 2**32)  # as many as NumPy takes


def _mark(prompts: Sequence[Mapping[str, Any]], options: Mapping[str, Any], ranges: Mapping[str, Range]) -> str:
    """Hash the samples, the fixed options and the ranges, which identify a search."""
    digest = hashlib.sha256(repr((sorted(options.items()), sorted(ranges.items()))).encode())
    for prompt in prompts:
        for name, value in sorted(prompt.items()):
            raw = value.detach().cpu().contiguous().view(-1) if isinstance(value, torch.Tensor) else None
            digest.update(name.encode())
            digest.update(repr(value).encode() if raw is None else raw.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _study(optuna: Any, storage: str | Path | None, name: str, mark: str) -> Any:
    """Create a search, or load the one that the same call began."""
    study = optuna.create_study(
        direction="maximize", storage=_storage(optuna, storage), study_name=name, load_if_exists=True
    )
    if study.trials and study.user_attrs.get("mark") != mark:
        raise ConfigError(
            f"{storage} holds trials of another search for {name}: its samples, options or ranges were different; "
            "give another file"
        )
    study.set_user_attr("mark", mark)
    return study


def _storage(optuna: Any, path: str | Path | None) -> Any:
    if path is None:
        return None
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _check_journal(Path(path))
    return JournalStorage(JournalFileBackend(str(path)))


def _check_journal(path: Path) -> None:
    """Cut off a line that an interruption left incomplete; refuse a file that holds anything but trials."""
    if not path.exists():
        return
    cut_incomplete_line(path)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found = parse_json(line)
        except ConfigError:
            found = None
        if not isinstance(found, dict) or "op_code" not in found:
            raise InputError(f"{path}, line {number}: this is no file of trials; give the name of one, or a new name")


def _asked(study: Any, trials: int, bar: Any) -> Iterator[Any]:
    done = sum(trial.state.is_finished() for trial in study.trials)
    bar.update(min(done, trials))
    for _ in range(done, trials):
        yield study.ask()
        bar.update(1)


def _bar(trials: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=trials, unit="trial", disable=not show, dynamic_ncols=True)


def _plot(study: Any, default: float, path: Path) -> None:
    """Every trial, the best so far, and the method's defaults."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('The plot needs matplotlib: pip install "vtc[calibrate]".') from error
    points = [(trial.number, trial.value) for trial in study.trials if trial.value is not None]
    if not points:
        raise StateError("no trial was possible, so there is nothing to plot")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    numbers, values = zip(*points, strict=True)
    best = [max(values[: i + 1]) for i in range(len(values))]
    axes.plot(numbers, values, ".", color="0.6", label="trials")
    axes.step(numbers, best, where="post", label="best so far")
    axes.axhline(default, color="black", linewidth=0.8, linestyle="--", label="defaults")
    axes.set(xlabel="trial", ylabel="cosine to the uncompressed model", title=study.study_name)
    axes.set_ylim(max(min(values), default - 3 * (max(best) - default) - 0.02), max(best) + 0.005)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
