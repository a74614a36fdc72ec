"""Removing tokens from a running model, before the language model and inside it.

One `Engine` serves one model. Its hooks follow a forward pass in this order:

1. `around_encode`: features, grids and tapped attention of images and videos are read off as they are made;
2. `before_base`: what the forward pass was called with is remembered;
3. `before_text`: the stages before the language model choose; embeddings, positions and mask are shortened;
4. `before_layer`: decoder stages choose; hidden states and rotary tables are shortened, later masks rebuilt;
5. `after_text`: hidden states are put back where the caller expects them, zeros where tokens were dropped.

Positions are those of the full prompt unless compact ones are asked for: nothing moves for the tokens that stay.
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
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from vtc import kernels
from vtc.adapters.base import Adapter, rows_of
from vtc.adapters.cache import CacheRecord, Lease, record_of
from vtc.adapters.masks import LayerKinds, Sight
from vtc.adapters.prompt import Encoded, Prompt, Segment
from vtc.adapters.run import Run, thin
from vtc.adapters.seams import Seams
from vtc.adapters.tap import AttentionTap, attach, detach
from vtc.budget import resolve_budget
from vtc.config import CompressionConfig
from vtc.context import Need, VisualContext, grid_origin
from vtc.errors import InputError, StateError, UnsupportedMethodError
from vtc.kernels.attention import received_from, streamed_context_relevance, streamed_pagerank
from vtc.report import Report, SegmentReport
from vtc.selection import PackPlan, Selection
from vtc.selectors.base import Selector

_TAP: dict[Need, str] = {
    Need.CLS_ATTENTION: "cls_rows",
    Need.RECEIVED_ATTENTION: "received",
    Need.KEYS: "keys",
}
"""What a tap on the tower is told to record for a need."""

_TOWER_NEEDS = frozenset({*_TAP, Need.CONTEXT_RELEVANCE})
"""What is read from the tower's attention."""

_DECODER_NEEDS = frozenset({Need.TEXT_ATTENTION, Need.MODALITY_ATTENTION, Need.ATTENTION_EXCHANGE, Need.PAGERANK})
"""What is read from a decoder layer's attention."""

_MODALITIES = frozenset({Need.MODALITY_ATTENTION, Need.ATTENTION_EXCHANGE})

_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
"""Arguments of the base model that bring a modality; Video-LLaVA has called its images differently over time."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of one configured method."""

    config: CompressionConfig
    selector: Selector
    layer: int | None
    requires: frozenset[Need]
    keep: float | None = None

    def budget(self, n: int) -> int:
        """How many of `n` tokens may stay; a method that plans its stages itself may plan to keep none."""
        if self.keep is not None:
            return max(round(n * self.keep), 1 if self.layer is None else 0)
        return resolve_budget(n, self.config.keep_ratio, self.config.keep_tokens)

    @property
    def keep_ratio(self) -> float | None:
        """Fraction behind `budget`, if it is one."""
        return self.config.keep_ratio if self.keep is None else self.keep


