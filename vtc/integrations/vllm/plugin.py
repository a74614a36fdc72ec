"""What vLLM calls in every process before it loads a model."""

from __future__ import annotations

import functools
import os
from typing import Any

from vtc.errors import StateError, UnsupportedModelError
from vtc.integrations.vllm.families import FAMILIES, check_architecture
from vtc.integrations.vllm.settings import from_environment, split

__all__ = ["register"]


def register() -> None:
    """Put the classes of `families` in the place of vLLM's own, and refuse settings where there is none.

    May be called more than once.

    Raises
    ------
    StateError
        The environment has settings, and this vLLM is older than the plug-in knows.
    """
    from vllm import ModelRegistry, __version__
    from vllm.multimodal.processing import BaseMultiModalProcessor

    if not hasattr(BaseMultiModalProcessor, "get_dummy_inputs"):  # since 0.32
        if from_environment(os.environ):
            raise StateError(f"vtc compresses inside vLLM 0.32 and newer; this is {__version__}.")
        return
    for architecture, path in FAMILIES.items():
        ModelRegistry.register_model(architecture, path)
    _guard_other_architectures()
    _mend_cpu_runner()


def _guard_other_architectures() -> None:
    """Refuse settings of ours for pictures that a model of another class is to read."""
    from vllm.multimodal.registry import MultiModalRegistry

    make = MultiModalRegistry.create_processor
    if getattr(make, "vtc", False):
        return

    @functools.wraps(make)
    def create_processor(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        made = make(self, model_config, *args, **kwargs)
        if not hasattr(made, "vtc_begin"):
            server, _ = split(model_config.multimodal_config.mm_processor_kwargs)
            if server or from_environment(os.environ):
                _refuse(model_config)
            apply = made.apply

            def guarded(inputs: Any, *args: Any, **kwargs: Any) -> Any:
                if split(inputs.hf_processor_mm_kwargs)[0]:
                    _refuse(model_config)
                return apply(inputs, *args, **kwargs)

            made.apply = guarded
        return made

    create_processor.vtc = True  # type: ignore[attr-defined]
    MultiModalRegistry.create_processor = create_processor


def _refuse(model_config: Any) -> None:
    architecture = model_config.architecture
    check_architecture(architecture)
    raise UnsupportedModelError(
        f"{architecture} runs in a class that is not vtc's, so that its settings would do nothing: another "
        "plug-in has registered it, or --model-impl names another implementation."
    )


def _mend_cpu_runner() -> None:
    """Let the runner on CPUs take positions off embeddings, as that on GPUs does.

    vLLM's runner on GPUs notes after loading whether the model appends positions to its embeddings. That on CPUs (0.32)
    loads models in a method of its own, which does not, and then fails on embeddings that are too wide.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model
    if getattr(load, "vtc", False):
        return

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = load(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        if config is not None:
            pruning = supports_multimodal_pruning(self.get_model()) and config.is_multimodal_pruning_enabled()
            self.is_multimodal_pruning_enabled = pruning
        return done

    load_model.vtc = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
