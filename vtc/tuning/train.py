"""Train the modules of a method on the user's own pictures and questions, with the model frozen.

The modules are trained where they are used: the model is compressed with them and reads a prompt and its answer in one
pass, so that what is trained is exactly what runs afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtc import api
from vtc.adapters.base import Adapter
from vtc.budget import check_seed
from vtc.config import CompressionConfig
from vtc.core.regions import regions as vtc_regions
from vtc.engine.install import adapter_for, engine_of
from vtc.engine.memory import EncoderMemory
from vtc.engine.plan import make_plan, shape_of
from vtc.errors import ConfigError, InputError
from vtc.limits import MAX_ROUNDS, check_count
from vtc.plain import real, shown
from vtc.registry import selectors
from vtc.report.views import fit_of
from vtc.selectors.learned import Modules, save_modules
from vtc.selectors.learned.decoder import Decoder
from vtc.selectors.learned.lora import LoraAdapter, begin_lora, save_lora
from vtc.selectors.learned.trained import TrainedSelector
from vtc.tuning.recipes import TRAINABLE, Recipe
from vtc.tuning.samples import as_found, prompts
from vtc.tuning.training_state import STATE, WEIGHTS, TrainingRun, TrainingState

__all__ = ["TRAINABLE", "check", "train"]


_NO_CEILING = 2**31 - 1
_NEW_TOKENS = 32  # of an answer that the model gives itself


def train(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    method: str,
    output: str | Path,
    *,
    answers: Sequence[str | None] | None = None,
    regions: Sequence[Sequence[Any] | None] | None = None,
    steps: int = 500,
    batch: int = 8,
    rate: float = 1e-3,
    seed: int = 0,
    keep_tokens: int | None = None,
    keep_ratio: float | None = None,
    lora: int | None = None,
    positions: str = "original",
    save_every: int = 50,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Train the modules of `method` for this model; return the folder, which ``modules=`` of the method names.

    With an answer the loss is the cross-entropy of its tokens and of the end of the turn; without one it is the
    Kullback-Leibler divergence from what the untouched model predicts at each token of its own greedy answer; "atp" and
    "vtc-asked" have losses of their own, and "vtc-asked" needs no answers. The model is frozen, in evaluation mode, and
    left as it was found.

    The optimiser is AdamW without weight decay; gradients are averaged over `batch` samples, which are read one by one,
    and their norm is clipped to 1. The learning rate rises for 3 % of the steps and falls along half a cosine to 5 %;
    single numbers, which are gates, learn ten times as fast.

    With `lora` a low-rank adapter of the decoder's attention is trained beside the modules. It begins without effect,
    and is written to the folder in PEFT's format; `compress` finds it there. The model's own weights do not change.

    An interrupted run leaves its state in the folder, and the same call goes on from there to the same result.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin or None
        The model's; None if `samples` are ready-made inputs and no answers are given.
    samples : sequence
        As of `calibrate`: (image, question) pairs, or inputs of one row that end where the answer begins.
    method : str
        One of `TRAINABLE`.
    output : path
        Folder for the modules.
    answers : sequence of str or None, optional
        The answer to each sample; None, for one or for all: the untouched model's.
    regions : sequence, optional
        For methods that read regions, of each sample what `vtc.regions` takes: one entry for every picture. Boxes are
        in pixels of the pictures of the sample; ready-made inputs take masks.
    steps : int
        Steps of the optimiser.
    batch : int
        Samples per step.
    rate : float
        Largest learning rate.
    seed : int
        Of the first weights and of the order of the samples.
    keep_tokens, keep_ratio
        As of `compress`, for methods that are given a number of tokens; those whose modules fix it take none.
    lora : int, optional
        Rank of the adapter of the decoder; None: the decoder stays as it is.
    positions : {"original", "compact"}
        As of `compress`; use the modules with the same.
    save_every : int
        Steps after which the state is written.
    progress : bool
        Whether to show a bar; it needs tqdm.
    **options
        Of the modules: for "llava-mini" `side` (C), `heads` and `fusion` (layers); for "crosslmm" and "vision-remember"
        `every` (decoder layers between them), `inner` (width of the attention) and `heads`; for "atp" `target`
        (fraction of the tokens that stays on average), `layout`, `grid` and `width`; for "pixelrefer" `heads`,
        `iterations` and `tokens`; for "vtc-asked" `inner` (width of the scorer), `heads` and `blocks`.

    Raises
    ------
    ConfigError
        The method has no modules, an argument is wrong, or the folder holds trained modules or another run's state.
    InputError
        There are no samples, or one is not of this kind; answers and samples do not fit each other.
    UnsupportedMethodError, UnsupportedModelError
        The model cannot be compressed by this method.
    """
    given = {"keep_tokens": keep_tokens, "keep_ratio": keep_ratio}
    budget = {name: value for name, value in given.items() if value is not None}
    check(method, output, steps=steps, batch=batch, rate=rate, budget=budget, lora=lora)
    check_count("save_every", save_every, MAX_ROUNDS)
    run = TrainingRun(steps, batch, float(rate), check_seed(seed), lora)
    if answers is not None and len(answers) != len(samples):
        raise InputError(f"there are {len(samples)} samples, but {len(answers)} answers.")
    marks = _marks(samples, regions, fit_of(processor))
    folder, adapter = Path(output), adapter_for(model)
    try:
        decoder = Decoder.of(adapter.config.get_text_config(), adapter.text_model.layers)
        modules, module = TRAINABLE[method].begin(
            shape_of(adapter), _projector(adapter), decoder, seed=run.seed, **options
        )
    except TypeError as error:
        raise ConfigError(f"{method}: its modules do not take {shown(options)}: {error}") from error
    adapter_module = None if lora is None else begin_lora(adapter.text_model, lora, run.seed)
    encoded = prompts(processor, samples, model)
    tokens = [_answer_tokens(processor, model, text) for text in answers or [None] * len(encoded)]
    keep: dict[str, Any] = budget or {"keep_tokens": _NO_CEILING}
    chosen = {"modules": str(folder), **TRAINABLE[method].options}
    config = CompressionConfig(method, **keep, positions=positions, options=chosen)
    mark = _mark(run, modules, encoded, tokens, (positions, budget, regions))
    state = TrainingState.read(folder, mark)  # refused before anything is written
    state = state or TrainingState.start(_trained(module, adapter_module), mark)
    folder.mkdir(parents=True, exist_ok=True)
    state.write(folder)
    _save(folder, modules, module, adapter_module)
    make_plan([config], adapter)
    with as_found(model), _frozen(model), api.compressed(model, config):
        module, adapter_module = _live_modules(model)
        live = _trained(module, adapter_module)
        state.put_into(live)
        try:
            _steps(model, live, TRAINABLE[method], state, run, encoded, tokens, marks, folder, save_every, progress)
        finally:
            state.write(folder)
    done: dict[str, Any] = {"steps": steps, "batch": batch, "rate": run.rate, "seed": run.seed, "samples": len(encoded)}
    labelled = sum(each is not None for each in (answers or ()))
    done |= {"labelled": labelled, "positions": positions, **budget, "lora": lora, "seconds": round(state.seconds, 1)}
    _save(folder, replace(modules, training=done), module, adapter_module)
    for name in (STATE, WEIGHTS):
        (folder / name).unlink()
    return folder


