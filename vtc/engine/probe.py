"""A probe: the first decoder layers read a whole prompt, without a cache, and tokens are chosen by what they see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vtc import kernels
from vtc.core.observations import DecoderProbe
from vtc.core.signals import Signal
from vtc.engine.cache import CACHE
from vtc.engine.compression import Compression
from vtc.engine.recorder import UNSEEN, recording
from vtc.engine.state import CallState, ForwardState, PrebuiltMasks, calling
from vtc.errors import StateError

__all__ = ["probe"]


class _Seen(Exception):  # noqa: N818 # no error: it ends the pass
    """The last layer that is wanted has been seen."""


@torch.no_grad()
def probe(compression: Compression, forward: ForwardState, kwargs: Mapping[str, Any]) -> dict[Signal, torch.Tensor]:
    """Compute the signals of the probe, (B, T, ...) each.

    Parameters
    ----------
    forward
        The pass that is about to begin, in which every token is still present.
    kwargs
        The arguments of the language model.

    Raises
    ------
    StateError
        A layer ran without its attention being seen.
    """
    signals = compression.plan.probes
    text, last = compression.adapter.text_model, max(signal.layer for signal in signals)
    columns, visual, valid = forward.prompt_columns(), forward.visual(), forward.valid
    found: dict[Signal, torch.Tensor] = {}

    def recorder(layer: int) -> Any:
        window = forward.types.windows[layer]
        visibility = kernels.VisibilityMask(forward.source_index, forward.source_index, window, forward.blocks)

        def record(query: Any, key: Any, value: Any, mask: Any, scaling: float, more: Mapping[str, Any]) -> None:
            raw = DecoderProbe(
                query,
                key,
                value,
                scaling,
                visibility,
                key.shape[2],
                valid,
                (columns >= 0) & ~visual,
                visual,
                columns.argmax(dim=1),
            )
            found.update({signal: signal.compute(raw) for signal in signals if signal.layer == layer})
            if layer == last:
                raise _Seen

        return record

    layers = sorted({signal.layer for signal in signals})
    modules = {compression.adapter.decoder_attention(layer): recorder(layer) for layer in layers}
    given = {name: value for name, value in kwargs.items() if name not in (CACHE, "past_key_values")}
    mask = given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        given["attention_mask"] = mask[:, -forward.length :]  # of the prompt, without earlier turns
    untouched = CallState(compression, bare=False, forward=PrebuiltMasks([None] * len(text.layers)))
    try:
        with calling(untouched), recording(modules):
            text(**{**given, "use_cache": False})
    except _Seen:
        return found
    raise StateError(f"decoder layer {last} ran without its attention being seen: {UNSEEN}")
