"""Before the language model: the stages there choose, and embeddings, positions and mask become shorter.

`before_decoder` is the transition of a forward pass from "everything is here" to "what stays is packed". It is called
for every pass of the language model, so also for chunks of a prompt and for decode steps behind a compressed one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from vtc.core.observations import PromptText
from vtc.core.signals import ProbeSignal, Signal
from vtc.engine.cache import CACHE, CacheRecord, cache_in, record_of
from vtc.engine.choose import choose
from vtc.engine.compression import Compression
from vtc.engine.entries import require_evictable
from vtc.engine.memory import Choices
from vtc.engine.plan import PlannedStage
from vtc.engine.probe import probe
from vtc.engine.prompt import Prompt, Segment
from vtc.engine.state import CallState, ForwardState
from vtc.errors import InputError, UnsupportedMethodError, UnsupportedModelError

__all__ = ["before_decoder", "require_whole_prompt"]


def before_decoder(
    compression: Compression, call: CallState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Shorten what the language model is about to read, and leave the state of the pass on `call`.

    Returns
    -------
    The arguments of the language model; None if they stay as they are.
    """
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        return None
    cache = cache_in(kwargs)
    if cache is not None and not isinstance(cache, Cache):
        _refuse_pictures_in(cache, call)
        return None
    record = record_of(cache)
    if record is None and not call.inputs.encoded:
        if compression.enabled and (cache is None or not cache.is_initialized):
            _note_text(compression, call, embeds)
        return None
    _refuse_custom_mask(compression, call, kwargs.get("attention_mask"))
    forward = _start(compression, call, embeds, cache, record)
    keep = forward.valid
    kwargs = dict(kwargs)
    if call.inputs.encoded:
        prompt = _find_prompt(compression, call, forward)
        for stage in compression.plan.after_prefill[:1]:  # refused before the prompt is read
            if cache is not None or not _uses_cache(compression, kwargs):
                require_evictable(cache, stage)
            require_whole_prompt(forward, stage)
        _select(compression, forward, prompt, kwargs)
        forward.remember()
        keep = forward.keeping(prompt.keep_at())
        if any(segment.merged for segment in prompt.segments):
            kwargs["inputs_embeds"] = embeds = _write_merged(forward, prompt, embeds)
        if any(segment.new_text is not None for segment in prompt.segments):
            kwargs["inputs_embeds"] = embeds = _write_text(forward, prompt, embeds)
    dropped = call.inputs.encoded and not torch.equal(keep, forward.valid)  # a step does not ask
    if not dropped and record is None and not forward.memories:
        # Nothing changes before the first layer: the model does what it always does; later stages may drop tokens.
        later = compression.plan.in_decoder or compression.plan.after_prefill
        call.forward = forward if later else None
        return args, kwargs
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (torch.arange(forward.length, device=embeds.device) + forward.past)[None]
    shift = forward.history.shift
    if compression.plan.positions == "compact" or shift is not None:
        positions, shift = _compact(compression, forward, positions, keep, shift)
    if dropped:
        embeds, positions = _pack(forward, keep, embeds, positions, kwargs)
    if forward.cache is None and _uses_cache(compression, kwargs):
        kwargs.pop("past_key_values", None)  # the old name of an explicit None
        forward.cache = kwargs[CACHE] = DynamicCache(config=compression.text_config)
    forward.write_record(compression.owner, shift)
    kwargs["position_ids"] = positions
    # Never None while positions have gaps and there is no cache: that reads as several packed sequences.
    kwargs["attention_mask"] = _first_mask(compression, forward, embeds, kwargs.get("attention_mask"))
    call.forward = forward
    return args, kwargs


def require_whole_prompt(forward: ForwardState, stage: PlannedStage) -> None:
    """Raise UnsupportedMethodError where a method that needs the whole prompt gets a piece of it."""
    if not forward.brings_all():
        raise UnsupportedMethodError(
            f"{stage.selector.name} needs the whole prompt at once, for its text or inside the decoder, but "
            "prefill_chunk_size brings it in pieces; prefill in one piece or choose a method that does not need it"
        )


def _refuse_pictures_in(cache: Any, call: CallState) -> None:
    """Refuse visual tokens in a cache of another kind, such as the paged one of continuous batching; text may go on."""
    if call.inputs.encoded:
        raise UnsupportedModelError(
            f"visual tokens cannot be dropped in front of a {type(cache).__name__}, which does not know the positions "
            "of its entries; use generate(), or run inside vtc.disabled(model)"
        )


def _note_text(compression: Compression, call: CallState, embeds: torch.Tensor) -> None:
    """Note a prompt without images, so that the report does not show the prompt before it."""
    if call.noted is not None or call.encoded:  # a step without a cache, or a chunk of a prompt with images elsewhere
        return
    ids, valid = call.prompt_ids, call.prompt_valid
    if ids is None:
        ids, valid = torch.full(embeds.shape[:2], -1, dtype=torch.long, device=embeds.device), call.inputs.mask
    prompt = Prompt(ids.to(embeds.device), 0, {}, compression.adapter, compression.plan.structural)
    prompt.valid |= True if valid is None else valid.bool().to(embeds.device)
    call.note(prompt)


