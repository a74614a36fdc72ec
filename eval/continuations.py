"""How much a smaller cache changes long answers: the probabilities of the next token along a text that is forced.

The first word of an answer is computed before anything leaves the caches. So the model is led through a long text, the
same one with all tokens and with each method, and at every token the two distributions are compared.
"""

from __future__ import annotations

import re
import statistics as plain
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

import vtc
from eval import models, results_log, runner, seeds, statistics, tasks
from eval.conditions import conditions
from eval.models import Loaded
from eval.prompts import Opened, Prompts
from eval.results_log import ResultsLog, Row
from eval.runs import FULL
from eval.tables import to_markdown_table
from eval.tasks.base import Sample
from vtc.files import write_text
from vtc.notation import parse_stages, write_stages
from vtc.registry import get_selector

_DESCRIBED = ("scene-descriptions", "clip-descriptions")

SCOPES = ("visual", "all")
TEXTS = ("turns", "own", "reference")
"""What is forced: further questions about the picture and their right answers, compared where the answers stand; the
uncompressed model's own greedy continuation, not allowed to end; or the task's right answer."""

TASKS = {"turns": ("scenes", "clips"), "own": _DESCRIBED, "reference": _DESCRIBED}
"""Tasks for each kind of text, the usual one first."""

METHODS = ("prefixkv", "elastic-cache", "h2o", "snapkv", "streaming", "random@cache")
KEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PROFILED = "prefixkv"
"""The method whose layer budgets are found beforehand, on other pictures."""

_OTHERS = seeds.RANGES["exploring"][-1]
_IDENTITY = ("task", "model", "draw", "text", "scope", "tokens", "seed")
_PAIRS = (
    ("prefixkv", "elastic-cache"),
    ("elastic-cache", "h2o"),
    ("prefixkv", "h2o"),
    ("h2o", "random"),
    ("snapkv", "random"),
)
"""Methods whose difference is told, besides that of every method with options from the one without."""


