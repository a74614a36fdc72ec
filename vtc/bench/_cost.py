"""What compression adds to a model of real width: scoring in a CLIP ViT-L/14-336 tower, all of it before a 7B decoder.

One model serves both: the tower at its full depth of 24 layers, one decoder layer of LLaVA-1.5-7B. A prefill at full
depth is that layer's time multiplied, plus what lies around it. What compression does is timed where it does it, by a
stopwatch around the engine's own steps: a difference of two whole runs would be their noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig

import vtc
from vtc.bench._memory import peak_bytes
from vtc.bench._models import LLAVA_7B, BenchModel, prompt
from vtc.bench._timing import Case, Figures, Stopwatch, Timing, interleave
from vtc.engine.engine import Engine
from vtc.engine.recorder import AttentionTap
from vtc.engine.tower import TowerReader

__all__ = ["LLAVA_7B_VIT_L", "METHODS", "prefill_cost", "tower_cost"]

METHODS = ("vtc-cls", "divprune", "uniform", "random")

_SCORING = ((AttentionTap, "observe"), (TowerReader, "_needs"))
_PACKING = ((Engine, "before_text"), (Engine, "after_text"))

Clock = Callable[[], float]


def _with_vit_l(layers: int) -> LlavaConfig:
    config = LLAVA_7B.config(layers)
    config.vision_config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return config


LLAVA_7B_VIT_L = BenchModel(
    "llava-1.5-7b with its tower", LLAVA_7B.full_depth, _with_vit_l, LLAVA_7B.prompt, LLAVA_7B.method
)


@torch.inference_mode()
def tower_cost(model: Any, *, repeats: int, warmup: int, clock: Clock) -> dict[str, Any]:
    """Time and memory of encoding one image: untouched, scored by vtc-cls, and with `output_attentions=True`.

    Returns
    -------
    dict
        JSON-able: timings "untouched", "scored" and "eager" of whole calls, and "scoring", the part of "scored" that
        is the method's; "untouched_bytes", "scored_bytes" and "eager_bytes", the peaks of a call.
    """
    pixels = prompt(LLAVA_7B_VIT_L, model, 576, 2)["pixel_values"]

    def encode() -> None:
        model.get_image_features(pixel_values=pixels)

    def eager() -> None:
        output = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        model.model.multi_modal_projector(output.hidden_states[-2][:, 1:])
        torch.stack([layer[:, :, 0, 1:].float().mean(dim=1) for layer in output.attentions[-8:-1]]).sum(dim=0)

    ways: dict[str, tuple[Callable[[], None], Callable[[], Any]]] = {
        "untouched": (encode, ExitStack),
        "scored": (encode, functools.partial(vtc.compressed, model, "vtc-cls", keep_ratio=0.25)),
        "eager": (eager, functools.partial(_eager_tower, model)),
    }
    with _timed(model.device, clock, "scoring", *_SCORING) as figures:

        def watched(run: Callable[[], None]) -> Figures:
            figures.clear()
            watch = Stopwatch(model.device, clock=clock)
            with watch.part("call"):
                run()
            return {"scoring": 0.0, **figures, **watch.figures}

        cases = {name: Case(functools.partial(watched, run), around) for name, (run, around) in ways.items()}
        timings = interleave(cases, repeats=repeats, warmup=warmup)
    peaks = {}
    for name, (run, around) in ways.items():
        with around():
            peaks[f"{name}_bytes"] = peak_bytes(run, model.device)
    return {
        **{name: timing["call"].to_dict() for name, timing in timings.items()},
        "scoring": timings["scored"]["scoring"].to_dict(),
        **peaks,
    }


@torch.inference_mode()
def prefill_cost(
    model: Any, *, visual_tokens: int, keep_ratio: float, repeats: int, warmup: int, clock: Clock
) -> dict[str, Any]:
    """Time of a prefill at full depth, and of all that compression does to one, by method.

    Returns
    -------
    dict
        JSON-able timings: "prefill" of the untouched decoder with its one layer multiplied; by method the sum of
        scoring, selecting, packing, masks and putting back.
    """
    inputs = prompt(LLAVA_7B_VIT_L, model, visual_tokens, 64)
    decoder = model.model.language_model
    with (
        _timed(model.device, clock, "compression", *_SCORING, *_PACKING) as figures,
        _timed_forward(model.device, clock, "decoder", decoder) as whole,
        _timed_forward(model.device, clock, "layer", decoder.layers[0]) as layer,
    ):

        def run() -> Figures:
            figures.clear()
            model(**inputs, use_cache=True, logits_to_keep=1)
            return {"compression": 0.0, **figures, **whole, **layer}

        cases = {"untouched": Case(run)}
        for method in METHODS:
            cases[method] = Case(run, functools.partial(vtc.compressed, model, method, keep_ratio=keep_ratio))
        timings = interleave(cases, repeats=repeats, warmup=warmup)
    untouched = timings["untouched"]
    rounds = zip(untouched["decoder"].seconds, untouched["layer"].seconds, strict=True)
    more = LLAVA_7B.full_depth - len(decoder.layers)
    return {
        "prefill": Timing(tuple(every + more * one for every, one in rounds)).to_dict(),
        **{method: timings[method]["compression"].to_dict() for method in METHODS},
    }


@contextmanager
def _eager_tower(model: Any) -> Iterator[None]:
    found = model.config.vision_config._attn_implementation
    model.set_attn_implementation({"vision_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"vision_config": found})


@contextmanager
def _timed(device: torch.device, clock: Clock, part: str, *methods: tuple[type, str]) -> Iterator[Figures]:
    """Add up under `part` the time spent in `methods` (owner and name), whoever calls them, until the dict is cleared.

    Enter it before `vtc.compressed`, whose hooks are bound methods.
    """
    watch = Stopwatch(device, clock=clock)

    def timing(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with watch.part(part):
                return method(*args, **kwargs)

        return timed

    found = [(owner, name, getattr(owner, name)) for owner, name in methods]
    try:
        for owner, name, method in found:
            setattr(owner, name, timing(method))
        yield watch.figures
    finally:
        for owner, name, method in found:
            setattr(owner, name, method)


@contextmanager
def _timed_forward(device: torch.device, clock: Clock, part: str, module: nn.Module) -> Iterator[Figures]:
    """The time of the last forward pass of `module`, under `part`; hooks that stand on it do not count."""
    watch = Stopwatch(device, clock=clock)
    forward = module.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        watch.figures.clear()
        with watch.part(part):
            return forward(*args, **kwargs)

    module.forward = timed
    try:
        yield watch.figures
    finally:
        del module.forward
