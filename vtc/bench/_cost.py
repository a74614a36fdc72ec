"""Cost of compression in a model of real width: scoring in a CLIP ViT-L/14-336 tower, everything before a 7B decoder.

One model serves both: the tower at its full depth of 24 layers, and one decoder layer of LLaVA-1.5-7B, whose time is
multiplied to full depth. The difference of two whole runs would be noise. Therefore scoring is timed as the operation
itself, on tensors of the tower's shape, and the other steps as the time that a forward pass spends outside of tower,
projector, decoder and head, where they run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig

import vtc
from vtc import kernels
from vtc.bench._models import LLAVA_7B, LLAVA_TOKENS_PER_IMAGE, BenchModel, prompt
from vtc.bench.memory import peak_bytes
from vtc.bench.timing import Case, Figures, Stopwatch, Timing, interleave

__all__ = ["LLAVA_7B_VIT_L", "METHODS", "prefill_cost", "tower_cost"]

METHODS = ("vtc-cls", "divprune", "uniform", "random")
_SCORED_LAYERS = 7  # the default of vtc-cls

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
    """Measure time and memory of encoding one image: untouched, scored by vtc-cls, and with `output_attentions=True`.

    Returns
    -------
    dict
        JSON-able: timings "untouched", "scored" and "eager" of whole calls, and "scoring" of the operation of vtc-cls
        alone; "untouched_bytes", "scored_bytes" and "eager_bytes", the peaks of a call.
    """
    pixels = prompt(LLAVA_7B_VIT_L, model, LLAVA_TOKENS_PER_IMAGE, 2)["pixel_values"]

    def encode() -> None:
        model.get_image_features(pixel_values=pixels)

    def eager() -> None:
        output = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        model.model.multi_modal_projector(output.hidden_states[-2][:, 1:])
        torch.stack([layer[:, :, 0, 1:].float().mean(dim=1) for layer in output.attentions[-8:-1]]).sum(dim=0)

    calls: dict[str, tuple[Callable[[], None], Callable[[], Any]]] = {
        "untouched": (encode, ExitStack),
        "scored": (encode, functools.partial(vtc.compressed, model, "vtc-cls", keep_ratio=0.25)),
        "eager": (eager, functools.partial(_eager_tower, model)),
    }

    cases = {
        name: Case(functools.partial(_call, call, model.device, clock), around)
        for name, (call, around) in calls.items()
    }
    cases["scoring"] = Case(functools.partial(_call, _scoring(model, 1), model.device, clock))
    timings = interleave(cases, repeats=repeats, warmup=warmup)
    peaks = {}
    for name, (call, around) in calls.items():
        with around():
            peaks[f"{name}_bytes"] = peak_bytes(call, model.device)
    return {**{name: timing["run"].to_dict() for name, timing in timings.items()}, **peaks}


@torch.inference_mode()
def prefill_cost(
    model: Any, *, visual_tokens: int, keep_ratio: float, repeats: int, warmup: int, clock: Clock
) -> dict[str, Any]:
    """Measure the time of a prefill at full depth, and of all that compression adds to one, by method.

    Returns
    -------
    dict
        JSON-able timings: "prefill" of the untouched decoder with its one layer multiplied; by method the sum of
        scoring, selecting, packing, masks and restoring the output length.
    """
    inputs = prompt(LLAVA_7B_VIT_L, model, visual_tokens, 64)
    run = functools.partial(_prefill, model, inputs, clock)
    cases = {"untouched": Case(run)}
    for method in METHODS:
        cases[method] = Case(run, functools.partial(vtc.compressed, model, method, keep_ratio=keep_ratio))
    scoring = _scoring(model, visual_tokens // LLAVA_TOKENS_PER_IMAGE)
    cases["scoring"] = Case(functools.partial(_call, scoring, model.device, clock))
    timings = interleave(cases, repeats=repeats, warmup=warmup)
    untouched = timings["untouched"]
    more = LLAVA_7B.full_depth - len(model.model.language_model.layers)
    rounds = zip(untouched["decoder"].seconds, untouched["layer"].seconds, strict=True)
    costs = {"prefill": Timing(tuple(decoder + more * layer for decoder, layer in rounds)).to_dict()}
    for method in METHODS:
        pairs = zip(timings[method]["outside"].seconds, untouched["outside"].seconds, strict=True)
        added = [compressed - whole for compressed, whole in pairs]
        if method == "vtc-cls":  # the others compute no scores inside the tower
            added = [one + score for one, score in zip(added, timings["scoring"]["run"].seconds, strict=True)]
        costs[method] = Timing(tuple(added)).to_dict()
    return costs


def _call(work: Callable[[], Any], device: torch.device, clock: Clock) -> Figures:
    """Time one call, without repetition, so that caches are as cold as in a forward pass."""
    watch = Stopwatch(device, clock=clock)
    with watch.part("run"):
        work()
    return watch.figures


def _prefill(model: Any, inputs: dict[str, Tensor], clock: Clock) -> Figures:
    """Time the decoder, its first layer and what a prefill does outside of its large modules."""
    watch = Stopwatch(model.device, clock=clock)
    inner = model.model
    with ExitStack() as stack:
        for part, module in (
            ("module", inner.vision_tower),
            ("module", inner.multi_modal_projector),
            ("module", model.lm_head),
            ("decoder", inner.language_model),
            ("layer", inner.language_model.layers[0]),
        ):
            stack.enter_context(_timed_forward(watch, part, module))
        with watch.part("call"):
            model(**inputs, use_cache=True, logits_to_keep=1)
    figures = watch.figures
    outside = figures["call"] - figures["module"] - figures["decoder"]
    return {"outside": outside, "decoder": figures["decoder"], "layer": figures["layer"]}


def _scoring(model: Any, images: int) -> Callable[[], Tensor]:
    """Return the computation of the scores of vtc-cls on random tensors of the tower's shape."""
    config = model.config.vision_config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shape = (images, (config.image_size // config.patch_size) ** 2 + 1, heads, width)
    layers = [
        tuple(torch.randn(shape, device=model.device, dtype=model.dtype).transpose(1, 2) for _ in range(2))
        for _ in range(_SCORED_LAYERS)
    ]

    def score() -> Tensor:
        rows = [kernels.attention_rows(query[:, :, :1], key, width**-0.5) for query, key in layers]
        return torch.stack([layer[:, :, 0, 1:].mean(dim=1) for layer in rows]).sum(dim=0)

    return score


@contextmanager
def _eager_tower(model: Any) -> Iterator[None]:
    found = model.config.vision_config._attn_implementation
    model.set_attn_implementation({"vision_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"vision_config": found})


@contextmanager
def _timed_forward(watch: Stopwatch, part: str, module: nn.Module) -> Iterator[None]:
    """Add the time of the forward passes of `module` to `part`, without that of its hooks."""
    forward, own = module.forward, vars(module).get("forward")

    def timed(*args: Any, **kwargs: Any) -> Any:
        with watch.part(part):
            return forward(*args, **kwargs)

    module.forward = timed
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