def _refuse_custom_mask(compression: Compression, call: CallState, mask: Any) -> None:
    given = mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2)
    if given and call.prompt_ids is None and not compression.adapter.builds_masks:
        raise InputError(
            "a ready-made attention mask cannot be shortened with the prompt; pass the 2-D attention_mask of the "
            "processor, or run inside vtc.disabled(model)"
        )


def _start(
    compression: Compression, call: CallState, embeds: torch.Tensor, cache: Any, record: CacheRecord | None
) -> ForwardState:
    """Create the state of a pass in which every token is still present."""
    batch, length = embeds.shape[:2]
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = call.inputs.mask
    source_index = (torch.arange(length, device=embeds.device) + past).expand(batch, length)
    if mask is not None:
        if mask.shape[1] < length:
            raise InputError(f"attention_mask has {mask.shape[1]} columns for {length} new tokens")
        source_index = source_index.masked_fill(~mask[:, -length:].bool().to(embeds.device), -1)
    if record is None:
        seen = torch.arange(past, device=embeds.device).expand(batch, past)
        if mask is not None and mask.shape[1] >= past + length:
            seen = seen.masked_fill(~mask[:, :past].bool().to(embeds.device), -1)
        record = CacheRecord(past, [(0, seen)])
    # What stands behind the prompt of a `generate` was generated, and is no padding: a GPU is not asked at every step.
    generated = call.prompt_ids is not None and past >= call.prompt_offset + call.prompt_ids.shape[1]
    forward = ForwardState(compression.layer_types, cache, source_index, past, record, generated=generated)
    if call.inputs.blocks is not None:
        forward.blocks = call.inputs.blocks[:, -length:]
    return forward


def _find_prompt(compression: Compression, call: CallState, forward: ForwardState) -> Prompt:
    """Find out which of the current tokens are which visual tokens."""
    device = forward.source_index.device
    if call.prompt is None or call.prompt_ids is None:
        encoded = {modality: found or call.encoded[modality] for modality, found in call.inputs.encoded.items()}
        if call.prompt_ids is None:
            ids, offset, answered = call.inputs.ids, forward.past, None
        else:  # a chunk of it may bring images alone, and the next one videos
            encoded = {**call.encoded, **encoded}
            ids, offset, valid = call.prompt_ids, call.prompt_offset, call.prompt_valid
            answered = (torch.ones_like(ids, dtype=torch.bool) if valid is None else valid).to(device)
        if ids is None:
            raise InputError("images were passed without input_ids or inputs_embeds that say where they belong")
        plan = compression.plan
        call.prompt = Prompt(
            ids.to(device), offset, encoded, compression.adapter, plan.structural, plan.signals, answered
        )
        if answered is not None:
            call.prompt.valid |= answered
        call.note(call.prompt)
    if len(forward.source_index) % call.prompt.rows:
        raise InputError(f"{len(forward.source_index)} rows cannot come from a prompt of {call.prompt.rows}")
    forward.attach_prompt(call.prompt)
    return call.prompt


def _select(compression: Compression, forward: ForwardState, prompt: Prompt, kwargs: dict[str, Any]) -> None:
    """Let the stages before the language model choose, once per prompt."""
    if prompt.decided():
        return
    embeds = kwargs["inputs_embeds"]
    probed: dict[Signal, torch.Tensor] = {}
    for stage in compression.plan.before_decoder:
        if any(isinstance(signal, ProbeSignal) for signal in stage.stage.requires) and not probed:
            require_whole_prompt(forward, stage)
            began = time.perf_counter()
            probed = probe(compression, forward, kwargs)
            prompt.spend(stage.site, 1e3 * (time.perf_counter() - began))
    for stage in compression.plan.before_decoder:
        chosen = Choices(compression.encoder.memory, compression.plan, stage)
        for segment in prompt.segments:
            known = chosen.get(segment)
            extra = _text_values(stage, forward, prompt, segment, embeds)
            if probed:
                row = forward.first_row(segment.row)
                places = forward.find(row, segment.columns[segment.kept])
                extra |= {signal: values[row][places] for signal, values in probed.items()}
            spent = choose(stage, segment, extra, structural=compression.plan.structural, known=known)
            prompt.spend(stage.site, spent)
            chosen.put(segment)
    for stage in compression.plan.in_decoder.values():
        for segment in prompt.segments:
            segment.text_signals |= _text_values(stage, forward, prompt, segment, embeds)
    prompt.decide()


@torch.no_grad()
def _text_values(
    stage: PlannedStage, forward: ForwardState, prompt: Prompt, segment: Segment, embeds: torch.Tensor
) -> dict[Signal, torch.Tensor]:
    """Compute the signals of the text of the row of a segment that a stage requires."""
    wanted = [signal for signal in stage.stage.requires if signal.reads is PromptText]
    signals = [signal for signal in wanted if signal not in segment.text_signals]
    if not signals:
        return {}
    require_whole_prompt(forward, stage)
    row = forward.first_row(segment.row)
    columns = forward.prompt_columns()[row]
    visual, text = _visual_and_text(prompt, segment.row, columns)
    raw = PromptText(
        ids=prompt.ids[segment.row][columns[text]],
        embeddings=embeds[row, text].detach(),
        behind=(visual.cumsum(dim=0) > 0)[text],
        visual=segment.features.detach(),
    )
    return {signal: signal.compute(raw) for signal in signals}