@dataclass(eq=False)
class _Call:
    """What the current forward pass was called with."""

    ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    encoded: dict[str, Encoded | None] = field(default_factory=dict)  # None: the forward pass will encode it itself


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
        self.stages = tuple(stages)
        self.before = [stage for stage in stages if stage.layer is None]
        self.inside = {stage.layer: stage for stage in stages if stage.layer is not None}
        self.positions, self.structural = configs[0].positions, configs[0].structural
        self.text_config = adapter.text_model.config
        self.kinds = LayerKinds(self.text_config)
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
        self._run: Run | None = None
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
                if stage.requires & _DECODER_NEEDS:
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
        wanted = self._wanted(_TOWER_NEEDS)
        if wanted:
            layers = self.adapter.tower_attentions(modality)
            for layer in self._tapped_layers(modality, {}):
                if "_vtc_tap" not in layers[layer].__dict__:
                    tap = AttentionTap.of(_TAP[need] for need in wanted if need in _TAP)
                    if Need.CONTEXT_RELEVANCE in wanted:
                        prefix = self.adapter.prefix_tokens(modality)
                        parameters = self._parameters_of(Need.CONTEXT_RELEVANCE)
                        read = functools.partial(streamed_context_relevance, prefix=prefix, **parameters)
                        tap.readers[Need.CONTEXT_RELEVANCE.value] = read
                    attach(layers[layer], tap)

    def _wanted(self, needs: frozenset[Need]) -> frozenset[Need]:
        """Those of `needs` that some stage requires."""
        return frozenset(need for stage in self.stages for need in stage.requires if need in needs)

    def _parameters_of(self, need: Need) -> dict[str, Any]:
        """How a value that is computed once for all stages is to be computed."""
        asked = [dict(stage.selector.parameters(need)) for stage in self.stages if need in stage.requires]
        if any(parameters != asked[0] for parameters in asked):
            raise UnsupportedMethodError(f"the composed methods want different kinds of {need.value}: {asked}")
        return asked[0]

    def _tapped_layers(self, modality: str, call: dict[str, Any]) -> tuple[int, ...]:
        if not self._wanted(_TOWER_NEEDS):
            return ()
        depth = len(self.adapter.tower_attentions(modality))
        feature_layer = self.adapter.feature_layer(modality, call)
        chosen = {
            stage.selector.vision_layers(depth, feature_layer) for stage in self.stages if stage.requires & _TOWER_NEEDS
        }
        if len(chosen) > 1:
            raise UnsupportedMethodError(
                f"the composed methods read different tower layers {sorted(chosen)}; choose the same"
            )
        return chosen.pop()

    def _hook_layers(self, first: int) -> None:
        """Make sure that decoder layers from `first` on are followed."""
        layers = self.adapter.text_model.layers
        for index in range(first, self._first_hooked):
            self._seams.before(layers[index], functools.partial(self.before_layer, index))
        self._first_hooked = min(first, self._first_hooked)

    # -- encoders -------------------------------------------------------------------------------------------------

    def around_encode(self, modality: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.enabled or self._encoding:  # some families encode a video by encoding its frames as images
            return original(*args, **kwargs)
        call = dict(self._parameters[modality].bind_partial(*args, **kwargs).arguments)
        call |= call.pop("kwargs", {})
        layers = self._tapped_layers(modality, call)
        attentions = self.adapter.tower_attentions(modality) if layers else []
        taps: list[Any] = [attentions[layer].__dict__.get("_vtc_tap") for layer in layers]
        if None in taps:
            raise StateError(
                f"this call reads the features of tower layer {self.adapter.feature_layer(modality, call)}, "
                "but compress() prepared another one; call compress() again after changing vision_feature_layer"
            )
        self._encoding = True
        pixels: list[torch.Tensor] = []
        grabbed = self._grab_pixels(modality, pixels) if self._wanted(frozenset({Need.ENTROPY})) else None
        for tap in taps:
            tap.start()
        try:
            output = original(*args, **kwargs)
        finally:
            self._encoding = False
            records = [tap.stop() for tap in taps]
            if grabbed is not None:
                grabbed.remove()
        if getattr(output, "pooler_output", None) is None:
            raise InputError(f"get_{modality}_features returned no pooler_output; call it with return_dict=True")
        with torch.no_grad():
            layout = self.adapter.layout(modality, call, output)
            needs = {need: self._needs(modality, call, need, records) for need in self._wanted(_TOWER_NEEDS)}
            if grabbed is not None:
                needs[Need.ENTROPY] = self._entropy(modality, call, torch.cat(pixels))
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

    def _grab_pixels(self, modality: str, into: list[torch.Tensor]) -> RemovableHandle:
        """Note what the tower is given: it gets the pixels without padding and in its own shape."""

        def grab(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)).detach())

        return self.adapter.tower(modality).register_forward_pre_hook(grab, with_kwargs=True)

    def _entropy(self, modality: str, call: dict[str, Any], pixels: torch.Tensor) -> torch.Tensor:
        """Share in the pixel entropy of its crop per feature row, (total,)."""
        crops = self.adapter.patch_pixels(modality, call, pixels)
        parameters = self._parameters_of(Need.ENTROPY)
        channels = crops[0].shape[1]
        mean, std = (
            torch.as_tensor(parameters[name], dtype=torch.float32, device=pixels.device).expand(channels)
            for name in ("mean", "std")
        )
        shares = [kernels.patch_entropy(crop, mean, std).softmax(dim=0) for crop in crops]
        patches = torch.cat(shares)[None] if pixels.dim() == 2 else torch.stack(shares)  # packed towers: one crop
        return self.adapter.arrange_inputs(modality, call, patches[..., None])[:, 0]

    # -- calls ----------------------------------------------------------------------------------------------------

    def around_generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def around_prepare(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep what a static cache hides, and build masks outside of the region that gets compiled."""
        self._prepared = None
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            return original(*args, **kwargs)
        self._prompt_mask = mask
        cache: Any = kwargs.get("past_key_values")
        record = record_of(cache)
        ids = args[0] if args else kwargs["input_ids"]
        length = kwargs.get("next_sequence_length") or ids.shape[1]
        if record is None or length != 1 or not cache.is_compileable:
            return original(*args, **kwargs)
        self._run = None
        columns = torch.full((ids.shape[0], 1), record.logical, dtype=torch.long, device=ids.device)
        if mask is not None:
            columns = columns.masked_fill(~mask[:, -1:].bool(), -1)
        run = Run(self.kinds, cache, columns, record.logical, record)
        kwargs["attention_mask"] = run.valid_keys(0).long()
        inputs = original(*args, **kwargs)
        hidden = torch.empty(ids.shape[0], 1, 0, dtype=self.model.dtype, device=ids.device)
        self._prepared = [
            run.mask(layer, hidden) if run.needs_mask(layer) or self.adapter.builds_masks else None
            for layer in range(len(self.adapter.text_model.layers))
        ]
        if record.shift is not None and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] - record.shift[:, None]
        run.write_record(self.lease, record.shift)
        return inputs

    def before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
            elif any(given.get(name) is not None for name in _PIXELS[modality]):
                call.encoded[modality] = None
        if not isinstance(call.mask, torch.Tensor) or call.mask.dim() != 2:
            call.mask = self._prompt_mask
        if call.ids is None and call.encoded and given.get("inputs_embeds") is not None:
            call.ids = self._ids_of(given["inputs_embeds"])
        if self.adapter.builds_masks:
            call.blocks = self.adapter.blocks(given)
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

    def before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeds = kwargs.get("inputs_embeds")
        if self._prepared is not None or embeds is None:
            return None
        cache = kwargs.get("past_key_values")
        record = record_of(cache)
        if record is None and not self._call.encoded:
            if self.enabled and (cache is None or not cache.is_initialized):
                self._note_text(embeds)
            return None
        self._refuse_custom_mask(kwargs.get("attention_mask"))
        run = self._start(embeds, cache, record)
        keep = run.valid
        kwargs = dict(kwargs)
        if self._call.encoded:
            prompt = self._read_prompt(run)
            self._select_before(run, prompt, embeds)
            keep = run.kept(prompt.keep_at(None))
            if any(segment.merged for segment in prompt.segments):
                kwargs["inputs_embeds"] = embeds = self._write_merged(run, prompt, embeds)
        dropped = not torch.equal(keep, run.valid)
        if not dropped and record is None:
            # Nothing changes before the first layer: the model does what it always does; decoder stages may drop later.
            self._run = run if self.inside else None
            return args, kwargs
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(run.length, device=embeds.device) + run.past)[None]
        shift = run.history.shift
        if self.positions == "compact" or shift is not None:
            positions, shift = self._compact(run, positions, keep, shift)
        if dropped:
            plan = run.pack(keep)
            kwargs["inputs_embeds"] = embeds = plan.take(embeds)
            positions = plan.take(positions, dim=positions.dim() - 1)
            self._thin_deepstack(kwargs, plan)
        if run.cache is None and self._uses_cache(kwargs):
            run.cache = kwargs["past_key_values"] = DynamicCache(config=self.text_config)
        run.write_record(self.lease, shift)
        kwargs["position_ids"] = positions
        # Never None while positions have gaps and there is no cache: that reads as several packed sequences.
        kwargs["attention_mask"] = self._first_masks(run, embeds, kwargs.get("attention_mask"))
        self._run = run
        self._hook_layers(self._first_layer_to_follow(run))
        return args, kwargs

    def _note_text(self, embeds: torch.Tensor) -> None:
        """A prompt without images is reported as one, not as the images of the prompt before it."""
        ids = torch.full(embeds.shape[:2], -1, dtype=torch.long, device=embeds.device)
        self.last, self.selector_ms = Prompt(ids, 0, {}, self.adapter, self.structural), 0.0
        mask = self._call.mask
        self.last.valid |= True if mask is None else mask.bool().to(embeds.device)

    def _refuse_custom_mask(self, mask: Any) -> None:
        given = mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2)
        if given and self._prompt_ids is None and not self.adapter.builds_masks:
            raise InputError(
                "a ready-made attention mask cannot be shortened with the prompt; pass the 2-D attention_mask of the "
                "processor, or run inside vtc.disabled(model)"
            )

    def _start(self, embeds: torch.Tensor, cache: Any, record: CacheRecord | None) -> Run:
        batch, length = embeds.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = self._call.mask
        columns = (torch.arange(length, device=embeds.device) + past).expand(batch, length)
        if mask is not None:
            if mask.shape[1] < length:
                raise InputError(f"attention_mask has {mask.shape[1]} columns for {length} new tokens")
            columns = columns.masked_fill(~mask[:, -length:].bool().to(embeds.device), -1)
        if record is None:
            seen = torch.arange(past, device=embeds.device).expand(batch, past)
            if mask is not None and mask.shape[1] >= past + length:
                seen = seen.masked_fill(~mask[:, :past].bool().to(embeds.device), -1)
            record = CacheRecord(past, [(0, seen)])
        run = Run(self.kinds, cache, columns, past, record)
        if self._call.blocks is not None:
            run.blocks = self._call.blocks[:, -length:]
        return run

    def _read_prompt(self, run: Run) -> Prompt:
        """Find out which of the current tokens are which visual tokens."""
        if self._prompt is None or self._prompt_ids is None:
            encoded = {modality: found or self._encoded[modality] for modality, found in self._call.encoded.items()}
            if self._prompt_ids is None:
                ids, offset, valid = self._call.ids, run.past, None
            else:
                ids, offset, valid = self._prompt_ids, self._prompt_offset, self._prompt_valid
            if ids is None:
                raise InputError("images were passed without input_ids or inputs_embeds that say where they belong")
            self._prompt = Prompt(ids.to(run.columns.device), offset, encoded, self.adapter, self.structural)
            if valid is not None:
                self._prompt.valid |= valid.to(run.columns.device)
            if self._wanted(frozenset({Need.ORIGIN})):
                for segment in self._prompt.segments:
                    segment.needs[Need.ORIGIN] = grid_origin(segment.grids, segment.features.device)
            self.last, self.selector_ms = self._prompt, 0.0
        if len(run.columns) % self._prompt.rows:
            raise InputError(f"{len(run.columns)} rows cannot come from a prompt of {self._prompt.rows}")
        run.read(self._prompt)
        return self._prompt

    def _select_before(self, run: Run, prompt: Prompt, embeds: torch.Tensor) -> None:
        if prompt.decided(None):
            return
        for stage in self.before:
            for segment in prompt.segments:
                extra: dict[str, torch.Tensor] = {}
                if Need.TEXT_EMBEDS in stage.requires:
                    self._require_whole(run, stage)
                    row = segment.row * (len(run.columns) // prompt.rows)
                    columns = run.prompt_columns()[row]
                    text = (columns >= 0) & ~prompt.visual[segment.row][columns.clamp(min=0)]
                    extra["text_embeds"] = embeds[row, text].detach()
                self._select(stage, segment, extra)
        prompt.decide(None)

    def _require_whole(self, run: Run, stage: PlannedStage) -> None:
        if not run.brings_all():
            raise UnsupportedMethodError(
                f"{stage.selector.name} reads the text of the prompt, which arrives in pieces with prefill_chunk_size; "
                "prefill in one piece or choose a method that does not need the text"
            )

    def _select(self, stage: PlannedStage, segment: Segment, extra: dict[str, torch.Tensor]) -> None:
        """Let one stage choose among what is left of one image or video."""
        fields = {
            need.value: _for_context(need, segment.needs[need]) for need in stage.requires if need in segment.needs
        }
        if not len(segment.alive):  # an earlier stage has dropped the whole image
            segment.apply(stage.layer, Selection.full(0, segment.alive.device))
            return
        context = VisualContext(
            features=segment.features,
            budget=stage.budget(len(segment.alive)),
            generator=torch.Generator().manual_seed(stage.config.seed),
            grids=segment.grids,
            modality=segment.modality,
            layer_idx=stage.layer,
            keep_ratio=stage.keep_ratio,
            structural=int(segment.structural.sum()) if self.structural == "keep" else 0,
            entered=segment.entered if stage.layer is not None else None,
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

    def _write_merged(self, run: Run, prompt: Prompt, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings with merged tokens in their anchors' places."""
        embeds = embeds.clone()
        repeats = len(run.columns) // prompt.rows
        for segment in prompt.segments:
            if not segment.merged:
                continue
            for row in range(segment.row * repeats, (segment.row + 1) * repeats):
                scorable = run.places(row, segment.columns[~segment.structural])
                anchors = run.places(row, segment.columns[segment.alive])
                here = anchors >= 0
                features = segment.features
                if bool((scorable >= 0).all()):  # merged from the live rows, for their gradients
                    features = segment.merge(embeds[row, scorable])
                embeds[row, anchors[here]] = features[here].to(embeds.dtype)
        return embeds

    def _compact(
        self, run: Run, positions: torch.Tensor, keep: torch.Tensor, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions counted over kept tokens only, and how far the row has moved by its end."""
        moved = (run.valid & ~keep).long().cumsum(dim=1)
        if shift is not None:
            moved = moved + shift[:, None]
        return (positions.expand(len(keep), -1) - moved).clamp(min=0), moved[:, -1]

    def _thin_deepstack(self, kwargs: dict[str, Any], plan: PackPlan) -> None:
        where = kwargs.get("visual_pos_masks")
        if where is not None:
            kwargs["deepstack_visual_embeds"] = [
                thin(plan, where, plane)[1] for plane in kwargs["deepstack_visual_embeds"]
            ]
            kwargs["visual_pos_masks"] = plan.take(where) & plan.mask.to(where.device)

    def _uses_cache(self, kwargs: dict[str, Any]) -> bool:
        text = self.adapter.text_model
        if text.training and getattr(text, "gradient_checkpointing", False):
            return False
        use_cache = kwargs.get("use_cache")
        return bool(getattr(self.text_config, "use_cache", False) if use_cache is None else use_cache)

    def _first_masks(self, run: Run, embeds: torch.Tensor, given: Any) -> Any:
        """What the language model builds its masks from; where the outer model has built them, their replacement."""
        if not self.adapter.builds_masks:
            return run.valid_keys(0).long()
        return dict.fromkeys(given) if isinstance(given, dict) else run.mask(0, embeds)

    def _first_layer_to_follow(self, run: Run) -> int:
        """First layer that must be told something of its own."""
        if self.adapter.builds_masks or run.slides or "flash" in str(self.text_config._attn_implementation):
            return 0
        return min([start for start, _ in run.groups[1:]], default=self._first_hooked)

    # -- inside the language model --------------------------------------------------------------------------------

    def before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prepared = self._prepared
        if prepared is not None:
            mask = prepared[layer]
            return None if mask is None else (args, {**kwargs, "attention_mask": mask})
        run = self._run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if run.cache is None:
            run.cache = kwargs.get("past_key_values")
        if run.prompt is not None:
            stage, following = self.inside.get(layer), self.inside.get(layer + 1)
            if stage is not None:
                hidden = self._prune(stage, layer, run, run.prompt, hidden)
            if following is not None and following.requires & _DECODER_NEEDS:
                self._watch(layer, following, run, run.prompt)
        if not run.touched:
            return None
        kwargs = {**kwargs, "position_ids": None}  # flash attention would read gaps as packed sequences
        if run.steps:
            kwargs["position_embeddings"] = run.rotary(layer, kwargs["position_embeddings"])
        if run.needs_mask(layer) or self.adapter.builds_masks:
            kwargs["attention_mask"] = run.mask(layer, hidden)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _watch(self, layer: int, following: PlannedStage, run: Run, prompt: Prompt) -> None:
        """Have recorded of this layer's attention what the stage that follows requires."""
        if prompt.decided(following.layer):
            return
        self._require_whole(run, following)
        tap: AttentionTap = self.adapter.decoder_attention(layer).__dict__["_vtc_tap"]
        tap.start()
        if Need.TEXT_ATTENTION in following.requires:
            tap.queries = run.prompt_columns().argmax(dim=1)[:, None]  # of the last prompt token
            tap.key_mask = run.valid_keys(layer)
        keys = run.keys_of(layer)
        sight = Sight(run.columns, keys, run.kinds.windows[layer], run.blocks)
        known = keys.shape[1]
        if Need.PAGERANK in following.requires:
            parameters = following.selector.parameters(Need.PAGERANK)

            def walk(query: Any, key: Any, scaling: float, _: Any) -> torch.Tensor:
                return streamed_pagerank(query, key, scaling, sight, run.valid, known=known, **parameters)

            tap.once[Need.PAGERANK.value] = walk
        if following.requires & _MODALITIES:
            groups = self._modalities(following, run, prompt)

            def receive(query: Any, key: Any, scaling: float, _: Any) -> torch.Tensor:
                return received_from(query, key, scaling, sight, groups, known=known)

            tap.once[Need.MODALITY_ATTENTION.value] = receive

    def _modalities(self, stage: PlannedStage, run: Run, prompt: Prompt) -> torch.Tensor:
        """(B, 2, T) bool: current tokens that are text of the prompt, as the method counts it, and the visual ones."""
        columns = run.prompt_columns()
        here = columns >= 0
        visual = here & prompt.visual[run.source].gather(1, columns.clamp(min=0))
        text = here & ~visual
        parameters = [stage.selector.parameters(need) for need in _MODALITIES & stage.requires]
        if parameters[0].get("text", "after") == "after":
            text &= visual.cumsum(dim=1) > 0
        return torch.stack([text, visual], dim=1)

    def _prune(self, stage: PlannedStage, layer: int, run: Run, prompt: Prompt, hidden: torch.Tensor) -> torch.Tensor:
        known = dict(run.steps).get(layer)
        if known is not None:  # gradient checkpointing runs a layer again
            return known.take(hidden)
        if not prompt.decided(layer):
            self._select_inside(stage, layer, run, prompt, hidden)
        keep = run.kept(prompt.keep_at(layer))
        if torch.equal(keep, run.valid):
            return hidden
        plan = run.step(layer, keep)
        run.write_record(self.lease, run.shift)
        return plan.take(hidden)

    def _select_inside(self, stage: PlannedStage, layer: int, run: Run, prompt: Prompt, hidden: torch.Tensor) -> None:
        self._require_whole(run, stage)
        record = self._recorded(layer - 1) if stage.requires & _DECODER_NEEDS else {}
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
            self._select(stage, segment, extra)
        prompt.decide(layer)

    def _recorded(self, layer: int) -> dict[str, torch.Tensor]:
        """What `_watch` had recorded of a decoder layer."""
        records = self.adapter.decoder_attention(layer).__dict__["_vtc_tap"].stop()
        if not records:
            raise StateError(
                f"decoder layer {layer} ran without its attention being seen; was its attention implementation "
                "registered after compress()? call compress() again"
            )
        return records[-1]

    def around_deepstack(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Thin out the planes that deepstack adds behind the first layers, as far as decoder stages have pruned."""
        hidden, where, plane = args
        if self._run is not None and self._prepared is None:
            where, plane = self._run.thin(where, plane)
        return original(hidden, where, plane, **kwargs)

    def after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._run
        if run is None or self._prepared is not None:
            return None
        if run.prompt is not None and self._prompt_ids is None:
            run.prompt.release()
            self._encoded = {}
        if run.packed is None and not run.steps:
            return None
        hidden = run.scatter(output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    # -- report ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What the last prompt kept."""
        import transformers

        prompt = self.last
        if prompt is None:
            raise StateError("nothing to report yet: run generate() or forward() first")
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
    """What comes per token, (N, layers, C) if from a tapped tower, as the context has it."""
    if need in (Need.ENTROPY, Need.ORIGIN):
        return value
    if need is Need.CONTEXT_RELEVANCE:  # (N,) of the last layer
        return value[:, -1, 0]
    # (N, d) of the last layer for keys, (layers, heads, N) for attention.
    return value[:, -1] if need is Need.KEYS else value.permute(1, 2, 0)
