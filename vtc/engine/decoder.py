"""Reading the attention of decoder layers for the stages that follow them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vtc import kernels
from vtc.adapters.base import Adapter
from vtc.core.context import Need
from vtc.engine.forward import Run
from vtc.engine.plan import PlannedStage
from vtc.engine.prompt import Prompt, Segment
from vtc.engine.recorder import AttentionTap, attach
from vtc.errors import InputError, StateError

DECODER_NEEDS = frozenset({Need.TEXT_ATTENTION, Need.MODALITY_ATTENTION, Need.ATTENTION_EXCHANGE, Need.PAGERANK})
"""What is read from a decoder layer's attention."""

_MODALITIES = frozenset({Need.MODALITY_ATTENTION, Need.ATTENTION_EXCHANGE})


def mean_logits(query: torch.Tensor, key: torch.Tensor, scaling: float, group: torch.Tensor) -> torch.Tensor:
    """(B, Q): logits of queries (B, H, Q, d) for keys (B, Hkv, Q, d), averaged over heads and the `group` (B, Q)."""
    weights = group / group.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (weights[:, None, None] @ key.float())[:, :, 0].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (query.float() @ mean[..., None])[..., 0].mean(dim=1) * scaling


class DecoderReader:
    """Reads decoder layers of one model: what a stage at layer k requires comes from the attention of layer k - 1."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def attach(self, stage: PlannedStage, layer: int) -> None:
        """Prepare for a stage on entering `layer`."""
        if stage.requires & DECODER_NEEDS:
            attach(self.adapter.decoder_attention(layer - 1), AttentionTap())

    def watch(self, layer: int, following: PlannedStage, run: Run, prompt: Prompt) -> None:
        """Have recorded of this layer's attention what the stage that follows requires."""
        tap: AttentionTap = self.adapter.decoder_attention(layer).__dict__["_vtc_tap"]
        tap.start()
        if Need.TEXT_ATTENTION in following.requires:
            tap.queries = run.prompt_columns().argmax(dim=1)[:, None]  # of the last prompt token
            tap.key_mask = run.valid_keys(layer)
        keys = run.keys_of(layer)
        sight = kernels.VisibilityMask(run.columns, keys, run.kinds.windows[layer], run.blocks)
        known = keys.shape[1]
        if Need.PAGERANK in following.requires:
            parameters = following.selector.parameters(Need.PAGERANK)

            def walk(query: Any, key: Any, scaling: float, _: Any) -> torch.Tensor:
                return kernels.pagerank(query, key, scaling, sight, run.valid, known=known, **parameters)

            tap.once[Need.PAGERANK.value] = walk
        if following.requires & _MODALITIES:
            groups = self._modalities(following, run, prompt)
            by_logits = following.selector.parameters(Need.MODALITY_ATTENTION).get("self_score") == "logits"

            def receive(query: Any, key: Any, scaling: float, _: Any) -> torch.Tensor:
                received = kernels.received_from(query, key, scaling, sight, groups, known=known)
                if by_logits:
                    current = key[:, :, known - query.shape[2] : known]
                    received[:, 1] = mean_logits(query, current, scaling, groups[:, 1])
                return received

            tap.once[Need.MODALITY_ATTENTION.value] = receive

    def _modalities(self, stage: PlannedStage, run: Run, prompt: Prompt) -> torch.Tensor:
        """(B, 2, T) bool: current tokens that are text of the prompt, as the method counts it, and the visual ones."""
        columns = run.prompt_columns()
        here = columns >= 0
        visual = here & prompt.visual[run.source].gather(1, columns.clamp(min=0))
        text = here & ~visual
        parameters = [stage.selector.parameters(need) for need in _MODALITIES & stage.requires]
        after = parameters[0].get("text", "after") == "after"
        if after:
            text &= visual.cumsum(dim=1) > 0
        silent = (visual.any(dim=1) & ~text.any(dim=1)).nonzero()[:, 0]
        if len(silent):
            raise InputError(
                f"{stage.selector.name} asks how the text attends to the images, but row {int(silent[0])} of the "
                + (
                    'prompt has no text behind its first image; put the question there, or give text="all"'
                    if after
                    else "prompt has no text"
                )
            )
        return torch.stack([text, visual], dim=1)

    def read(
        self, stage: PlannedStage, layer: int, run: Run, prompt: Prompt, hidden: torch.Tensor
    ) -> Iterator[tuple[Segment, dict[str, torch.Tensor]]]:
        """What a stage on entering `layer` requires, image by image; `hidden` (B, T, D) are the hidden states there.

        Raises
        ------
        StateError
            The layer before ran without its attention being seen.
        """
        record = self._recorded(layer - 1) if stage.requires & DECODER_NEEDS else {}
        stored = run.keys_of(layer - 1).shape[1] - run.columns.shape[1]
        groups = self._modalities(stage, run, prompt) if stage.requires & _MODALITIES else None
        for segment in prompt.segments:
            row = segment.row * (len(run.columns) // prompt.rows)
            places = run.places(row, segment.columns[segment.alive])
            extra: dict[str, torch.Tensor] = {}
            if Need.HIDDEN_STATES in stage.requires:
                extra["hidden_states"] = hidden[row, places].detach()
            if Need.TEXT_ATTENTION in stage.requires:
                extra["text_attention"] = record["text_attention"][row][:, :, stored + places]
            if Need.PAGERANK in stage.requires:
                extra["pagerank"] = record["pagerank"][row, places]
            if groups is not None:
                received = record["modality_attention"][row]
                if Need.MODALITY_ATTENTION in stage.requires:
                    extra["modality_attention"] = received[:, places]
                if Need.ATTENTION_EXCHANGE in stage.requires:
                    text, visual = groups[row]
                    extra["attention_exchange"] = torch.stack([received[0, visual].sum(), received[1, text].sum()])
            yield segment, extra

    def _recorded(self, layer: int) -> dict[str, torch.Tensor]:
        """What `watch` had recorded of a decoder layer."""
        records = self.adapter.decoder_attention(layer).__dict__["_vtc_tap"].stop()
        if not records:
            raise StateError(
                f"decoder layer {layer} ran without its attention being seen; was its attention implementation "
                "registered after compress()? call compress() again"
            )
        return records[-1]