def check(
    method: str,
    output: str | Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    budget: Mapping[str, Any] | None = None,
    lora: int | None = None,
) -> None:
    """Raise ConfigError for what `train` refuses whatever the model and the samples are."""
    if method not in TRAINABLE:
        raise ConfigError(f"{shown(method)} has no modules to train; these have: {', '.join(TRAINABLE)}.")
    kind = selectors()[method]
    answers = TRAINABLE[method].answers
    if budget and not (answers and not kind.adaptive):
        why = "how many tokens stay is trained into its modules" if answers else "it is trained with all tokens"
        raise ConfigError(f"{method} takes no {next(iter(budget))}: {why}.")
    if answers and not kind.adaptive and not budget:
        raise ConfigError(f"{method} is trained for a number of tokens: give keep_tokens, or keep_ratio.")
    if lora is not None and not (answers and issubclass(kind, TrainedSelector)):
        raise ConfigError(
            f"{method} runs its modules alone and cannot bring an adapter of the decoder; leave lora out."
        )
    for name, value in (("steps", steps), ("batch", batch)):
        check_count(name, value, MAX_ROUNDS)
    if not 0 < (real(rate) or 0) < math.inf:
        raise ConfigError(f"rate must be a number above 0, got {shown(rate)}.")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder.")
    if (folder / "modules.json").exists() and not (folder / STATE).exists():
        raise ConfigError(f"{folder} holds trained modules already; name another folder.")


