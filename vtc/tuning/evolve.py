"""Evolve the layer budgets of methods at the caches: what each decoder layer keeps, so that answers change least."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vtc import api
from vtc.config import CompressionConfig
from vtc.engine.cache import CACHE, cache_in
from vtc.engine.install import adapter_for, engine_of
from vtc.engine.memory import EncoderMemory
from vtc.tuning.cma import CmaEs

__all__ = ["evolve_fractions", "with_mean"]

_SPREAD = 0.15  # of the first candidates
_TOKENS = 16


def evolve_fractions(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    config: CompressionConfig,
    *,
    layers: int,
    group: int,
    trials: int,
    bar: Any = None,
) -> tuple[float, ...]:
    """Search the fraction that each layer keeps, group by group from the bottom, by CMA-ES (EvolKV, arXiv 2509.08315).

    A setting is judged by the mean KL divergence of the next token from that of the uncompressed model, along 16 tokens
    with which that model goes on after each prompt. All layers together always keep the ratio of the configuration:
    where the layers of a group take more, the others get less, in proportion. The equal budgets with which it begins
    are the result if nothing better is found.

    Differences from the paper, of which no code was found: it scores answers to labelled questions, and budgets are
    free with a penalty for their sum.

    Parameters
    ----------
    model
    prompts
        Inputs of one row each.
    config
        The method and its ratio.
    layers
        Decoder layers.
    group
        Layers that are searched together.
    trials
        Settings to try in all.
    bar
        A progress bar.

    Returns
    -------
    tuple of float
        (L,) fractions, to four digits; their mean is the ratio.
    """
    ratio = float(config.keep_ratio or 0)
    judge = _Judge(model, prompts)

    def loss(fractions: Sequence[float]) -> float:
        options = {**config.options, "budgets": tuple(fractions)}
        found = judge(CompressionConfig(config.method, keep_ratio=ratio, seed=config.seed, options=options))
        if bar is not None:
            bar.update(1)
        return found

    best = (ratio,) * layers
    least = loss(best)
    starts = range(0, layers, group)
    for number, start in enumerate(starts):
        chosen = range(start, min(start + group, layers))
        search = CmaEs([best[layer] for layer in chosen], _SPREAD, config.seed + number)
        tries = trials * (number + 1) // len(starts) - trials * number // len(starts)
        for _ in range(tries // search.population):
            candidates = search.ask()
            settings = [with_mean(best, dict(zip(chosen, row.tolist(), strict=True)), ratio) for row in candidates]
            losses = [loss(setting) for setting in settings]
            search.tell(candidates, losses)
            found = min(range(len(losses)), key=losses.__getitem__)
            if losses[found] < least:
                least, best = losses[found], settings[found]
    return best


def with_mean(fractions: Sequence[float], changed: Mapping[int, float], mean: float) -> tuple[float, ...]:
    """Change some of the fractions and scale the others such that all have this mean.

    Those that were changed are scaled, too, where that is not enough.

    Returns
    -------
    tuple of float
        Between 0 and 1, to four digits.
    """
    found = [min(1.0, max(0.0, changed.get(layer, value))) for layer, value in enumerate(fractions)]
    for those in ([layer for layer in range(len(found)) if layer not in changed], range(len(found))):
        _scale(found, those, mean * len(found))
    return tuple(round(value, 4) for value in found)


def _scale(values: list[float], those: Sequence[int], total: float) -> None:
    """Scale some of the values, up to 1 each, such that all add up to `total` as far as that is possible."""
    free = list(those)
    while free:
        room = total - sum(value for layer, value in enumerate(values) if layer not in free)
        own = sum(values[layer] for layer in free)
        scale = max(0.0, room) / own if own else None
        before = {layer: values[layer] for layer in free}
        for layer in free:
            values[layer] = max(0.0, room) / len(free) if scale is None else before[layer] * scale
        full = [layer for layer in free if values[layer] > 1]
        if not full:
            return
        for layer in free:  # give back what is too much for some to the others
            values[layer] = 1.0 if layer in full else before[layer]
        free = [layer for layer in free if layer not in full]


class _Judge:
    """Mean KL divergence from the uncompressed model along its own continuations of some prompts."""

    def __init__(self, model: nn.Module, prompts: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.prompts = model, prompts
        self.memories = [EncoderMemory(observations=True) for _ in prompts]
        self.spoken: list[torch.Tensor] = []
        self.whole: list[torch.Tensor] = []

    def __call__(self, config: CompressionConfig) -> float:
        with api.compressed(self.model, config):
            engine = engine_of(self.model)
            if not self.spoken:
                for prompt, memory in zip(self.prompts, self.memories, strict=True):
                    with api.disabled(self.model), engine.remember(memory):
                        self.spoken.append(self._continuation(prompt))
                        self.whole.append(self._along(prompt, self.spoken[-1]))
            found = []
            for prompt, memory, spoken, whole in zip(self.prompts, self.memories, self.spoken, self.whole, strict=True):
                with engine.remember(memory):
                    logp = self._along(prompt, spoken)
                found.append(float((whole.exp() * (whole - logp)).nan_to_num(0.0).sum(dim=-1).mean()))
        return statistics.fmean(found)

    @torch.inference_mode()
    def _continuation(self, prompt: Mapping[str, Any]) -> torch.Tensor:
        """(1, T): the tokens with which the model goes on, which may not end."""
        generate: Any = self.model.generate
        out = generate(**prompt, do_sample=False, min_new_tokens=_TOKENS, max_new_tokens=_TOKENS)
        return out[:, prompt["input_ids"].shape[1] :]

    @torch.inference_mode()
    def _along(self, prompt: Mapping[str, Any], spoken: torch.Tensor) -> torch.Tensor:
        """(T - 1, V): log-probabilities behind each of these tokens, which are read behind the prompt."""
        read = self.model(**prompt, use_cache=True, logits_to_keep=1)
        following = spoken[:, :-1]
        mask = prompt.get("attention_mask", torch.ones_like(prompt["input_ids"]))
        mask = torch.cat([mask, mask.new_ones(following.shape)], dim=1)
        columns = mask.cumsum(dim=1)[:, -following.shape[1] :] - 1
        deltas = getattr(adapter_for(self.model).base, "rope_deltas", None)  # of positions in time and space
        places = {} if deltas is None else {"position_ids": (columns + deltas).expand(3, *following.shape)}
        filled = {CACHE: cache_in(read)}
        out = self.model(input_ids=following, attention_mask=mask, use_cache=True, **filled, **places)
        return out.logits[0].float().log_softmax(dim=-1)