@dataclass(frozen=True)
class Plan:
    """The arguments of one measurement, as plain values.

    Attributes
    ----------
    task, model, draw, text, scope : str
        `text` is one of `TEXTS`; `scope` says which entries may leave, for methods at the caches.
    pictures, per_picture, tokens, profile, batch_size, seed : int
        `tokens`: how many are forced, at most. `per_picture`: questions; with text "turns" the first begins the
        conversation that the others continue. `profile`: pictures on which the layer budgets of `PROFILED` are found.
    methods : tuple of str
        In the notation of `vtc.notation` without a budget.
    keep : tuple of float
    """

    task: str
    model: str
    draw: str
    text: str
    scope: str
    pictures: int
    per_picture: int
    tokens: int
    profile: int
    batch_size: int
    seed: int
    methods: tuple[str, ...]
    keep: tuple[float, ...]

    def check(self) -> None:
        """Raise ConfigError for an impossible value."""
        for name, least in (("pictures", 1), ("per_picture", 1), ("tokens", 2), ("profile", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise vtc.ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if wrong := [keep for keep in self.keep if not 0 < keep < 1]:
            raise vtc.ConfigError(f"--keep takes fractions between 0 and 1, got {', '.join(map(str, wrong))}")
        for name, value, known in (("text", self.text, TEXTS), ("scope", self.scope, SCOPES)):
            if value not in known:
                raise vtc.ConfigError(f"--{name} must be one of {', '.join(known)}, got {value!r}")
        if self.task not in TASKS[self.text]:
            raise vtc.ConfigError(f"--text {self.text} is for {' and '.join(TASKS[self.text])}, got {self.task}")
        if self.text == "turns" and self.per_picture < 2:
            raise vtc.ConfigError(f"--text turns needs at least 2 questions per picture, got {self.per_picture}")
        if self.profile and seeds.seed_of(self.draw) == _OTHERS:
            raise vtc.ConfigError(f"{self.draw} has the pictures on which --profile finds layer budgets; draw others")
        self.settings()

    def texts(self) -> list[list[Sample]]:
        """Return the questions: those of one conversation together, the first to be asked before anything is forced."""
        found = self._drawn(seeds.seed_of(self.draw), self.pictures, self.per_picture)
        if self.text != "turns":
            return [[sample] for sample in found]
        conversations = [list(part) for _, part in groupby(found, key=lambda sample: sample.group)]
        return [part for part in conversations if len(part) > 1]

    def others(self) -> list[Sample]:
        """Return a question about each of the pictures on which layer budgets are found."""
        return self._drawn(_OTHERS, self.profile, 1)

    def _drawn(self, seed: int, pictures: int, per_picture: int) -> list[Sample]:
        return list(tasks.get_task(self.task, pictures=pictures, per_picture=per_picture, seed=seed).samples(None))

    def settings(self) -> list[Setting]:
        """Return every method at every budget; those at the caches with this plan's scope.

        Raises
        ------
        ConfigError
            A method or an option does not exist.
        """
        return [Setting.of(method, keep, self.scope) for method in self.methods for keep in self.keep]


@dataclass(frozen=True)
class Setting:
    """A method at one budget; `method` is its name in tables."""

    method: str
    keep: float
    config: vtc.CompressionConfig

    @classmethod
    def of(cls, method: str, keep: float, scope: str) -> Setting:
        """Read a method in the notation without a budget."""
        (config,) = parse_stages(f"{method}={keep}")
        if isinstance(get_selector(config.method, **config.options), vtc.CacheSelector):
            config = replace(config, options={"scope": scope, **config.options})
        return cls(method.removesuffix("@cache"), keep, config)

    @property
    def name(self) -> str:
        """The name in rows."""
        return f"{self.method} {self.keep:g}"


@torch.inference_mode()
def forced(loaded: Loaded, encoded: Any, tokens: torch.Tensor, *, by_steps: bool = False) -> torch.Tensor:
    """Lead the model through `tokens` (B, T) behind the prompt; return its log-probabilities (B, T, V) before each.

    Parameters
    ----------
    loaded, encoded, tokens
    by_steps
        Read them one by one, as they would be generated, so that entries may leave in between; otherwise in one pass,
        which says the same if none do.
    """
    read = loaded.model(**encoded, use_cache=True, logits_to_keep=1)
    logits, cache, mask = [read.logits], read.past_key_values, encoded["attention_mask"]
    deltas = getattr(loaded.model.base_model, "rope_deltas", None)  # of models with positions in time and space
    for part in tokens[:, :-1].split(1 if by_steps else tokens.shape[1], dim=1):
        mask = torch.cat([mask, mask.new_ones(part.shape)], dim=1)
        columns = mask.cumsum(dim=1)[:, -part.shape[1] :] - 1
        places = {} if deltas is None else {"position_ids": (columns + deltas).expand(3, *part.shape)}
        read = loaded.model(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True, **places)
        logits.append(read.logits)
    return torch.cat(logits, dim=1).float().log_softmax(dim=-1)


@torch.inference_mode()
def continued(loaded: Loaded, encoded: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the model go on for `count` tokens, which may not end; return them (B, T) and log-probabilities (B, T, V)."""
    out = loaded.model.generate(
        **encoded,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, encoded["input_ids"].shape[1] :]
    return tokens, torch.stack(out.logits, dim=1).float().log_softmax(dim=-1)


def _forced_text(loaded: Loaded, turns: Sequence[Sample], most: int) -> tuple[list[int], list[bool]]:
    """Return the tokens that follow the prompt of the first question, and which of them are compared.

    With several questions these are the answer to each and the question behind it, and the answers are compared, with
    the token that ends them. The very first token is not: it is predicted before anything leaves the caches.
    """
    processor, first = loaded.processor, turns[0]
    if len(turns) == 1:
        tokens = processor.tokenizer(first.target, add_special_tokens=False)["input_ids"][:most]
        return tokens, [place > 0 for place in range(len(tokens))]
    media = [{"type": "image"} for _ in first.images] + [{"type": "video"}] * (first.video is not None)
    said = [(sample.question, sample.target) for sample in turns]
    prompt, text, answers = None, "", []
    for number in range(1, len(said) + 1):
        question = models.conversation(media, said[:number])
        answer = models.conversation(media, [*said[:number], ("", "")])[:-1]
        asked = processor.apply_chat_template(question, add_generation_prompt=True)
        answered = processor.apply_chat_template(answer)
        if not (asked.startswith(text) and answered.startswith(asked)):
            raise vtc.UnsupportedModelError(
                f"{loaded.name}: its chat template changes what was said before, so that no text can be forced"
            )
        text, prompt = answered, asked if prompt is None else prompt
        answers.append((len(asked) - len(prompt), len(answered) - len(prompt)))
    encoded = processor.tokenizer(text[len(prompt or "") :], add_special_tokens=False, return_offsets_mapping=True)
    compared = [any(start <= at < stop for start, stop in answers) for at, _ in encoded["offset_mapping"]]
    return encoded["input_ids"][:most], [False, *compared[1:most]]


def measure(plan: Plan, loaded: Loaded, out: Path, *, progress: bool = True) -> None:
    """Append the rows that are missing, batch by batch.

    Raises
    ------
    UnsupportedMethodError, ConfigError
        The model does not support a method.
    InputError
        The folder has rows of another measurement.
    """
    plan.check()
    settings = plan.settings()
    for setting in settings:
        with vtc.compressed(loaded.model, [setting.config]):
            pass
    settings += _profiles(plan, loaded)
    identity = {name: getattr(plan, name) for name in _IDENTITY}
    identity |= {"dtype": str(loaded.model.dtype).removeprefix("torch."), "weights": loaded.weights}
    stated = {
        **conditions(batch_size=plan.batch_size, profile=plan.profile),
        "runs": [{"name": each.name, "stages": write_stages([each.config])} for each in settings],
    }
    conversations = {turns[0].id: turns for turns in plan.texts()}
    batches = runner.split([turns[0] for turns in conversations.values()], plan.batch_size)
    total = len(conversations) * len(settings)
    with (
        ResultsLog(out / "rows.jsonl", identity, stated) as log,
        tqdm(total=total, unit="text", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for batch in batches:
            opened = [(order, sample, sample.open()) for order, sample in batch]
            for _, part in groupby(opened, key=_frames):
                for row in _rows(plan, loaded, list(part), conversations, settings, log):
                    log.add(row)
            bar.update(len(batch) * len(settings))


def _frames(each: Opened) -> int | None:
    """Return what must be equal in a batch: several families stack videos."""
    return None if each[2].video is None else len(each[2].video.frames)


def _profiles(plan: Plan, loaded: Loaded) -> list[Setting]:
    """Find the layer budgets of `PROFILED` on other pictures, for each budget; how many pictures is in their name."""
    if not plan.profile or PROFILED not in plan.methods:
        return []
    others = []
    for sample in plan.others():
        media = sample.open()
        others.append(dict(models.inputs(loaded, [sample], [media])))
    return [
        Setting(
            f"{PROFILED}, profile of {plan.profile}",  # rows of another number are those of another run
            keep,
            vtc.calibrate(
                loaded.model, None, others, keep_ratio=keep, method=PROFILED, scope=plan.scope, progress=False
            ),
        )
        for keep in plan.keep
    ]


def _rows(
    plan: Plan,
    loaded: Loaded,
    part: Sequence[Opened],
    conversations: Mapping[str, Sequence[Sample]],
    settings: Sequence[Setting],
    log: ResultsLog,
) -> Iterator[Row]:
    """Yield the rows of a batch that the log lacks, setting by setting."""
    wanted = [each for each in settings if any(not log.has(each.name, sample.id) for _, sample, _ in part)]
    if not wanted:
        return
    prompts = Prompts(loaded).of(part, FULL)
    if plan.text == "own":
        with prompts.encoding([]):
            tokens, whole = continued(loaded, prompts.inputs, plan.tokens)
        compared = torch.arange(plan.tokens, device=tokens.device).expand_as(tokens) > 0
    else:
        texts = [_forced_text(loaded, conversations[sample.id], plan.tokens) for _, sample, _ in part]
        tokens, compared = _padded(texts, loaded.model.device)
        with prompts.encoding([]):
            whole = forced(loaded, prompts.inputs, tokens)
    before = whole.gather(2, tokens[..., None])[..., 0]
    for setting in wanted:
        with prompts.encoding([replace(setting.config, seed=plan.seed)]) as model:
            found = forced(loaded, prompts.inputs, tokens, by_steps=setting.config.at == str(vtc.CacheWhileDecoding()))
            report = vtc.report(model)
        if report is None:
            raise vtc.StateError(f"{setting.name}: the model reports no prompt")
        divergence = (whole.exp() * (whole - found)).nan_to_num(0.0).sum(dim=-1)
        spoken = found.gather(2, tokens[..., None])[..., 0]
        equal = found.argmax(dim=-1) == whole.argmax(dim=-1)
        for row, (order, sample, _) in enumerate(part):
            if log.has(setting.name, sample.id):
                continue
            own = compared[row]
            yield {
                "run": setting.name,
                "sample": sample.id,
                "order": order,
                "group": sample.group if sample.group is not None else sample.id,
                "method": setting.method,
                "keep": setting.keep,
                "tokens": int(own.sum()),
                "kl": max(0.0, float(divergence[row, own].mean())),
                "equal": float(equal[row, own].float().mean()),
                "right": float((found.argmax(dim=-1) == tokens)[row, own].float().mean()),
                "whole_right": float((whole.argmax(dim=-1) == tokens)[row, own].float().mean()),
                "loss": -float(spoken[row, own].mean()),
                "whole_loss": -float(before[row, own].mean()),
                "stored": _stored(report, row),
            }


def _padded(texts: Sequence[tuple[list[int], list[bool]]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens (B, T), the last repeated where a text is shorter, and which are compared, none of those."""
    longest = max(len(tokens) for tokens, _ in texts)
    tokens = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens, _ in texts]
    compared = [compared + [False] * (longest - len(compared)) for _, compared in texts]
    return torch.tensor(tokens, device=device), torch.tensor(compared, device=device)


def _stored(report: Any, row: int) -> float:
    """Return the share of the prompt's entries that the caches hold after the prefill."""
    layers = report.stored_per_layer or report.lengths_per_layer
    return float(plain.fmean(layer[row] for layer in layers) / report.lengths_before[row])


def tables(folder: Path) -> tuple[pd.DataFrame, str]:
    """Return what the rows of a folder say: a line for each method and budget, and the same as text.

    All lines are about the same texts: those that every method at every budget was led through.

    Raises
    ------
    InputError
        There are no such texts.
    """
    headers, rows = results_log.read(folder)
    by_run = runner.rows_by_run(rows)
    shared = set.intersection(*({row["sample"] for row in part} for part in by_run.values())) if by_run else set()
    if not shared:
        raise vtc.InputError(f"{folder}: no text was finished with every method; go on with the same command")
    by_run = {name: [row for row in part if row["sample"] in shared] for name, part in by_run.items()}
    lines = []
    for name, part in by_run.items():
        groups = [row["group"] for row in part]
        low, high = statistics.interval([row["kl"] for row in part], groups)
        lines.append(
            {
                "run": name,
                "method": part[0]["method"],
                "keep": part[0]["keep"],
                "kl": plain.fmean(row["kl"] for row in part),
                "low": low,
                "high": high,
                "equal": plain.fmean(row["equal"] for row in part),
                "right": plain.fmean(row["right"] for row in part),
                "loss": plain.fmean(row["loss"] for row in part),
                "whole_loss": plain.fmean(row["whole_loss"] for row in part),
                "stored": plain.fmean(row["stored"] for row in part),
                "texts": len(part),
            }
        )
    frame = pd.DataFrame(lines)
    return frame, _markdown(frame, by_run, headers)


def _markdown(frame: pd.DataFrame, by_run: dict[str, list[Row]], headers: Sequence[Row]) -> str:
    identity, stated = headers[-1]["identity"], headers[-1]["conditions"]
    budgets = sorted(frame["keep"].unique())
    header = ["method", *(f"{100 * keep:.0f} %" for keep in budgets)]
    texts = f"{len(next(iter(by_run.values())))} texts with {_mean_length(by_run):.0f} such tokens on average"
    whole = plain.fmean(row["whole_right"] for row in next(iter(by_run.values())))
    parts = [f"# {identity['task']}, {identity['model']}, scope {identity['scope']}, text {identity['text']}"]
    for column, digits, title in (
        ("kl", 3, f"Mean KL divergence from the model with all tokens, in nats per compared token; {texts}"),
        ("equal", 3, "Share of these tokens at which the most probable one is the same"),
        ("right", 3, f"Share at which the most probable token is the one of the text; {whole:.3f} with all tokens"),
        ("stored", 3, "Share of the prompt's entries that the caches hold after the prefill"),
    ):
        table = [
            [method, *(_cell(frame, method, keep, column, digits) for keep in budgets)]
            for method in dict.fromkeys(frame["method"])
        ]
        parts += [f"## {title}", to_markdown_table(header, table)]
    parts += ["## Differences of the divergence, with 95 % intervals (pictures resampled)"]
    pairs = [
        [f"{a} - {b}", *(_difference(by_run, a, b, keep) for keep in budgets)]
        for a, b in _pairs(list(dict.fromkeys(frame["method"])))
    ]
    parts += [to_markdown_table(header, pairs)] if pairs else []
    parts += [
        f"Command: `{stated['command']}`",
        f"{stated['cpu']}, {stated['threads']} threads, {identity['dtype']}; python {stated['python']}, "
        f"torch {stated['torch']}, transformers {stated['transformers']}, vtc {stated['vtc']} ({stated['git']}), "
        f"weights {identity['weights']}.",
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return the methods to compare: the usual pairs, and each one that has options with the one that has none."""
    pairs = [pair for pair in _PAIRS if set(pair) <= set(methods)]
    plain_of = {method: re.split(r"[(,]", method)[0] for method in methods}
    return pairs + [(method, base) for method, base in plain_of.items() if base != method and base in methods]


def _mean_length(by_run: dict[str, list[Row]]) -> float:
    return plain.fmean(row["tokens"] for row in next(iter(by_run.values())))


def _cell(frame: pd.DataFrame, method: str, keep: float, column: str, digits: int) -> str:
    found = frame[(frame["method"] == method) & (frame["keep"] == keep)]
    return f"{found[column].iloc[0]:.{digits}f}" if len(found) else "-"


def _difference(by_run: dict[str, list[Row]], a: str, b: str, keep: float) -> str:
    """Return the mean of a's divergence minus b's, and its interval."""
    first, second = (sorted(by_run.get(f"{name} {keep:g}", ()), key=lambda row: row["order"]) for name in (a, b))
    if not (first and second):
        return "-"
    theirs, ours = ([row["kl"] for row in each] for each in (second, first))
    mean, (low, high), _ = statistics.paired(theirs, ours, [row["group"] for row in first])
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def write(folder: Path) -> str:
    """Write table.md and table.csv; return the former."""
    frame, text = tables(folder)
    write_text(folder / "table.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_text(folder / "table.md", text)
    return text
