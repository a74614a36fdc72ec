"""Removing tokens from a running model, before the language model and inside it.

One `Engine` serves one model. Its hooks follow a forward pass in this order:

1. `around_encode`: features, grids and tapped attention of images and videos are read off as they are made;
2. `before_base`: what the forward pass was called with is remembered;
3. `before_text`: the stages before the language model choose; embeddings, positions and mask are shortened;
4. `before_layer`: decoder stages choose; hidden states and rotary tables are shortened, later layers get masks of their own;
5. `after_text`: hidden states are put back where the caller expects them, zeros where tokens were dropped.

Positions are those of the full prompt unless compact ones are asked for, so that nothing moves for the tokens that stay.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from vtc.adapters.base import Adapter, rows_of
from vtc.adapters.cache import CacheRecord, Lease, compacted, record_of
from vtc.adapters.masks import causal_mask, layer_type
from vtc.adapters.prompt import Encoded, Prompt, Segment
from vtc.adapters.seams import Seams
from vtc.adapters.tap import AttentionTap, attach, detach
from vtc.budget import resolve_budget
from vtc.config import CompressionConfig
from vtc.context import Need, VisualContext
from vtc.errors import InputError, StateError, UnsupportedMethodError
from vtc.report import Report, SegmentReport
from vtc.selection import PackPlan
from vtc.selectors.base import Selector

_TOWER_NEEDS = (Need.CLS_ATTENTION, Need.RECEIVED_ATTENTION, Need.KEYS)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of one configured method."""

    config: CompressionConfig
    selector: Selector
    layer: int | None
    requires: frozenset[Need]


@dataclass(eq=False)
class _Call:
    """What the current forward pass was called with."""

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    encoded: dict[str, Encoded | None] = field(default_factory=dict)  # None: the forward pass will encode it itself


@dataclass(eq=False)
class _Run:
    """One pass through the language model."""

    cache: Any
    past: int
    history: CacheRecord
    columns: torch.Tensor  # (B, T) prompt column of every current token, -1 outside the prompt
    valid: torch.Tensor  # (B, T) False on padding
    groups: list[tuple[int, torch.Tensor]]
    embeds: torch.Tensor
    prompt: Prompt | None = None
    source: torch.Tensor | None = None  # (B,) prompt row of every batch row
    packed: PackPlan | None = None
    steps: list[tuple[int, PackPlan]] = field(default_factory=list)
    cos_sin: dict[tuple[int, str], Any] = field(default_factory=dict)
    masks: dict[tuple[int, str], Any] = field(default_factory=dict)

    def group_of(self, layer: int) -> int:
        return max(start for start, _ in self.groups if start <= layer)

    def keys_of(self, layer: int) -> torch.Tensor:
        return next(mask for start, mask in reversed(self.groups) if start <= layer)


