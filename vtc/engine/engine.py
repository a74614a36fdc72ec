"""The engine: one compression installed on one model.

Its hooks follow a call of the model in this order, and each says which transition it makes:

1. `around_generate` opens the state of the call, `around_forward` that of a bare pass of the whole model; the latter
   notes what a pass was called with;
2. `around_encode`: images and videos are encoded, and features, grids and signals of the tower are read off;
3. `before_text`: the stages before the language model choose; embeddings, positions and mask become shorter;
4. `before_layer`: decoder stages choose; hidden states and rotary tables become shorter, later masks are built anew;
5. `after_text`: stages at the cache choose and entries leave; hidden states are put back where the caller expects them,
   zeros where tokens were dropped;
6. `around_forward` and `around_generate` close what they opened, whatever happened.

Positions are those of the full prompt unless compact ones are asked for: nothing moves for the tokens that stay.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.adapters.base import Adapter
from vtc.core.eviction import CacheSelector
from vtc.core.observations import (
    DecoderAttention,
    DecoderCall,
    DecoderProbe,
    DecoderUpdate,
    EnteredAttention,
    VisionAttention,
)
from vtc.core.sites import CacheAfterPrefill, Site
from vtc.engine.after_prefill import after_prefill
from vtc.engine.ahead import spare_projections
from vtc.engine.before_decoder import before_decoder
from vtc.engine.cache import Owner, cache_in, record_of
from vtc.engine.compression import Compression
from vtc.engine.encoder import Encoded
from vtc.engine.hooks import Hooks
from vtc.engine.in_decoder import enter_layer, enter_prebuilt, see_call, see_update
from vtc.engine.memory import EncoderMemory
from vtc.engine.plan import Plan
from vtc.engine.prompt import Prompt
from vtc.engine.recorder import Recorder
from vtc.engine.state import (
    CallState,
    ForwardInputs,
    ForwardState,
    Mode,
    PrebuiltMasks,
    calling,
    current_call,
)
from vtc.errors import StateError
from vtc.report.report import Report, SegmentReport

__all__ = ["Engine"]

_HOOKING = threading.Lock()
"""Held while layers get hooks, so that two threads in one model do not give a layer two."""

_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
"""Arguments of the base model that bring a modality; Video-LLaVA has called its images differently over time."""


class Engine(Compression):
    """A compression with the hooks that carry it out; parameters and attributes as in `Compression`."""

    def __init__(self, model: nn.Module, adapter: Adapter, plan: Plan) -> None:
        super().__init__(model, adapter, plan)
        self._hooks = Hooks()
        self._recorder: Recorder | None = None
        self._followed = len(adapter.text_model.layers)  # layers from this one on have a hook
        self._replays: Any = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _replays=WeakTensorKeyDictionary())

    # -- installing -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks on the model; a failure half-way takes away what was put on."""
        base, text = self.adapter.base, self.adapter.text_model
        self.owner = Owner()
        try:
            self._hooks.wrap(base, "forward", self.around_forward)
            for modality in self.adapter.modalities:
                self._hooks.wrap(base, f"get_{modality}_features", functools.partial(self.around_encode, modality))
            if hasattr(self.model, "generate"):
                self._hooks.wrap(self.model, "generate", self.around_generate)
                self._hooks.wrap(self.model, "prepare_inputs_for_generation", self.around_prepare)
            self.encoder.install(self._hooks)
            self._hooks.before(text, self.before_text)
            self._hooks.after(text, self.after_text)
            if hasattr(text, "_deepstack_process"):
                self._hooks.wrap(text, "_deepstack_process", self.around_deepstack)
            for layer, stage in self.plan.in_decoder.items():
                if any(signal.reads is EnteredAttention for signal in stage.stage.requires):
                    spare_projections(self._hooks, self.adapter.decoder_attention(layer))
            if self.plan.cache_signals:
                self._follow_from(0)
            elif self.plan.in_decoder:
                self._follow_from(max(0, min(self.plan.in_decoder) - 1))
            if self.plan.updates:
                self._follow_from(min(self.plan.updates))
            layers = dict(text.named_modules()) if self.plan.layer_changes else {}
            for name, change in self.plan.layer_changes:
                self._hooks.after(layers[name], functools.partial(self.after_linear, change))
            if any(signal.reads is DecoderUpdate for signal in self.plan.cache_signals):
                for index in range(len(text.layers)):
                    norm = self.adapter.norm_after_attention(index)
                    self._hooks.before(norm, functools.partial(self.behind_attention, index))
            if any(signal.reads is DecoderCall for signal in self.plan.cache_signals):
                for index in range(len(text.layers)):
                    attention = self.adapter.decoder_attention(index)
                    self._hooks.after(attention, functools.partial(self.after_attention, index), with_kwargs=True)
            attentions = (VisionAttention, DecoderAttention, DecoderProbe, EnteredAttention)
            reads_attention = any(signal.reads in attentions for signal in self.plan.signals)
            if reads_attention or self.plan.in_tower:
                self._recorder = Recorder()
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Leave the model as it was found."""
        self.owner.live = False
        self._hooks.remove()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        self._followed = len(self.adapter.text_model.layers)

    def _follow(self, call: CallState) -> None:
        """Hook the layers whose mask, positions or tokens differ from what the model would give them."""
        forward = call.forward
        if not isinstance(forward, ForwardState) or not forward.touched:
            return
        if self.adapter.builds_masks or forward.slides or "flash" in str(self.text_config._attn_implementation):
            self._follow_from(0)
        else:
            self._follow_from(min([start for start, _ in forward.key_groups[1:]], default=self._followed))

    def _follow_from(self, first: int) -> None:
        layers = self.adapter.text_model.layers
        with _HOOKING:
            for index in range(first, self._followed):
                self._hooks.before(layers[index], functools.partial(self.before_layer, index))
            self._followed = min(first, self._followed)

    # -- for other packages -----------------------------------------------------------------------------------------

    def remember(self, memory: EncoderMemory) -> AbstractContextManager[None]:
        """Encode images and videos once: keep the results in `memory`, and take from it what is there already.

        The memory is of one prompt. It serves other configurations of the same model too, and the uncompressed model
        while this engine is disabled. See `vtc.remember` for what it holds.
        """
        return self.encoder.remember(memory)

    def encoded(self, output: Any) -> Encoded:
        """Return what was read while `output` of `get_image_features` or `get_video_features` was made.

        Raises
        ------
        StateError
            It was made before the engine was installed.
        """
        found = self.encoder.encoded(output)
        if found is None:
            raise StateError("these features were not made by this compressed model; encode them again")
        return found

    @contextmanager
    def reading(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Iterator[None]:
        """Take the next forward pass of the model for one of `generate` to the prompt `ids` (B, P).

        What stands behind the prompt there is an answer: no method reads it, or fuses anything into it.
        """
        with calling(CallState(self, bare=False)) as call:
            self._note_prompt(call, (ids,), {"attention_mask": mask})
            call.announced = True
            try:
                yield
            finally:
                if call.prompt is not None:
                    call.prompt.release()

    @contextmanager
    def appending(self, forward: ForwardState) -> Iterator[None]:
        """Open a call whose tokens were selected elsewhere; see `vtc.engine.append`."""
        with calling(CallState(self, bare=False, forward=forward)) as call:
            self._follow(call)
            yield

    def report(self, prompt: Prompt | None = None) -> Report:
        """Report what a prompt kept; by default the last one, as `Calls.last` finds it."""
        prompt = self.calls.last() if prompt is None else prompt
        valid = prompt.valid
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
        depth = self.plan.shape.decoder_layers
        lengths = [(valid & prompt.keep_at_layer(layer)).sum(dim=1).tolist() for layer in range(depth)]
        stored = None
        scopes = [s.selector.scope for s in self.plan.after_prefill if isinstance(s.selector, CacheSelector)]
        if prompt.stored is not None:
            stored = [(index[:, 0] >= 0).sum(dim=1).tolist() for index in prompt.stored]
        elif prompt.decided(CacheAfterPrefill()):  # every layer stores what is left behind all sites
            stored = [(valid & prompt.keep_at(CacheAfterPrefill())).sum(dim=1).tolist()] * depth
        before = valid.sum(dim=1).tolist()
        return self.build_report(
            segments,
            before,
            lengths,
            prompt.spent,
            stored,
            prompt.tower_flops,
            prompt.stored,
            *scopes,
            probed_layers=max((signal.layer for signal in self.plan.probes), default=0) if segments else 0,
        )

    def build_report(
        self,
        segments: Sequence[SegmentReport],
        lengths_before: Sequence[int],
        lengths_per_layer: Sequence[Sequence[int]],
        spent: Mapping[Site, float],
        stored_per_layer: Sequence[Sequence[int]] | None = None,
        tower_flops: tuple[int, int] | None = None,
        entries: Sequence[torch.Tensor] | None = None,
        scope: str | None = None,
        *,
        probed_layers: int = 0,
    ) -> Report:
        """Build a report of this model and configuration; arguments as in `Report.build`."""
        import transformers

        return Report.build(
            configs=self.plan.configs,
            model_type=self.model.config.model_type,
            text_config=self.text_config,
            segments=segments,
            lengths_before=lengths_before,
            lengths_per_layer=lengths_per_layer,
            stored_per_layer=stored_per_layer,
            spent=spent,
            tower_flops=tower_flops,
            entries=entries,
            scope=scope,
            probed_layers=probed_layers,
            dtype=self.model.dtype,
            transformers_version=transformers.__version__,
        )

    # -- a call of the model --------------------------------------------------------------------------------------

    def around_generate(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Open the state of a `generate` call, and close it whatever happens."""
        with calling(CallState(self, bare=False)) as call:
            self._note_prompt(call, args, kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                if call.prompt is not None:
                    call.prompt.release()

    def _note_prompt(self, call: CallState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the ids of a prompt or turn; those of placeholders where it comes as embeddings."""
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and (ids is None or ids.shape[1] < embeds.shape[1]):
            ids = self.adapter.ids_of(embeds)
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            return
        mask = kwargs.get("attention_mask")
        past = cache_in(kwargs)
        seen = int(past.get_seq_length()) if past is not None else 0
        # As transformers does: ids as long as the mask are the whole conversation, shorter ones only the new turn.
        if seen and (mask is None or mask.shape[1] == ids.shape[1]):
            ids = ids[:, seen:]
        call.prompt_ids, call.prompt_offset = ids, seen
        call.prompt_valid = None if mask is None else mask[:, -ids.shape[1] :].bool()
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            encoded = None if output is None else self.encoder.encoded(output)
            if encoded is not None:
                call.encoded[modality] = encoded

    def around_prepare(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the mask that a static cache hides, and build masks outside of the region that gets compiled."""
        call = current_call(self)
        mask = kwargs.get("attention_mask")
        if call is None:
            return original(*args, **kwargs)
        call.announced = True
        if mask is not None and mask.dim() != 2:
            return original(*args, **kwargs)
        call.forward, call.mask = None, mask
        cache: Any = cache_in(kwargs)
        record = record_of(cache)
        ids = args[0] if args else kwargs["input_ids"]
        length = kwargs.get("next_sequence_length") or ids.shape[1]
        if record is None or length != 1 or not cache.is_compileable:
            return original(*args, **kwargs)
        source_index = torch.full((ids.shape[0], 1), record.logical, dtype=torch.long, device=ids.device)
        if mask is not None:
            source_index = source_index.masked_fill(~mask[:, -1:].bool(), -1)
        forward = ForwardState(self.layer_types, cache, source_index, record.logical, record)
        kwargs["attention_mask"] = forward.valid_keys(0).long()
        inputs = original(*args, **kwargs)
        hidden = torch.empty(ids.shape[0], 1, 0, dtype=self.model.dtype, device=ids.device)
        call.forward = PrebuiltMasks(
            [
                forward.mask(layer, hidden) if forward.needs_mask(layer) or self.adapter.builds_masks else None
                for layer in range(self.plan.shape.decoder_layers)
            ],
            forward if forward.memories else None,
        )
        if record.shift is not None and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] - record.shift[:, None]
        forward.write_record(self.owner, record.shift)
        return inputs

    def around_encode(self, modality: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read images or videos while they are encoded."""
        if self.encoder.busy:
            return original(*args, **kwargs)
        if not self.enabled:
            remembered = self.encoder.remembered(modality)
            return original(*args, **kwargs) if remembered is None else remembered
        output, encoded = self.encoder.read(modality, original, args, kwargs)
        call = current_call(self)
        if call is not None:
            call.encoded[modality] = encoded
        return output

    def around_forward(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward pass of the whole model: the next one of a `generate`, or a call of its own."""
        call = current_call(self)
        if call is not None and call.announced and isinstance(call.forward, PrebuiltMasks):
            call.announced = False
            return original(*args, **kwargs)  # nothing is left to decide: this can be compiled
        traced = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined]
        if traced and self.enabled:
            raise StateError(
                "A compressed model cannot be traced or exported: the graph would keep the places of the tokens that "
                "one input keeps. Call restore(model) first, or trace within vtc.disabled(model)."
            )
        run = self._forward_eagerly if torch.compiler.is_compiling() else self._forward
        return run(call, original, args, kwargs)

    def _forward(self, call: CallState | None, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call is None or not call.announced:
            with calling(CallState(self, bare=True)) as bare:
                self._note_inputs(bare, original, args, kwargs)
                return original(*args, **kwargs)
        call.announced = False
        self._note_inputs(call, original, args, kwargs)
        return original(*args, **kwargs)

    _forward_eagerly = torch.compiler.disable(
        _forward, reason="vtc selects tokens by value, outside of compiled graphs"
    )

    def _note_inputs(self, call: CallState, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a forward pass of the whole model was called with."""
        call.forward = None
        given = dict(inspect.signature(original).bind_partial(*args, **kwargs).arguments) if args else kwargs
        passed = given.get("mm_encoder_outputs") or {}
        inputs = call.inputs = ForwardInputs(ids=given.get("input_ids"), mask=given.get("attention_mask"))
        for modality in self.adapter.modalities if self.enabled else ():
            output = passed.get(modality)
            if output is not None:
                inputs.encoded[modality] = self.encoder.encoded(output) or call.encoded.get(modality)
                if inputs.encoded[modality] is None:
                    raise StateError(
                        f"the {modality} features passed as mm_encoder_outputs were made before compress() and carry "
                        "none of what a selector reads; encode them again"
                    )
            elif any(given.get(name) is not None for name in _PIXELS[modality]):
                inputs.encoded[modality] = None
        if not isinstance(inputs.mask, torch.Tensor) or inputs.mask.dim() != 2:
            inputs.mask = call.mask
        if inputs.ids is None and inputs.encoded and given.get("inputs_embeds") is not None:
            inputs.ids = self.adapter.ids_of(given["inputs_embeds"])
        if self.adapter.builds_masks:
            inputs.blocks = self.adapter.blocks(given)

    # -- a forward pass of the language model -----------------------------------------------------------------------

    def before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let the stages before the language model choose."""
        call = current_call(self)
        if call is None or call.forward is not None:  # masks are prebuilt, or tokens are appended
            return None
        shortened = before_decoder(self, call, args, kwargs)
        self._follow(call)
        return shortened

    def before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let the stage on entering a layer choose, and give the layer the mask and tables that it needs."""
        if kwargs is None:  # another thread is just putting the hook here, for its own sake
            return None
        call = current_call(self)
        forward = self._replayed(kwargs) if call is None else call.forward
        if forward is None:
            return None
        if isinstance(forward, PrebuiltMasks):
            return enter_prebuilt(self, forward, layer, args, kwargs)
        tables = _tables(kwargs)
        if tables is not None and module.training and getattr(module, "gradient_checkpointing", False):
            self._replays[tables] = forward  # checkpointing runs this layer again, after the call
        return enter_layer(self, forward, layer, args, kwargs)

    def after_attention(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """See the call of the attention module of a layer."""
        call = current_call(self)
        if call is not None and isinstance(call.forward, ForwardState):
            given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments) if args else kwargs
            see_call(self, call.forward, layer, module, given, output)

    def after_linear(self, change: Any, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        """Add what an adapter of the decoder changes."""
        return output + change(args[0]).to(output.dtype) if self.enabled else None

    def behind_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See the residual stream behind the attention of a layer."""
        call = current_call(self)
        if call is not None and isinstance(call.forward, ForwardState):
            see_update(call.forward, self.plan.cache_signals, layer, args[0] if args else kwargs["hidden_states"])

    def _replayed(self, kwargs: dict[str, Any]) -> ForwardState | None:
        """The pass that gradient checkpointing runs a layer of again, known by its rotary tables."""
        tables = _tables(kwargs)
        return None if tables is None else self._replays.get(tables)

    def around_deepstack(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Thin out the planes that deepstack adds behind the first layers, as far as decoder stages have pruned."""
        hidden, marks, plane = args
        call = current_call(self)
        if call is not None and isinstance(call.forward, ForwardState):
            marks, plane = call.forward.thin_marked(marks, plane)
        return original(hidden, marks, plane, **kwargs)

    def after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Let the stages at the cache choose, and put hidden states back at their places."""
        call = current_call(self)
        forward = None if call is None else call.forward
        if call is None or not isinstance(forward, ForwardState) or forward.mode is Mode.APPEND:
            return None
        after_prefill(self, forward, output)
        if forward.prompt is not None and call.prompt_ids is None:
            forward.prompt.release()
            call.encoded = {}
        if forward.packed is None and not forward.layer_plans:
            return None
        hidden = forward.scatter(output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output


def _tables(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first rotary table among the arguments of a layer."""
    tables = kwargs.get("position_embeddings")
    return tables[0] if isinstance(tables, tuple) else None
