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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from vtc.adapters.base import Adapter
from vtc.config import CompressionConfig
from vtc.core.context import Need, VisualContext, grid_origin
from vtc.core.selection import Selection
from vtc.engine.cache import CACHE, CacheRecord, Lease, cache_in, record_of
from vtc.engine.decoder import DECODER_NEEDS, DecoderReader
from vtc.engine.forward import Run
from vtc.engine.hooks import Seams
from vtc.engine.masks import LayerKinds
from vtc.engine.plan import PlannedStage, wanted
from vtc.engine.prompt import Encoded, Prompt, Segment
from vtc.engine.recorder import detach
from vtc.engine.tower import TowerReader
from vtc.errors import InputError, StateError, UnsupportedMethodError
from vtc.report.report import Report, SegmentReport

_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
"""Arguments of the base model that bring a modality; Video-LLaVA has called its images differently over time."""


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
        self.tower, self.decoder = TowerReader(adapter, stages), DecoderReader(adapter)
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
        self._forget()
        self._prepared: list[Any] | None = None
        self._fed = False

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
                self.tower.attach(modality)
                self._seams.wrap(base, name, functools.partial(self.around_encode, modality))
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
                self.decoder.attach(stage, layer)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Leave the model as it was found."""
        self.lease.live = False
        self._seams.remove()
        detach(list(self.adapter.base.modules()))
        self._first_hooked = len(self.adapter.text_model.layers)

    def _hook_layers(self, first: int) -> None:
        """Make sure that decoder layers from `first` on are followed."""
        layers = self.adapter.text_model.layers
        for index in range(first, self._first_hooked):
            self._seams.before(layers[index], functools.partial(self.before_layer, index))
        self._first_hooked = min(first, self._first_hooked)

    # -- calls ----------------------------------------------------------------------------------------------------

    def around_encode(self, modality: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read images or videos while they are encoded."""
        if not self.enabled or self.tower.busy:  # some families encode a video by encoding its frames as images
            return original(*args, **kwargs)
        output, self._encoded[modality] = self.tower.read(modality, original, args, kwargs)
        return output

    def around_generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._forget()
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            mask = kwargs.get("attention_mask")
            past = cache_in(kwargs)
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
        cache: Any = cache_in(kwargs)
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
        if self._prepared is not None or embeds is None or self._fed:
            return None
        cache = cache_in(kwargs)
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
            embeds, positions = self._pack(run, keep, embeds, positions, kwargs)
        if run.cache is None and self._uses_cache(kwargs):
            kwargs.pop("past_key_values", None)  # the old name of an explicit None
            run.cache = kwargs[CACHE] = DynamicCache(config=self.text_config)
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
            if wanted(self.tower.stages, frozenset({Need.ORIGIN})):
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
                f"{stage.selector.name} needs the whole prompt at once, for its text or inside the decoder, but "
                "prefill_chunk_size brings it in pieces; prefill in one piece or choose a method that does not need it"
            )

    def _select(self, stage: PlannedStage, segment: Segment, extra: dict[str, torch.Tensor]) -> None:
        """Let one stage choose among what is left of one image or video."""
        fields = {need.value: segment.told(need) for need in stage.requires if need in segment.needs}
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
            companions=segment.companions,
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
            if not segment.merged or segment.anchors is None or segment.anchor_features is None:
                continue
            for row in range(segment.row * repeats, (segment.row + 1) * repeats):
                scorable = run.places(row, segment.columns[~segment.structural])
                # Those of the stages before the language model: without a cache the prompt comes again, when decoder
                # stages have dropped some.
                anchors = run.places(row, segment.columns[segment.anchors])
                here = anchors >= 0
                features = segment.anchor_features
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

    def _pack(
        self, run: Run, keep: torch.Tensor, embeds: torch.Tensor, positions: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and positions without what is dropped; in `kwargs` the embeddings and the planes of deepstack."""
        planes, dims = [embeds, positions], [1, positions.dim() - 1]
        marks, marked = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds") or ()
        if marks is not None:
            planes, dims = [*planes, marks & keep.to(marks.device)], [*dims, 1]
        packed, rows = run.pack(keep, planes, dims, marks, marked)
        kwargs["inputs_embeds"] = packed[0]
        if marks is not None:
            # Padding slots point at dropped columns, where `keep` has taken the marks away.
            kwargs["visual_pos_masks"], kwargs["deepstack_visual_embeds"] = packed[2], list(rows)
        return packed[0], packed[1]

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

    @contextmanager
    def feeding(self, run: Run) -> Iterator[None]:
        """A pass whose tokens come shortened already; see `vtc.adapters.feed`."""
        self._run, self._fed, self._prepared = run, True, None
        self._hook_layers(self._first_layer_to_follow(run))
        try:
            yield
        finally:
            self._run, self._fed = None, False

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
            run.cache = cache_in(kwargs)
        if run.prompt is not None:
            stage, following = self.inside.get(layer), self.inside.get(layer + 1)
            if stage is not None:
                hidden = self._prune(stage, layer, run, run.prompt, hidden)
            if following is not None and following.requires & DECODER_NEEDS and not run.prompt.decided(layer + 1):
                self._require_whole(run, following)
                self.decoder.watch(layer, following, run, run.prompt)
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

    def _prune(self, stage: PlannedStage, layer: int, run: Run, prompt: Prompt, hidden: torch.Tensor) -> torch.Tensor:
        known = dict(run.steps).get(layer)
        if known is not None:  # gradient checkpointing runs a layer again
            return known.take(hidden)
        if not prompt.decided(layer):
            self._require_whole(run, stage)
            for segment, extra in self.decoder.read(stage, layer, run, prompt, hidden):
                self._select(stage, segment, extra)
            prompt.decide(layer)
        keep = run.kept(prompt.keep_at(layer))
        if torch.equal(keep, run.valid):
            return hidden
        hidden = run.step(layer, keep, hidden)
        run.write_record(self.lease, run.shift)
        return hidden

    def around_deepstack(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Thin out the planes that deepstack adds behind the first layers, as far as decoder stages have pruned."""
        hidden, where, plane = args
        if self._run is not None and self._prepared is None:
            where, plane = self._run.thin(where, plane)
        return original(hidden, where, plane, **kwargs)

    def after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._run
        if run is None or self._prepared is not None or self._fed:
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
