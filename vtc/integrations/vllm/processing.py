"""The processor's side: settings become part of every picture, and fewer placeholders go into the prompt."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import InputProcessingContext, PromptUpdateDetails

from vtc.adapters.base import Adapter
from vtc.engine.plan import PlannedStage
from vtc.errors import ConfigError, UnsupportedMethodError, VtcError
from vtc.integrations.vllm.choosing import kept_count
from vtc.integrations.vllm.settings import RESOLVED, from_environment, parse, planned, resolve, split, written
from vtc.integrations.vllm.tower import adapter_of, reads_tower

__all__ = ["Processor", "RequestError", "field_of", "stages_of", "with_processor"]

T = TypeVar("T", bound=type)

_KEPT_SETTINGS = "vtc_server"
_REMEMBERED = 256
_KEEP_ALL = "null"  # what stands for no compression where a configuration is written


def field_of(modality: str) -> str:
    """Return the name under which the settings of every item of a modality travel to the model."""
    return f"vtc_{modality}"


def stages_of(field: Tensor | Sequence[Tensor], adapter: Callable[[], Adapter]) -> list[PlannedStage | None]:
    """Read the settings of items, one row of bytes each, for a model with this adapter; None: all tokens stay."""
    return [_stage(bytes(row.tolist()).decode(), adapter) for row in field]


def _stage(text: str, adapter: Callable[[], Adapter]) -> PlannedStage | None:
    return None if text == _KEEP_ALL else parse(text, adapter())


class _Own(str):
    """Resolved settings that this module has put among a processor's arguments; no client can."""

    __slots__ = ()


class RequestError(VLLMValidationError, VtcError):
    """What was asked of vtc in a request cannot be done: an error of the client for vLLM, one of ours for others."""