def _visual_and_text(prompt: Prompt, row: int, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) and (T,) bool: which tokens at these `columns` of the prompt are visual, and which are text of it."""
    visual = (columns >= 0) & prompt.visual[row][columns.clamp(min=0)]
    return visual, (columns >= 0) & ~visual


def _write_text(forward: ForwardState, prompt: Prompt, embeds: torch.Tensor) -> torch.Tensor:
    """Write what the text of a row was fused to over its embeddings: the mean over the images and videos of the row."""
    embeds = embeds.clone()
    for row, columns in enumerate(forward.prompt_columns()):
        own = row // (len(embeds) // prompt.rows)
        new = [part.new_text for part in prompt.segments if part.row == own and part.new_text is not None]
        if new:
            embeds[row, _visual_and_text(prompt, own, columns)[1]] = torch.stack(new).mean(dim=0).to(embeds.dtype)
    return embeds


def _write_merged(forward: ForwardState, prompt: Prompt, embeds: torch.Tensor) -> torch.Tensor:
    """Write merged tokens over their anchors."""
    embeds = embeds.clone()
    repeats = len(forward.source_index) // prompt.rows
    for segment in prompt.segments:
        if not segment.merged or segment.anchors is None or segment.anchor_features is None:
            continue
        for row in range(segment.row * repeats, (segment.row + 1) * repeats):
            scorable = forward.find(row, segment.columns[segment.encoded])
            # Those of the stages before the language model: without a cache the prompt comes again, when decoder
            # stages have dropped some.
            anchors = forward.find(row, segment.columns[segment.anchors])
            here = anchors >= 0
            features = segment.anchor_features
            if bool((scorable >= 0).all()):  # merged from the live rows, for their gradients
                features = segment.merge(embeds[row, scorable])
            embeds[row, anchors[here]] = features[here].to(embeds.dtype)
    return embeds


def _compact(
    compression: Compression,
    forward: ForwardState,
    positions: torch.Tensor,
    keep: torch.Tensor,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count positions over kept tokens only; return them and the shift at the end of each row."""
    before = torch.zeros_like(forward.source_index[:, 0]) if shift is None else shift
    if compression.adapter.multi_axis_positions:
        return _compact_grids(compression, forward, positions, before)
    moved = (forward.valid & ~keep).long().cumsum(dim=1) + before[:, None]
    return (positions.expand(len(keep), -1) - moved).clamp(min=0), moved[:, -1]


def _compact_grids(
    compression: Compression, forward: ForwardState, positions: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give (t, h, w) positions (..., B, T) of a prompt with the smaller pictures; and the shift behind it."""
    prompt, rows = forward.prompt, forward.prompt_row
    if prompt is None or rows is None:
        return positions - before[:, None], before
    require_whole_prompt(forward, compression.plan.stages[0])
    moves, columns = prompt.moves(), forward.prompt_columns()
    moved = moves[:, rows[:, None], columns.clamp(min=0)] + before[:, None]
    # In front of the three axes there may be one of plain positions, which no rotation depends on.
    shorter = torch.cat([positions[:-3], (positions[-3:] - moved).clamp(min=0)])
    return shorter, before + moves[0, rows, -1]


def _pack(
    forward: ForwardState, keep: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack embeddings and positions; set the embeddings and the planes of deepstack in `kwargs`."""
    planes, dims = [embeds, positions], [1, positions.dim() - 1]
    marks, marked = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds") or ()
    if marks is not None:
        planes, dims = [*planes, marks & keep.to(marks.device)], [*dims, 1]
    packed, rows = forward.pack(keep, planes, dims, marks, marked)
    kwargs["inputs_embeds"] = packed[0]
    if marks is not None:
        # Padding slots point at dropped columns, where `keep` has taken the marks away.
        kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = packed[2], list(rows)
    return packed[0], packed[1]


def _uses_cache(compression: Compression, kwargs: dict[str, Any]) -> bool:
    text = compression.adapter.text_model
    if text.training and getattr(text, "gradient_checkpointing", False):
        return False
    use_cache = kwargs.get("use_cache")
    return bool(getattr(compression.text_config, "use_cache", False) if use_cache is None else use_cache)


def _first_mask(compression: Compression, forward: ForwardState, embeds: torch.Tensor, given: Any) -> Any:
    """Return what the language model builds its masks from, or replacements where the outer model builds them."""
    if not compression.adapter.builds_masks:
        if forward.length == 1 and 0 in forward.complete and not forward.cache.is_compileable:
            return None  # which transformers would wait for a GPU to find out
        return forward.valid_keys(0).long()
    return dict.fromkeys(given) if isinstance(given, dict) else forward.mask(0, embeds)
