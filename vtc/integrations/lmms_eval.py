"""Run lmms-eval's own models with fewer visual tokens; found through its entry-point group ``lmms_eval.models``.

    python -m lmms_eval --model vtc_llava_hf \
        --model_args pretrained=FOLDER,vtc_method=divprune,vtc_keep_ratio=0.25 --tasks pope --batch_size 1

Model arguments that begin with ``vtc_`` go to `vtc.compress`, the others to lmms-eval's class. Without any of them the
model keeps all its tokens, so that the baseline can be run under the same name. Which of lmms-eval's classes run a
family is a fact of its adapter (`Adapter.lmms_eval`).

Importing this module imports nothing of lmms-eval. A class is made when it is asked for: the classes need different
packages, and a missing one must not hide the other families.
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc import api, registry
from vtc.config import CompressionConfig
from vtc.errors import ConfigError, VtcError
from vtc.integrations.arguments import PREFIX, configuration, parted
from vtc.report.report import Report

__all__ = ["compression", "manifests"]


def manifests() -> list[Any]:
    """Describe every model to lmms-eval's registry; the payload of the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    def path(base: str | None) -> str | None:
        return None if base is None else f"{__name__}.{_name(base)}"

    return [
        ModelManifest(model_id=PREFIX + model, simple_class_path=path(simple), chat_class_path=path(chat))
        for model, simple, chat in _models()
    ]


def __getattr__(name: str) -> Any:
    bases = {_name(base): base for _, *bases in _models() for base in bases if base is not None}
    if name not in bases:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(bases[name])


def _models() -> list[tuple[str, str | None, str | None]]:
    """List the name of every model, and the paths of lmms-eval's classes without and with a chat template."""
    adapters = registry.adapters().values()
    return list(dict.fromkeys(adapter.lmms_eval for adapter in adapters if adapter.lmms_eval is not None))


def _name(base: str) -> str:
    """Name the compressed class over the class at this path: ``chat.llava_hf.LlavaHf`` has ``VtcLlavaHfChat``."""
    kind, _, name = base.split(".")
    return f"Vtc{name}{'Chat' if kind == 'chat' else ''}"


@functools.cache
def _class(base: str) -> type:
    module, _, name = f"lmms_eval.models.{base}".rpartition(".")
    theirs = getattr(importlib.import_module(module), name)
    return type(_name(base), (_Compressed, theirs), {"__module__": __name__})


def compression(arguments: Mapping[str, Any]) -> tuple[CompressionConfig | None, dict[str, Any]]:
    """Divide model arguments into a configuration of `vtc` (None: all tokens) and those of lmms-eval.

    ``vtc_method``, ``vtc_keep_ratio``, ``vtc_keep_tokens``, ``vtc_positions``, ``vtc_structural`` and ``vtc_seed`` are
    the arguments of `vtc.compress`; any other ``vtc_NAME`` is an option of the method, its value read as JSON where it
    is JSON.

    Raises
    ------
    ConfigError, UnsupportedMethodError
        There is no such method or option, or a value is out of range.
    """
    given, others = parted(arguments)
    if not given:
        return None, others
    if "method" not in given:
        names = ", ".join(f"{PREFIX}{name}" for name in given)
        raise ConfigError(f"{names} given without {PREFIX}method; `vtc methods` lists the methods.")
    return configuration(given), others


@dataclass
class _Tally:
    """Count what was kept of all prompts with images or videos, and collect errors."""

    config: CompressionConfig
    prompts: int = 0
    before: list[int] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    selecting: list[float] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    def add(self, report: Report) -> None:
        self.prompts += len(report.lengths_before)
        self.before.append(report.visual_tokens_before)
        self.kept.append(report.average_visual_tokens)
        self.selecting.append(report.selector_ms / len(report.lengths_before))

    def figures(self) -> dict[str, float]:
        """Return the figures for lmms-eval's table of results; tokens and milliseconds are per prompt."""
        before, kept = sum(self.before), sum(self.kept)
        return {
            "vtc_prompts": self.prompts,
            "vtc_visual_tokens_before": before / self.prompts,
            "vtc_visual_tokens_kept": kept / self.prompts,
            "vtc_kept_share": kept / before,
            "vtc_selecting_ms": statistics.median(self.selecting),
        }

    def __str__(self) -> str:
        items = self.config.to_dict().items()
        what = ", ".join(f"{name}={value}" for name, value in items if value not in (None, {}) and name != "version")
        if not self.prompts:
            return f"vtc: {what}: no prompt with an image or a video was answered"
        figures = self.figures()
        return (
            f"vtc: {what}: kept {figures['vtc_visual_tokens_kept']:.1f} of {figures['vtc_visual_tokens_before']:.1f} "
            f"visual tokens per prompt ({100 * figures['vtc_kept_share']:.1f} %, mean over the decoder's layers) in "
            f"{self.prompts} prompts, selecting took {figures['vtc_selecting_ms']:.2f} ms (median)"
        )


class _Compressed:
    """Mixin over a class of lmms-eval: compresses its model and logs what was kept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config, others = compression(kwargs)  # before the model is loaded, which may take minutes
        super().__init__(*args, **others)
        self._tally = None if config is None else _Tally(config)
        if self._tally is not None:
            model = self.model  # type: ignore[attr-defined]
            api.compress(model, self._tally.config)
            _count(model, self._tally)

    def generate_until(self, requests: Sequence[Any]) -> Any:
        answers = super().generate_until(requests)  # type: ignore[misc]
        self._log()
        return answers

    def _log(self) -> None:
        from lmms_eval.models.model_utils.gen_metrics import log_metrics
        from loguru import logger

        tally = self._tally
        if tally is None:
            logger.info("vtc: no vtc_method among the model arguments, so all visual tokens were kept")
            return
        logger.info(str(tally))
        if tally.prompts:  # the zeros are required arguments: only our figures are meant for the results file
            log_metrics(total_elapsed_time=0.0, total_gen_tokens=0, avg_speed=0.0, additional_metrics=tally.figures())
        # Several of lmms-eval's classes log an error of generate() and go on with an empty answer.
        for failure in tally.failures:
            if isinstance(failure, VtcError):
                raise failure
        if tally.failures:
            first = tally.failures[0]
            logger.warning(
                f"vtc: {len(tally.failures)} batches could not be answered and may count as wrong; the first: {first!r}"
            )


def _count(model: Any, tally: _Tally) -> None:
    """Add the report of every call of `model.generate` with an image or a video to `tally`.

    After an error of vtc no further prompt is tried: lmms-eval would swallow it, and the scores would mean nothing.
    """
    generate = model.generate

    @functools.wraps(generate)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if tally.failures and isinstance(tally.failures[-1], VtcError):
            raise tally.failures[-1]
        try:
            output = generate(*args, **kwargs)
        except Exception as error:
            tally.failures.append(error)
            raise
        if any(name.startswith("pixel_values") for name in kwargs):
            tally.add(api.report(model))
        return output

    model.generate = counted