class _Context(InputProcessingContext):
    """A context whose processors never see arguments that are ours."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **named: Any) -> dict[str, Any]:
        return super().get_merged_mm_kwargs(split(kwargs)[1], **named)


class Processor:
    """Mixin over a family's processor.

    The settings of the server and of a request are resolved into one text before anything is hashed or cached. The
    text is an argument of the processor, and so a part of the hash of every picture and video: what was made for one
    setting is never found for another. It also travels as a field of the item, so that the model reads the very same.
    """

    info: Any
    vtc_server: dict[str, Any]
    vtc_environment: dict[str, Any]
    vtc_pruned_by_vllm: bool
    vtc_resolved: dict[str, str]  # what requests asked for so far, as it was resolved
    vtc_known_adapter: Adapter | None = None

    def vtc_begin(self) -> None:
        """Read the settings of the server, and refuse what cannot be done before anything is served."""
        mm_config = self.info.ctx.get_mm_config()
        # vLLM hands the arguments of the server to transformers in several ways: ours are taken out once, and kept.
        ours, others = split(mm_config.mm_processor_kwargs)
        self.vtc_server = mm_config.__dict__.setdefault(_KEPT_SETTINGS, ours)
        mm_config.mm_processor_kwargs = others or None
        self.vtc_environment, self.vtc_resolved = from_environment(os.environ), {}
        self.vtc_pruned_by_vllm = bool(getattr(mm_config, "video_pruning_rate", None))
        self.vtc_resolve({})
        context = self.info.ctx
        if not isinstance(context, _Context):
            self.info.ctx = _Context(**{item.name: getattr(context, item.name) for item in dataclasses.fields(context)})

    def vtc_resolve(self, given: Mapping[str, Any]) -> str:
        """Resolve the arguments of a request, without prefix, and write them.

        Raises
        ------
        ConfigError, UnsupportedMethodError
            They, or those of the server, cannot be carried out.
        """
        known = repr(sorted(given.items()))
        text = self.vtc_resolved.get(known)
        if text is None:
            if len(self.vtc_resolved) >= _REMEMBERED:
                self.vtc_resolved.clear()
            self.vtc_resolved[known] = text = self._vtc_resolve(given)
        return text

    def _vtc_resolve(self, given: Mapping[str, Any]) -> str:
        config = resolve(self.vtc_environment, self.vtc_server, given, adapter=self.vtc_adapter)
        if config is None:
            return _KEEP_ALL
        if self.vtc_pruned_by_vllm:
            raise ConfigError(
                "--video-pruning-rate is vLLM's own pruning of videos, which does not go together with that of vtc: "
                "leave it out, or the settings of vtc."
            )
        mm_config = self.info.ctx.get_mm_config()
        backend = getattr(mm_config.mm_encoder_attn_backend, "name", None)
        hidden = "--mm-encoder-tp-mode data" if mm_config.mm_encoder_tp_mode == "data" else None
        hidden = "--mm-encoder-attn-backend FLASHINFER" if backend == "FLASHINFER" else hidden
        if hidden is not None and reads_tower(planned(config, self.vtc_adapter())):
            raise UnsupportedMethodError(
                f"{config.method} reads the layers of the vision tower, which {hidden} hides from vtc: leave that "
                "out, or take a method that reads features alone, such as divprune."
            )
        return written(config)

    def vtc_adapter(self) -> Adapter:
        """Return the library's adapter of the model."""
        if self.vtc_known_adapter is None:
            self.vtc_known_adapter = adapter_of(self.info.get_hf_config())
        return self.vtc_known_adapter

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Process one prompt with its pictures and videos, once the settings are resolved."""
        given, others = split(inputs.hf_processor_mm_kwargs)
        text = given.get("resolved")
        if not isinstance(text, _Own):
            try:
                text = self.vtc_resolve(given)
            except VtcError as error:
                raise RequestError(str(error)) from error
        if text != _KEEP_ALL:
            others[RESOLVED] = str(text)
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=others)
        return super().apply(inputs, *args, **kwargs)  # type: ignore[misc]

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Make the inputs that memory is planned with: nothing leaves these, since a request may ask for that."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        given = {**inputs.hf_processor_mm_kwargs, RESOLVED: _Own(_KEEP_ALL)}
        return dataclasses.replace(inputs, hf_processor_mm_kwargs=given)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        text = str(hf_processor_mm_kwargs.get(RESOLVED, _KEEP_ALL))
        for modality, count in _counts(fields, hf_inputs).items():
            hf_inputs[field_of(modality)] = torch.tensor([list(text.encode())] * count, dtype=torch.uint8)
            fields[field_of(modality)] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        stage = _stage(str(hf_processor_mm_kwargs.get(RESOLVED, _KEEP_ALL)), self.vtc_adapter)
        if self.vtc_pruned_by_vllm:
            return updates
        return [
            dataclasses.replace(update, replacement=functools.partial(self._vtc_content, stage, update, mm_items))
            for update in updates
        ]

    def _vtc_content(self, stage: PlannedStage | None, update: Any, mm_items: Any, index: int) -> Any:
        """Return what an item becomes in the prompt."""
        content = update.replacement
        content = content(index) if callable(content) else content
        return self.vtc_shortened(stage, content, update.modality, mm_items, index)

    def vtc_shortened(self, stage: PlannedStage | None, content: Any, modality: str, mm_items: Any, index: int) -> Any:
        """Leave out of what an item becomes in the prompt the placeholders of tokens that will leave.

        Parameters
        ----------
        stage
            None: all stay.
        content
            As vLLM has it: ids, or `PromptUpdateDetails` of them.
        modality, mm_items, index
            The item.
        """
        if stage is None:
            return content
        details = content if isinstance(content, PromptUpdateDetails) else PromptUpdateDetails.from_seq(content)
        marks = [True] * len(details.full) if details.is_embed is None else details.is_embed(details.full).tolist()
        kept: list[int] = []
        for mark, run in itertools.groupby(zip(marks, details.full, strict=True), key=operator.itemgetter(0)):
            tokens = [token for _, token in run]
            length = len(tokens)
            if mark:
                length = kept_count(stage, length, self.vtc_structural(length, modality, mm_items, index))
            kept += tokens[:length]
        return dataclasses.replace(details, full=kept)

    def vtc_structural(self, rows: int, modality: str, mm_items: Any, index: int) -> int:
        """Return how many of the rows of an item, or of one of its runs, are no patches."""
        return 0


def _counts(fields: Mapping[str, Any], hf_inputs: Mapping[str, Any]) -> dict[str, int]:
    """Count the items of every modality among what a processor returned."""
    return {
        config.modality: len(config.build_elems(name, hf_inputs[name]))
        for name, config in fields.items()
        if name in hf_inputs
    }


@functools.cache
def _mixed(mixin: Any, base: Any) -> Any:
    return type(f"Vtc{base.__name__}", (mixin, base), {"__module__": __name__})


def with_processor(mixin: type[Processor] = Processor) -> Callable[[T], T]:
    """Register for a model class the processor of its base class, with a mixin over it; a class decorator.

    Which class the processor has, the base class decides when a model is loaded.
    """

    def register(cls: T) -> T:
        factories = cls._processor_factory  # type: ignore[attr-defined]

        def processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
            theirs = type(factories.processor(info, dummy_inputs, **kwargs))
            made = _mixed(cast(Any, mixin), cast(Any, theirs))(info, dummy_inputs, **kwargs)
            made.vtc_begin()
            return made

        registered: T = MULTIMODAL_REGISTRY.register_processor(
            processor, info=factories.info, dummy_inputs=factories.dummy_inputs
        )(cls)
        return registered

    return register