def _steps(
    model: nn.Module,
    module: nn.Module,
    recipe: Recipe,
    state: TrainingState,
    run: TrainingRun,
    encoded: Sequence[Mapping[str, Any]],
    tokens: list[Tensor | None],
    marks: Sequence[Callable[[], AbstractContextManager[None]]],
    folder: Path,
    save_every: int,
    progress: bool,
) -> None:
    """Train from the step at which `state` stands to the last one; `state` follows every step that was made."""
    optimizer = state.optimizer(module)
    own: dict[int, Tensor] = {}
    studied: dict[int, Any] = {}

    def known(index: int) -> tuple[Tensor, Tensor | None]:
        """Return the answer to a sample, and what the untouched model predicts there if it is its own."""
        answer = tokens[index]
        if answer is not None:
            return answer, None
        if index not in own:
            own[index] = _own_answer(model, encoded[index])
        return own[index], _meant(model, encoded[index], own[index])

    with _bar(run.steps, state.step, progress) as show:
        for step in range(state.step, run.steps):
            began = time.perf_counter()
            total = 0.0
            for group in optimizer.param_groups:
                group["lr"] = run.rate_at(step) * group["faster"]
            for index in run.samples_of(step, len(encoded)):
                with marks[index]():
                    if recipe.study is None or recipe.loss is None:
                        loss = _loss(model, encoded[index], *known(index))
                    else:
                        if index not in studied:
                            with api.remember(model, EncoderMemory()):
                                read = functools.partial(model, **encoded[index], use_cache=False)
                                if recipe.answers:
                                    read = functools.partial(_loss, model, encoded[index], *known(index))
                                studied[index] = recipe.study(module, read)
                        loss = recipe.loss(module, studied[index])
                (loss / run.batch).backward()
                total += float(loss.detach()) / run.batch
            if not math.isfinite(total):
                raise InputError(f"the loss is {total} at step {step}; try a smaller rate, or a model in float32.")
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state.take(module, optimizer)
            state.step, state.seconds = step + 1, state.seconds + time.perf_counter() - began
            show(total)
            if state.step % save_every == 0:
                state.write(folder)


def _loss(model: nn.Module, prompt: Mapping[str, Any], answer: Tensor, meant: Tensor | None) -> Tensor:
    """Compute the loss of one answer, averaged over its tokens.

    With `meant` (n, V), log-probabilities, it is the divergence from them; else the cross-entropy of the answer.
    """
    said = _predicted(model, prompt, answer)
    if meant is None:
        return functional.cross_entropy(said, answer)
    return functional.kl_div(said.log_softmax(-1), meant, log_target=True, reduction="batchmean")


@torch.no_grad()
def _meant(model: nn.Module, prompt: Mapping[str, Any], answer: Tensor) -> Tensor:
    """Return the log-probabilities (n, V) that the untouched model gives at each token of an answer."""
    with api.disabled(model):
        return _predicted(model, prompt, answer).log_softmax(-1)


def _predicted(model: nn.Module, prompt: Mapping[str, Any], answer: Tensor) -> Tensor:
    """Return the logits (n, V) at each token of an answer."""
    inputs, count = _with_answer(prompt, answer), len(answer)
    with engine_of(model).reading(prompt["input_ids"], prompt.get("attention_mask")):
        logits: Tensor = model(**inputs, use_cache=False).logits[0, -count - 1 : -1].float()
    return logits


@torch.no_grad()
def _own_answer(model: Any, prompt: Mapping[str, Any]) -> Tensor:
    """Return the tokens of the greedy answer of the untouched model, its end included."""
    with api.disabled(model):
        made: Tensor = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False)
    return made[0, prompt["input_ids"].shape[1] :].clone()


