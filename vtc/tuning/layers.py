"""Fit the layer budgets of methods at the caches on a user's own prompts: averaged over them, or evolved."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vtc import api
from vtc.budget import check_budget
from vtc.config import CompressionConfig
from vtc.core.eviction import CacheSelector
from vtc.core.layer_budgets import FractionBudgets
from vtc.engine.install import adapter_for
from vtc.errors import ConfigError, InputError
from vtc.registry import get_selector
from vtc.report.report import Report
from vtc.tuning.evolve import evolve_fractions
from vtc.tuning.samples import as_found, prompts

__all__ = ["evolve_layer_budgets", "fit_layer_budgets"]

GROUP = 8
"""Layers whose budgets are evolved together."""


def fit_layer_budgets(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    *,
    keep_ratio: float,
    method: str = "prefixkv",
    seed: int = 0,
    **options: Any,
) -> CompressionConfig:
    """Average what the layers keep of each sample, and return a configuration with these fractions.

    PrefixKV's offline profile (arXiv 2412.03409, section 3.3), for any method at the caches whose `budgets` look at the
    prompt. The fractions are scaled such that their mean is `keep_ratio`. The released profiles were averaged by hand,
    over a number of samples that is not given.

    Parameters
    ----------
    model : PreTrainedModel
        Left as it was found.
    processor : ProcessorMixin or None
        The model's; None if `samples` are ready-made inputs.
    samples : sequence
        As for `vtc.calibrate`.
    keep_ratio : float
    method : str
    seed : int
    **options
        Options of the method.

    Returns
    -------
    CompressionConfig
        With ``budgets=(...)``, the fraction of its entries that each layer keeps.

    Raises
    ------
    ConfigError
        The method has no layer budgets, or fixed ones, or an argument is wrong.
    InputError
        There are no samples, or one has no image.
    UnsupportedMethodError
        The model cannot be compressed by this method.
    """
    selector = _checked(keep_ratio, method, options)
    config = CompressionConfig(method, keep_ratio=keep_ratio, seed=seed, options=options)
    found = []
    with as_found(model), api.compressed(model, config):
        for prompt in prompts(processor, samples, model):
            with torch.inference_mode():
                model(**prompt, logits_to_keep=1, use_cache=True)
            found.append(_dropped(api.report(model), selector.scope))
    drops = [statistics.fmean(shares) for shares in zip(*found, strict=True)]
    scale = (1 - keep_ratio) / (statistics.fmean(drops) or 1.0)
    kept = tuple(round(1 - min(1.0, share * scale), 4) for share in drops)
    return CompressionConfig(method, keep_ratio=keep_ratio, seed=seed, options={**options, "budgets": kept})


def evolve_layer_budgets(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    *,
    keep_ratio: float,
    method: str = "snapkv",
    trials: int = 50,
    seed: int = 0,
    group: int = GROUP,
    bar: Any = None,
    **options: Any,
) -> CompressionConfig:
    """Evolve the fractions that the layers keep, so that long answers change least; return such a configuration.

    See `vtc.tuning.evolve.evolve_fractions` for the rule (EvolKV). Arguments and errors are those of
    `fit_layer_budgets`, and beside them:

    Parameters
    ----------
    trials : int
        Settings to try, each on all samples.
    group : int
        Layers that are searched together, from the bottom.
    bar
        A progress bar.
    """
    _checked(keep_ratio, method, options)
    options.pop("budgets", None)
    config = CompressionConfig(method, keep_ratio=keep_ratio, seed=seed, options=options)
    layers = len(adapter_for(model).text_model.layers)
    with as_found(model):
        rows = prompts(processor, samples, model)
        kept = evolve_fractions(model, rows, config, layers=layers, group=group, trials=trials, bar=bar)
    return CompressionConfig(method, keep_ratio=keep_ratio, seed=seed, options={**options, "budgets": kept})


def _checked(keep_ratio: float, method: str, options: Mapping[str, Any]) -> CacheSelector:
    """Return the method, if its layer budgets can be fitted.

    Raises
    ------
    ConfigError
        They cannot.
    """
    check_budget(keep_ratio, None)
    selector = get_selector(method, **options)
    if not isinstance(selector, CacheSelector):
        raise ConfigError(f"{method} has no layer budgets to fit: it does not choose among the entries of caches")
    if isinstance(selector.layer_budgets, FractionBudgets):
        raise ConfigError(f"{method}: budgets are fixed fractions; leave them out, or name a policy")
    return selector


def _dropped(report: Report, scope: str) -> list[float]:
    """(L,) fractions of the entries that might have left every layer which did."""
    rows = {segment.row for segment in report.segments}
    movable = sum(report.lengths_before[row] for row in rows)
    if scope == "visual":
        movable = sum(segment.tokens_before - segment.structural for segment in report.segments)
    if not movable or report.stored_per_layer is None:
        raise InputError("a sample has no image; calibration compares what is kept of images")
    return [(sum(report.lengths_before) - sum(stored)) / movable for stored in report.stored_per_layer]