class Engine:
    """The compression installed on one model.

    Parameters
    ----------
    model : PreTrainedModel
    adapter : Adapter
    configs : sequence of CompressionConfig
    stages : sequence of PlannedStage
        In the order in which tokens meet them.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, configs: Sequence[CompressionConfig], stages: Sequence[PlannedStage]
    ) -> None:
        self.model: Any = model
        self.adapter = adapter
        self.configs = tuple(configs)
        self.before = [stage for stage in stages if stage.layer is None]
        self.inside = {stage.layer: stage for stage in stages if stage.layer is not None}
        self.positions, self.structural = configs[0].positions, configs[0].structural
        self.text_config = adapter.text_model.config
        self.enabled = True
        self.selector_ms = 0.0
        self.last: Prompt | None = None
        self.lease = Lease()
        self._seams = Seams()
        self._first_hooked = len(adapter.text_model.layers)
        self._parameters: dict[str, inspect.Signature] = {}
        self._forget()
        self._prepared: list[Any] | None = None
        self._encoding = False

    def _forget(self) -> None:
        """Drop everything that belongs to one call."""
        self._call = _Call()
        self._run: _Run | None = None
        self._prompt: Prompt | None = None
        self._prompt_ids: torch.Tensor | None = None
        self._prompt_offset = 0
        self._prompt_valid: torch.Tensor | None = None
        self._prompt_mask: torch.Tensor | None = None
        self._encoded: dict[str, Encoded] = {}

    # -- installing -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the seams on the model; a failure half-way takes away what was put on."""
        base, text = self.adapter.base, self.adapter.text_model
        self.lease = Lease()
        try:
            self._signature = inspect.signature(base.forward)
            for modality in self.adapter.modalities:
                name = f"get_{modality}_features"
                self._parameters[modality] = inspect.signature(getattr(base, name))
                self._seams.wrap(base, name, functools.partial(self.around_encode, modality))
                self._attach_taps(modality)
            if hasattr(self.model, "generate"):
                self._seams.wrap(self.model, "generate", self.around_generate)
                self._seams.wrap(self.model, "prepare_inputs_for_generation", self.around_prepare)
            self._seams.before(base, self.before_base)
            self._seams.before(text, self.before_text)
            self._seams.after(text, self.after_text)
            if hasattr(text, "_deepstack_process"):
                self._seams.wrap(text, "_deepstack_process", self.around_deepstack)
            if self.inside:
                self._hook_layers(max(0, min(self.inside) - 1))
            for layer, stage in self.inside.items():
                if Need.TEXT_ATTENTION in stage.requires:
                    attach(self.adapter.decoder_attention(layer - 1), AttentionTap())
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Leave the model as it was found."""
        self.lease.live = False
        self._seams.remove()
        detach(list(self.adapter.base.modules()))
        self._first_hooked = len(self.adapter.text_model.layers)

    def _attach_taps(self, modality: str) -> None:
        wanted = {need for stage in self.before for need in stage.requires if need in _TOWER_NEEDS}
        if wanted:
            layers = self.adapter.tower_attentions(modality)
            for layer in self._tapped_layers(modality, {}):
                if "_vtc_tap" not in layers[layer].__dict__:
                    attach(layers[layer], AttentionTap(*(need in wanted for need in _TOWER_NEEDS)))

    def _tapped_layers(self, modality: str, call: dict[str, Any]) -> tuple[int, ...]:
        depth = len(self.adapter.tower_attentions(modality))
        feature_layer = self.adapter.feature_layer(modality, call)
        chosen = {
            stage.selector.vision_layers(depth, feature_layer)
            for stage in self.before
            if stage.requires & frozenset(_TOWER_NEEDS)
        }
        if len(chosen) > 1:
            raise UnsupportedMethodError(f"the composed methods read different tower layers {sorted(chosen)}; choose the same")
        return chosen.pop() if chosen else ()

    def _hook_layers(self, first: int) -> None:
        """Make sure that decoder layers from `first` on are followed."""
        layers = self.adapter.text_model.layers
        for index in range(first, self._first_hooked):
            self._seams.before(layers[index], functools.partial(self.before_layer, index))
        self._first_hooked = min(first, self._first_hooked)

    # -- encoders -------------------------------------------------------------------------------------------------

    def around_encode(self, modality: str, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.enabled or self._encoding:  # some families encode a video by encoding its frames as images
            return original(*args, **kwargs)
        call = dict(self._parameters[modality].bind_partial(*args, **kwargs).arguments)
        call |= call.pop("kwargs", {})
        layers = self._tapped_layers(modality, call)
        attentions = self.adapter.tower_attentions(modality) if layers else []
        taps = [attentions[layer].__dict__.get("_vtc_tap") for layer in layers]
        if None in taps:
            raise StateError(
                f"this call reads the features of tower layer {self.adapter.feature_layer(modality, call)}, "
                "but compress() prepared another one; call compress() again after changing vision_feature_layer"
            )
        self._encoding = True
        for tap in taps:
            tap.start()
        try:
            output = original(*args, **kwargs)
        finally:
            self._encoding = False
            records = [tap.stop() for tap in taps]
        if getattr(output, "pooler_output", None) is None:
            raise InputError(f"get_{modality}_features returned no pooler_output; call it with return_dict=True")
        with torch.no_grad():
            layout = self.adapter.layout(modality, call, output)
            wanted = frozenset().union(*(stage.requires for stage in self.before)) & frozenset(_TOWER_NEEDS)
            needs = {need: self._needs(modality, call, need, records) for need in wanted}
        encoded = Encoded(modality, rows_of(output).detach(), layout, needs)
        self._encoded[modality] = encoded
        output._vtc_encoded = encoded  # follows features that are computed once and passed on
        return output

    def _needs(
        self, modality: str, call: dict[str, Any], need: Need, records: list[list[dict[str, torch.Tensor]]]
    ) -> torch.Tensor:
        """Tower values per feature row, (total, layers, ...)."""
        name = need.value
        prefix = self.adapter.prefix_tokens(modality)
        layers = []
        for record in records:
            if not record:
                raise StateError(
                    "the tower ran without its attention being seen; was its attention implementation registered after "
                    "compress()? call compress() again"
                )
            parts = [part[name].movedim(-1, 1) if need is not Need.KEYS else part[name] for part in record]  # (B, M, C)
            # Packed towers take their images one by one; together they are one crop.
            layers.append((torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])[:, prefix:].float())
        stacked = torch.stack(layers, dim=2)  # (crops, M, layers, C)
        arranged = self.adapter.arrange(modality, call, stacked.flatten(2))
        return arranged.unflatten(-1, stacked.shape[2:])

    # -- calls ----------------------------------------------------------------------------------------------------

    def around_generate(self, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._forget()
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            mask = kwargs.get("attention_mask")
            past = kwargs.get("past_key_values")
            seen = int(past.get_seq_length()) if past is not None else 0
            # As transformers does: ids as long as the mask are the whole conversation, shorter ones only the new turn.
            if seen and (mask is None or mask.shape[1] == ids.shape[1]):
                ids = ids[:, seen:]
            self._prompt_ids, self._prompt_offset = ids, seen
            self._prompt_valid = None if mask is None else mask[:, -ids.shape[1] :].bool()
        try:
            return original(*args, **kwargs)
        finally:
            self._prepared = None
            if self.last is not None:
                self.last.release()
            self._forget()

    def around_prepare(self, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Keep what a static cache hides, and build masks outside of the region that gets compiled."""
        self._prepared = None
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            return original(*args, **kwargs)
        self._prompt_mask = mask
        cache = kwargs.get("past_key_values")
        record = record_of(cache)
        ids = args[0] if args else kwargs["input_ids"]
        length = kwargs.get("next_sequence_length") or ids.shape[1]
        if record is None or length != 1 or not cache.is_compileable or self.adapter.builds_masks:
            return original(*args, **kwargs)
        self._run = None
        new = torch.ones(ids.shape[0], 1, dtype=torch.bool, device=ids.device) if mask is None else mask[:, -1:].bool()
        groups = [(start, torch.cat([keys, new.to(keys.device)], dim=1)) for start, keys in record.groups]
        kwargs["attention_mask"] = groups[0][1].long()
        inputs = original(*args, **kwargs)
        hidden = torch.empty(ids.shape[0], 1, 0, dtype=self.model.dtype, device=ids.device)
        masks: dict[tuple[int, str], Any] = {}
        prepared: list[Any] = []
        for layer in range(len(self.adapter.text_model.layers)):
            start, keys = next(group for group in reversed(groups) if group[0] <= layer)
            key = (start, layer_type(self.text_config, layer))
            if start and key not in masks:
                masks[key] = causal_mask(self.text_config, layer, hidden, keys, cache)
            prepared.append(masks.get(key))
        if record.shift is not None and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] - record.shift[:, None]
        record.groups, record.logical = groups, record.logical + 1
        self._prepared = prepared
        return inputs

    def before_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._prepared is not None:
            return
        self._run = None
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments) if args else kwargs
        passed = given.get("mm_encoder_outputs") or {}
        call = _Call(ids=given.get("input_ids"), mask=given.get("attention_mask"))
        for modality in self.adapter.modalities if self.enabled else ():
            output = passed.get(modality)
            if output is not None:
                call.encoded[modality] = getattr(output, "_vtc_encoded", None) or self._encoded.get(modality)
                if call.encoded[modality] is None:
                    raise StateError(
                        f"the {modality} features passed as mm_encoder_outputs were made before compress() and carry "
                        "none of what a selector reads; encode them again"
                    )
            elif given.get("pixel_values" if modality == "image" else "pixel_values_videos") is not None:
                call.encoded[modality] = None
        if not isinstance(call.mask, torch.Tensor) or call.mask.dim() != 2:
            call.mask = self._prompt_mask
        if call.ids is None and call.encoded and given.get("inputs_embeds") is not None:
            call.ids = self._ids_of(given["inputs_embeds"])
        self._call = call

    def _ids_of(self, embeds: torch.Tensor) -> torch.Tensor:
        """Placeholder ids read back from embeddings, as transformers does; -1 elsewhere."""
        table = self.model.get_input_embeddings()
        ids = torch.full(embeds.shape[:2], -1, dtype=torch.long, device=embeds.device)
        for modality in self.adapter.modalities:
            token = self.adapter.token_id(modality)
            if token is not None:
                ids[(embeds == table(torch.tensor(token, device=embeds.device))).all(dim=-1)] = token
        return ids

    # -- before the language model --------------------------------------------------------------------------------

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        embeds = kwargs.get("inputs_embeds")
        if self._prepared is not None or embeds is None:
            return None
        cache = kwargs.get("past_key_values")
        record = record_of(cache)
        if record is None and not self._call.encoded:
            return None
        self._refuse_custom_mask(kwargs.get("attention_mask"))
        run = self._start(embeds, cache, record)
        if self._call.encoded:
            self._read_prompt(run)
            self._select_before(run)
        prompt = run.prompt
        keep = run.valid if prompt is None else run.valid & self._keep(run, prompt.keep_at(None))
        dropped = prompt is not None and bool((run.valid & ~keep).any())
        kwargs = dict(kwargs)
        merged = prompt is not None and any(segment.merged for segment in prompt.segments)
        if prompt is not None and merged:
            kwargs["inputs_embeds"] = embeds = self._write_merged(run, prompt, embeds)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(embeds.shape[1], device=embeds.device) + run.past)[None]
        shift = run.history.shift
        if self.positions == "compact" or shift is not None:
            positions, shift = self._compact(run, positions, keep, shift)
        if dropped:
            plan = run.packed = PackPlan.from_keep(keep)
            kwargs["inputs_embeds"] = plan.take(embeds)
            positions = plan.take(positions, dim=positions.dim() - 1)
            run.columns, run.valid = plan.take(run.columns), plan.mask
            self._pack_deepstack(kwargs, plan, keep)
        elif record is None:
            # Nothing to drop here, so the model does what it always does; decoder stages may still drop later.
            run.groups = [(0, torch.cat([run.history.groups[0][1], run.valid], dim=1))]
            self._run = run if prompt is not None and self.inside else None
            return (args, kwargs) if merged else None
        self._run = run
        run.embeds = kwargs["inputs_embeds"]
        run.groups = [(start, torch.cat([keys, run.valid], dim=1)) for start, keys in run.history.groups]
        if run.cache is None and self._uses_cache(kwargs):
            run.cache = kwargs["past_key_values"] = DynamicCache(config=self.text_config)
        self._write_record(run, keep.shape[1], shift)
        kwargs["position_ids"] = positions
        # Never None while positions have gaps and there is no cache: that reads as several packed sequences.
        kwargs["attention_mask"] = run.groups[0][1].long()
        self._hook_layers(0 if self._is_flash() else min([start for start, _ in run.groups[1:]], default=self._first_hooked))
        return args, kwargs

    def _refuse_custom_mask(self, mask: Any) -> None:
        given = mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2)
        if given and self._prompt_ids is None and not self.adapter.builds_masks:
            raise InputError(
                "a ready-made attention mask cannot be shortened with the prompt; pass the 2-D attention_mask of the "
                "processor, or run inside vtc.disabled(model)"
            )

    def _start(self, embeds: torch.Tensor, cache: Any, record: CacheRecord | None) -> _Run:
        batch, length = embeds.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = self._call.mask
        device = embeds.device
        if mask is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=device)
        elif mask.shape[1] < length:
            raise InputError(f"attention_mask has {mask.shape[1]} columns for {length} new tokens")
        else:
            valid = mask[:, -length:].bool().to(device).expand(batch, length)
        if record is None:
            if mask is not None and mask.shape[1] >= past + length:
                seen = mask[:, :past].bool().to(device)
            else:
                seen = torch.ones(batch, past, dtype=torch.bool, device=device)
            history = CacheRecord(past, [(0, seen)])
        else:
            history = record
        columns = torch.full((batch, length), -1, dtype=torch.long, device=device)
        return _Run(cache, past, history, columns, valid, list(history.groups), embeds)

    def _read_prompt(self, run: _Run) -> None:
        """Find out which of the current tokens are which visual tokens."""
        batch, length = run.valid.shape
        if self._prompt is None or self._prompt_ids is None:
            encoded = {modality: found or self._encoded[modality] for modality, found in self._call.encoded.items()}
            if self._prompt_ids is None:
                ids, offset, valid = self._call.ids, run.past, run.valid
            else:
                ids, offset, valid = self._prompt_ids, self._prompt_offset, self._prompt_valid
            if ids is None:
                raise InputError("images were passed without input_ids or inputs_embeds that say where they belong")
            self._prompt = Prompt(ids.to(run.valid.device), offset, encoded, self.adapter, self.structural)
            if valid is not None:
                self._prompt.valid |= valid.to(run.valid.device)
            self.last, self.selector_ms = self._prompt, 0.0
        prompt = run.prompt = self._prompt
        if batch % prompt.rows:
            raise InputError(f"{batch} rows cannot come from a prompt of {prompt.rows}")
        run.source = torch.arange(batch, device=run.valid.device) // (batch // prompt.rows)
        column = torch.arange(length, device=run.valid.device) + run.past - prompt.offset
        inside = (column >= 0) & (column < prompt.columns)
        run.columns = torch.where(inside, column, -1).expand(batch, length)
        first = run.source.new_tensor(range(prompt.rows)) * (batch // prompt.rows)
        prompt.valid[:, column[inside]] = run.valid[first][:, inside]

    def _whole(self, run: _Run) -> bool:
        """Whether this pass reads its prompt in one piece."""
        prompt = run.prompt
        return prompt is not None and bool((run.columns.max(dim=1).values == prompt.columns - 1).all()) and (
            run.past <= prompt.offset
        )

    def _select_before(self, run: _Run) -> None:
        prompt = run.prompt
        if prompt is None or prompt.decided(None):
            return
        for stage in self.before:
            for segment in prompt.segments:
                extra: dict[str, torch.Tensor] = {}
                if Need.TEXT_EMBEDS in stage.requires:
                    self._require_whole(run, stage)
                    extra["text_embeds"] = self._text_embeds(run, prompt, segment)
                self._select(stage, segment, extra)
        prompt.decide(None)

    def _text_embeds(self, run: _Run, prompt: Prompt, segment: Segment) -> torch.Tensor:
        row = segment.row * (len(run.valid) // prompt.rows)
        text = run.valid[row] & (run.columns[row] >= 0)
        text &= ~prompt.visual[segment.row][run.columns[row].clamp(min=0)]
        return run.embeds[row, text].detach()

    def _require_whole(self, run: _Run, stage: PlannedStage) -> None:
        if not self._whole(run):
            raise UnsupportedMethodError(
                f"{stage.selector.name} reads the text of the prompt, which arrives in pieces with prefill_chunk_size; "
                "prefill in one piece or choose a method that does not need the text"
            )

    def _select(self, stage: PlannedStage, segment: Segment, extra: dict[str, torch.Tensor]) -> None:
        """Let one stage choose among what is left of one image or video."""
        count = len(segment.alive)
        fields = {need.value: _for_context(need, segment.needs[need]) for need in stage.requires if need in segment.needs}
        context = VisualContext(
            features=segment.features,
            budget=resolve_budget(count, stage.config.keep_ratio, stage.config.keep_tokens),
            generator=torch.Generator().manual_seed(stage.config.seed),
            grids=segment.grids,
            modality=segment.modality,
            layer_idx=stage.layer,
            **{**fields, **extra},
        )
        with torch.no_grad():
            began = time.perf_counter()
            context.check()
            selection = stage.selector.select(context)
            self.selector_ms += 1e3 * (time.perf_counter() - began)
        if stage.layer is not None and selection.assign is not None:
            raise UnsupportedMethodError(f"{stage.selector.name} merges tokens, which decoder stages cannot")
        segment.apply(stage.layer, selection)

    def _keep(self, run: _Run, keep: torch.Tensor) -> torch.Tensor:
        """(B, T): which current tokens a decision about the prompt keeps."""
        if run.source is None:
            raise RuntimeError("no prompt was read")
        return (run.columns < 0) | keep[run.source[:, None], run.columns.clamp(min=0)]

    def _write_merged(self, run: _Run, prompt: Prompt, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings with merged tokens in their anchors' places."""
        embeds = embeds.clone()
        for segment in prompt.segments:
            if segment.merged and len(segment.features):
                columns = segment.columns[segment.alive]
                scorable = segment.columns[~segment.structural]
                for row in (run.source == segment.row).nonzero()[:, 0].tolist():
                    at = torch.full((prompt.columns,), -1, dtype=torch.long, device=embeds.device)
                    here = (run.columns[row] >= 0).nonzero()[:, 0]
                    at[run.columns[row, here]] = here
                    features = segment.features
                    if bool((at[scorable] >= 0).all()):  # all here: merged from the live rows, for their gradients
                        features = segment.merge(embeds[row, at[scorable]])
                    present = at[columns] >= 0
                    embeds[row, at[columns][present]] = features[present].to(embeds.dtype)
        return embeds

    def _compact(
        self, run: _Run, positions: torch.Tensor, keep: torch.Tensor, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions counted over kept tokens only, and how far the row has moved by its end."""
        moved = (run.valid & ~keep).long().cumsum(dim=1)
        if shift is not None:
            moved = moved + shift[:, None]
        return (positions.expand(len(keep), -1) - moved).clamp(min=0), moved[:, -1]

    def _pack_deepstack(self, kwargs: dict[str, Any], plan: PackPlan, keep: torch.Tensor) -> None:
        where = kwargs.get("visual_pos_masks")
        if where is not None:
            kept = keep[where.to(keep.device)]
            kwargs["visual_pos_masks"] = plan.take(where) & plan.mask.to(where.device)
            kwargs["deepstack_visual_embeds"] = [plane[kept.to(plane.device)] for plane in kwargs["deepstack_visual_embeds"]]

    def _uses_cache(self, kwargs: dict[str, Any]) -> bool:
        use_cache = kwargs.get("use_cache")
        return bool(getattr(self.text_config, "use_cache", False) if use_cache is None else use_cache)

    def _is_flash(self) -> bool:
        return "flash" in str(self.text_config._attn_implementation)

    def _write_record(self, run: _Run, length: int, shift: torch.Tensor | None) -> None:
        if run.cache is not None:
            record = compacted(run.cache)
            record.lease = self.lease
            record.logical, record.groups, record.shift = run.past + length, list(run.groups), shift

    # -- inside the language model --------------------------------------------------------------------------------

    def before_layer(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        prepared = self._prepared
        if prepared is not None:
            mask = prepared[layer]
            return None if mask is None else (args, {**kwargs, "attention_mask": mask})
        run = self._run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        stage = self.inside.get(layer)
        if stage is not None and run.prompt is not None:
            hidden = self._prune_at(stage, run, hidden, kwargs)
        following = self.inside.get(layer + 1)
        if following is not None and run.prompt is not None and Need.TEXT_ATTENTION in following.requires:
            self._watch(layer, following, run)
        if run.packed is None and not run.steps and record_of(run.cache) is None:
            return None
        kwargs = {**kwargs, "position_ids": None}  # flash attention would read gaps as packed sequences
        start = run.group_of(layer)
        if start:
            kind = layer_type(self.text_config, layer)
            kwargs["position_embeddings"] = self._rotary(run, layer, (start, kind), kwargs["position_embeddings"])
            if (start, kind) not in run.masks:
                run.masks[start, kind] = causal_mask(self.text_config, layer, hidden, run.keys_of(layer), run.cache)
            kwargs["attention_mask"] = run.masks[start, kind]
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _watch(self, layer: int, stage: PlannedStage, run: _Run) -> None:
        """Have this layer's attention rows of the last prompt token recorded for the stage that follows."""
        if run.prompt is not None and not run.prompt.decided(stage.layer):
            self._require_whole(run, stage)
            tap = self.adapter.decoder_attention(layer).__dict__["_vtc_tap"]
            tap.start()
            last = torch.where(run.valid, run.columns, -1).argmax(dim=1)
            tap.queries, tap.key_mask = last[:, None], run.keys_of(layer)

    def _prune_at(self, stage: PlannedStage, run: _Run, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        prompt, layer = run.prompt, stage.layer
        if prompt is None or layer is None:
            return hidden
        known = dict(run.steps)
        if layer in known:  # gradient checkpointing runs a layer again
            return known[layer].take(hidden)
        if not prompt.decided(layer):
            self._select_inside(stage, run, prompt, hidden)
        keep = run.valid & self._keep(run, prompt.keep_at(layer))
        if torch.equal(keep, run.valid):
            return hidden
        plan = PackPlan.from_keep(keep)
        run.steps.append((layer, plan))
        run.columns, run.valid = plan.take(run.columns), plan.mask
        run.cache = run.cache if run.cache is not None else kwargs.get("past_key_values")
        starts = sorted({start for start, _ in run.history.groups} | {start for start, _ in run.groups} | {layer})
        current = {start: keys for start, keys in run.groups}
        run.groups = [
            (start, current[start] if start < layer else torch.cat([run.history.mask_of(start), run.valid], dim=1))
            for start in starts
        ]
        record = record_of(run.cache)
        length = keep.shape[1] if run.packed is None else run.packed.source_length
        if record is not None:
            record.groups, record.lease = list(run.groups), self.lease
        elif run.cache is not None:
            first = run.steps[0][1].source_length if run.packed is None else length
            self._write_record(run, first, None)
        run.masks, run.cos_sin = {}, {}
        return plan.take(hidden)

    def _select_inside(self, stage: PlannedStage, run: _Run, prompt: Prompt, hidden: torch.Tensor) -> None:
        layer = stage.layer or 0
        repeats = len(run.valid) // prompt.rows
        self._require_whole(run, stage)
        rows: torch.Tensor | None = None
        if Need.TEXT_ATTENTION in stage.requires:
            records = self.adapter.decoder_attention(layer - 1).__dict__["_vtc_tap"].stop()
            if not records:
                raise StateError(
                    f"decoder layer {layer - 1} ran without its attention being seen; was its attention implementation "
                    "registered after compress()? call compress() again"
                )
            rows = records[-1]["text_attention"]
        past = run.keys_of(layer - 1).shape[1] - run.valid.shape[1]
        for segment in prompt.segments:
            row = segment.row * repeats
            at = torch.full((prompt.columns,), -1, dtype=torch.long, device=run.columns.device)
            here = (run.valid[row] & (run.columns[row] >= 0)).nonzero()[:, 0]
            at[run.columns[row, here]] = here
            index = at[segment.columns[segment.alive]]
            extra = {"hidden_states": hidden[row, index].detach()} if Need.HIDDEN_STATES in stage.requires else {}
            if rows is not None:
                extra["text_attention"] = rows[row][:, :, past + index]
            self._select(stage, segment, extra)
        prompt.decide(layer)

    def _rotary(self, run: _Run, layer: int, key: tuple[int, str], tables: Any) -> Any:
        if key not in run.cos_sin:
            for step, plan in run.steps:
                if step <= layer:
                    tables = tuple(plan.take(table) for table in tables)
            run.cos_sin[key] = tables
        return run.cos_sin[key]

    def around_deepstack(self, original: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Thin out the planes that deepstack adds behind the first layers, as far as decoder stages have pruned."""
        hidden, where, plane = args
        if self._run is not None and self._prepared is None:
            for _, plan in self._run.steps:
                kept = plan.scatter(plan.mask)[where.to(plan.mask.device)]
                plane = plane[kept.to(plane.device)]
                where = plan.take(where) & plan.mask.to(where.device)
        return original(hidden, where, plane, **kwargs)

    def after_text(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run = self._run
        if run is None or self._prepared is not None:
            return None
        if run.prompt is not None and self._prompt_ids is None:
            run.prompt.release()
            self._encoded = {}
        plans = [plan for _, plan in reversed(run.steps)] + ([run.packed] if run.packed is not None else [])
        if not plans:
            return None
        hidden = output[0]
        for plan in plans:
            hidden = plan.scatter(hidden)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    # -- report ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What the last prompt with images or videos kept."""
        import transformers

        prompt = self.last
        if prompt is None:
            raise StateError("nothing to report yet: run generate() or forward() with an image or a video first")
        valid = prompt.valid
        layers = range(len(self.adapter.text_model.layers))
        segments = []
        for segment, grids in zip(prompt.segments, prompt.grids, strict=True):
            kept = prompt.kept(segment)
            segments.append(
                SegmentReport(
                    row=segment.row,
                    index=segment.index,
                    modality=segment.modality,
                    tokens_before=len(segment.columns),
                    tokens_after=len(kept),
                    structural=int(segment.structural.sum()),
                    grids=grids,
                    selections=tuple(segment.selections),
                    kept=kept,
                )
            )
        return Report.build(
            configs=self.configs,
            model_type=self.model.config.model_type,
            text_config=self.text_config,
            segments=segments,
            lengths_before=valid.sum(dim=1).tolist(),
            lengths_per_layer=[(valid & prompt.keep_at(layer)).sum(dim=1).tolist() for layer in layers],
            selector_ms=self.selector_ms,
            dtype=self.model.dtype,
            transformers_version=transformers.__version__,
        )


def _for_context(need: Need, value: torch.Tensor) -> torch.Tensor:
    """(N, layers, C) as the context has it: (layers, heads, N) for attention, (N, d) of the last layer for keys."""
    return value[:, -1] if need is Need.KEYS else value.permute(1, 2, 0)