def _with_answer(prompt: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """Put an answer behind a prompt of one row; what there is for every token goes on as for text."""
    ids = prompt["input_ids"]
    inputs = {**prompt, "input_ids": torch.cat([ids, answer[None].to(ids)], dim=1)}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in prompt:
            inputs[name] = functional.pad(prompt[name], (0, len(answer)), value=value)
    return inputs


def _answer_tokens(processor: Any, model: Any, text: str | None) -> Tensor | None:
    """Encode an answer and the end of the turn."""
    if text is None:
        return None
    if processor is None or not isinstance(text, str) or not text:
        raise InputError(f"an answer is a text that the processor encodes, got {shown(text)}.")
    ids = list(processor.tokenizer(text, add_special_tokens=False).input_ids)
    end = getattr(model.generation_config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    return torch.tensor([*ids, *([] if end is None else [end])], device=model.device)


def _marks(
    samples: Sequence[Any], given: Sequence[Sequence[Any] | None] | None, fit: str | None
) -> list[Callable[[], AbstractContextManager[None]]]:
    """Give for each sample what marks its regions while entered; they are checked here."""
    if given is None:
        return [nullcontext] * len(samples)
    if len(given) != len(samples):
        raise InputError(f"there are {len(samples)} samples, but regions of {len(given)}.")
    marks: list[Callable[[], AbstractContextManager[None]]] = []
    for number, (sample, own) in enumerate(zip(samples, given, strict=True)):
        pictures = None if isinstance(sample, Mapping) else sample[0]
        if pictures is not None and not isinstance(pictures, (list, tuple)):
            pictures = [pictures]
        marks.append(nullcontext if own is None else functools.partial(vtc_regions, own, pictures, fit))
        try:
            with marks[-1]():
                pass
        except InputError as error:
            raise InputError(f"sample {number}: {error}") from error
    return marks


def _projector(adapter: Adapter) -> dict[str, Tensor] | None:
    """Return the weights of the projector of a model of LLaVA 1.5's shape; None for other families."""
    if adapter.config.model_type != "llava":
        return None
    weights: dict[str, Tensor] = adapter.base.multi_modal_projector.state_dict()
    return weights


def _live_modules(model: nn.Module) -> tuple[nn.Module, LoraAdapter | None]:
    """Return what the installed method runs, with gradients: its module, and the adapter of the decoder."""
    selector: Any = engine_of(model).plan.stages[0].selector
    device = next(model.parameters()).device
    adapter = getattr(selector, "lora", None)
    parts = [part.to(device).requires_grad_(True) for part in (selector.module, adapter) if part is not None]
    return parts[0], adapter


def _trained(module: nn.Module, adapter: LoraAdapter | None) -> nn.Module:
    """Return what is trained as one module."""
    return module if adapter is None else nn.ModuleDict({"module": module, "lora": adapter})


def _save(folder: Path, modules: Modules, module: nn.Module, adapter: LoraAdapter | None) -> None:
    save_modules(folder, modules, module)
    if adapter is not None:
        save_lora(folder, adapter)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight of the model have gradients while entered."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in wanted:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)


@contextmanager
def _bar(steps: int, done: int, show: bool) -> Iterator[Callable[[float], None]]:
    """Show how far a run is, and its loss."""
    if not show:
        yield lambda loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) as bar:

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(1)

        yield advance


def _mark(
    run: TrainingRun,
    modules: Modules,
    encoded: Sequence[Mapping[str, Any]],
    tokens: Sequence[Tensor | None],
    settings: Any,
) -> str:
    """Name everything that a run depends on, but for the weights of the model."""
    mark = hashlib.sha256(repr((run, modules, settings)).encode())
    for prompt, answer in zip(encoded, tokens, strict=True):
        mark.update(repr((prompt["input_ids"].tolist(), None if answer is None else answer.tolist())).encode())
        for name in sorted(prompt):
            if name.startswith("pixel_values"):
                mark.update(prompt[name].detach().float().cpu().numpy().tobytes())
    return mark.hexdigest()
