"""An independent answer to "what should the compressed model say?".

The reference is the untouched model, run at full length on the same inputs with the same position ids, with
`attention_mask = 0` where a token was dropped before the language model, and with the same columns hidden from
decoder layer k on where it was dropped there. It shares no code with the engine. All it takes from it is the public
report: which tokens of which image were kept.

Nothing here depends on how a family merges images or computes rotary positions: the model's own methods are asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.core.sites import DecoderLayer
from vtc.engine.cache import CACHE, cache_in

Inputs = dict[str, Any]

BEFORE_LM = -1
"""Key of the stage before the language model, where decoder stages have their layer."""


# -------------------------------------------------------------------------------------------- reading the report


def stage_of(site: Any) -> int:
    """The decoder layer of a site of the report, or `BEFORE_LM`: for the decoder, what left in the tower left there."""
    return int(site.layer) if isinstance(site, DecoderLayer) else BEFORE_LM


def text_model(model: Any) -> Any:
    """The decoder, found through transformers' own accessor, below any PEFT wrapper."""
    return model.get_base_model().get_decoder() if hasattr(model, "get_base_model") else model.get_decoder()


def placeholder_id(model: Any, modality: str) -> int:
    """Token id that stands for an image (or a video) in prompts that have no other visuals."""
    # GLM-4.1V has one for both; its `video_token_id` is never in a prompt.
    return getattr(model.config, f"{'image' if model.config.model_type.startswith('glm4') else modality}_token_id")


def placeholder_columns(model: Any, input_ids: Tensor, row: int, modality: str) -> Tensor:
    """Columns of a row that hold image (or video) tokens, in order."""
    return (input_ids[row] == placeholder_id(model, modality)).nonzero().flatten()


def merged_embeddings(model: Any, inputs: Inputs) -> Tensor:
    """`inputs_embeds (B, L, D)` that the untouched model hands to its decoder."""
    seen: list[Tensor] = []
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def structural_columns(model: Any, inputs: Inputs) -> Tensor:
    """(B, L) bool: placeholder columns that hold no patch: learned newlines, the [CLS] of every Video-LLaVA frame."""
    ids = inputs["input_ids"]
    structural = torch.zeros_like(ids, dtype=torch.bool)
    if model.config.model_type == "video_llava":
        vision = model.config.vision_config
        frame = (vision.image_size // vision.patch_size) ** 2 + 1
        for row in range(len(ids)):
            structural[row, placeholder_columns(model, ids, row, "video")[::frame]] = True
    newline = getattr(model.model, "image_newline", None)
    if newline is not None:
        structural |= (merged_embeddings(model, inputs) == newline).all(-1)
    return structural


def keep_masks(model: Any, inputs: Inputs, report: Any) -> dict[int, Tensor]:
    """What is still there after each stage.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The untouched model.
    inputs : dict
        What the compressed model was called with.
    report : vtc.Report
        Its report of that call.

    Returns
    -------
    dict of int to (B, L) bool
        Stage (`BEFORE_LM` or a decoder layer, ascending) to the columns left from there on; padding counts as left.
    """
    ids = inputs["input_ids"]
    structural = structural_columns(model, inputs)
    stages = sorted({stage_of(site) for s in report.segments for site, _ in s.selections})
    masks = {stage: torch.ones_like(ids, dtype=torch.bool) for stage in stages}
    drop_structural = any(config.structural == "drop" for config in report.configs)

    taken: dict[tuple[int, str], int] = {}
    for segment in sorted(report.segments, key=lambda s: (s.row, s.index)):
        columns = placeholder_columns(model, ids, segment.row, segment.modality)
        start = taken.get((segment.row, segment.modality), 0)
        taken[segment.row, segment.modality] = start + segment.tokens_before
        columns = columns[start : start + segment.tokens_before]
        assert len(columns) == segment.tokens_before, "segments claim more tokens than the prompt holds"

        is_structural = structural[segment.row, columns]
        assert int(is_structural.sum()) == segment.structural, "segment and model disagree about newline tokens"
        always = columns[:0] if drop_structural else columns[is_structural]
        left = columns[~is_structural]
        for site, selection in segment.selections:
            assert selection.n == len(left), "a selection speaks about the tokens that entered its stage"
            left = left[selection.keep]
            # The newlines of an image go with its last token.
            kept = torch.cat([always, left]).sort().values if len(left) else left
            stage = stage_of(site)
            for later in stages:
                if later >= stage:
                    masks[later][segment.row, columns] = False
                    masks[later][segment.row, kept] = True
        assert torch.equal(columns[segment.kept], kept), "kept indices and selections disagree"
    for (row, modality), n in taken.items():
        total = len(placeholder_columns(model, ids, row, modality))
        assert n == total, f"row {row}: {modality} segments cover {n} of {total} tokens"
    return masks


# ---------------------------------------------------------------------------------------------- the masked model


@dataclass(frozen=True, eq=False)
class Merge:
    """Tokens of one row that are averages of others when they come to the language model, or to one of its layers."""

    row: int
    columns: Tensor
    """(N,) columns of the scorable tokens of the segment that are left there."""
    selection: Any
    """Over those, with `assign`."""
    stage: int = BEFORE_LM


def merges(model: Any, inputs: Inputs, report: Any) -> list[Merge]:
    """What merging methods did before the language model and inside it."""
    found: list[Merge] = []
    if not any(selection.assign is not None for s in report.segments for _, selection in s.selections):
        return found
    structural = structural_columns(model, inputs)
    taken: dict[tuple[int, str], int] = {}
    for segment in sorted(report.segments, key=lambda s: (s.row, s.index)):
        columns = placeholder_columns(model, inputs["input_ids"], segment.row, segment.modality)
        start = taken.get((segment.row, segment.modality), 0)
        taken[segment.row, segment.modality] = start + segment.tokens_before
        columns = columns[start : start + segment.tokens_before]
        left = columns[~structural[segment.row, columns]]
        before = [selection for site, selection in segment.selections if stage_of(site) == BEFORE_LM]
        if before:
            whole = before[0]
            for selection in before[1:]:
                whole = whole.then(selection)
            found.append(Merge(segment.row, left, whole))
            left = left[whole.keep]
        for site, selection in segment.selections:
            if stage_of(site) != BEFORE_LM:
                if selection.assign is not None:
                    found.append(Merge(segment.row, left, selection, stage_of(site)))
                left = left[selection.keep]
    return found


@contextlib.contextmanager
def merging(model: Any, plan: Sequence[Merge], rows: int) -> Iterator[None]:
    """Replace embeddings, or what enters a layer, by averages, in forwards that bring the whole prompt of `rows`."""
    longest = max((int(merge.columns.max()) for merge in plan), default=0)

    def hook(some: Sequence[Merge]) -> Any:
        def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            values = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
            if values.shape[1] <= longest:
                return args, kwargs
            repeats, merged = len(values) // rows, values.clone()
            for merge in some:
                for row in range(merge.row * repeats, (merge.row + 1) * repeats):
                    means = merge.selection.merge(values[row, merge.columns])
                    merged[row, merge.columns[merge.selection.keep]] = means
            if "inputs_embeds" in kwargs:
                return args, {**kwargs, "inputs_embeds": merged}
            return (merged, *args[1:]), kwargs

        return replace

    text = text_model(model)
    handles = []
    try:
        for stage in {merge.stage for merge in plan}:
            module = text if stage == BEFORE_LM else text.layers[stage]
            some = [merge for merge in plan if merge.stage == stage]
            handles.append(module.register_forward_pre_hook(hook(some), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def hidden_from_layer(model: Any, keep_by_layer: dict[int, Tensor]) -> Iterator[None]:
    """Hide columns from decoder layer k on, by editing the mask that each layer gets and nothing else."""
    layers = text_model(model).layers
    handles = []

    def pre_hook(index: int, keep: Tensor) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = _causal(hidden, cache_in(kwargs), index)
            # Beams and returned sequences repeat the rows; answers and later turns append columns.
            columns = keep.repeat_interleave(hidden.shape[0] // keep.shape[0], dim=0)
            columns = torch.nn.functional.pad(columns, (0, max(0, mask.shape[-1] - columns.shape[1])), value=True)
            columns = columns[:, None, None, : mask.shape[-1]]
            # A dropped token may go on seeing itself: nobody else does, and a query that sees nothing is undefined.
            past = mask.shape[-1] - mask.shape[-2]
            columns = columns | torch.eye(mask.shape[-2], mask.shape[-1], dtype=torch.bool).roll(past, 1)
            if mask.dtype == torch.bool:
                mask = mask & columns
            else:
                mask = mask.masked_fill(~columns, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    starts = sorted(keep_by_layer)
    try:
        for index, layer in enumerate(layers):
            start = max((s for s in starts if s <= index), default=None)
            if start is not None:
                hook = pre_hook(index, keep_by_layer[start])
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _causal(hidden: Tensor, cache: Any, layer: int) -> Tensor:
    """The bool mask that sdpa stands for when transformers passes None."""
    past = 0 if cache is None else int(cache.get_seq_length(layer))
    rows, length = hidden.shape[:2]
    query = torch.arange(past, past + length, device=hidden.device)
    key = torch.arange(past + length, device=hidden.device)
    return (key[None, :] <= query[:, None]).expand(rows, 1, -1, -1)


@dataclass(frozen=True, eq=False)
class Reference:
    """The untouched model, masked as a compressed call was.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Untouched, with the weights of the compressed one.
    inputs : dict
        What the compressed model was called with.
    keep : dict of int to (B, L) bool
        From `keep_masks`.
    merges : list of Merge
        From `merges`.
    """

    model: Any
    inputs: Inputs
    keep: dict[int, Tensor]
    merges: Sequence[Merge] = ()

    @classmethod
    def of(cls, model: Any, inputs: Inputs, report: Any) -> Reference:
        return cls(model, inputs, keep_masks(model, inputs, report), merges(model, inputs, report))

    @property
    def visible(self) -> Tensor:
        """(B, L) bool: real tokens that the last layer still holds."""
        seen = self.inputs["attention_mask"].bool()
        return seen & self.keep[max(self.keep)] if self.keep else seen

    @property
    def attention_mask(self) -> Tensor:
        """(B, L) long: the prompt's mask, 0 also where a token was dropped before the language model."""
        mask = self.inputs["attention_mask"]
        return mask * self.keep[BEFORE_LM] if BEFORE_LM in self.keep else mask

    def generation_inputs(self) -> Inputs:
        """Arguments for `generate()`: masked, with the position ids of the unmasked prompt."""
        positions = self.model._prepare_position_ids_for_generation(self.inputs["input_ids"], dict(self.inputs))
        return {**self.inputs, "attention_mask": self.attention_mask, "position_ids": positions}

    def forward_inputs(self) -> Inputs:
        """Arguments for a bare `forward()`; position ids only where the model would compute them from the mask."""
        inputs = {**self.inputs, "attention_mask": self.attention_mask}
        if hasattr(self.model.model, "get_rope_index") and any(key.endswith("grid_thw") for key in inputs):
            inputs["position_ids"] = self.model.model.get_rope_index(**_rope_arguments(self.inputs))[0]
        return inputs

    @contextlib.contextmanager
    def masked(self) -> Iterator[None]:
        """While entered, the model also hides what decoder stages dropped, and sees merged tokens as merged."""
        inside = {layer: keep for layer, keep in self.keep.items() if layer != BEFORE_LM}
        rows = len(self.inputs["input_ids"])
        with hidden_from_layer(self.model, inside), merging(self.model, self.merges, rows):
            yield

    def prefill(self, **kwargs: Any) -> Any:
        """Output of one bare forward; with gradients if they are enabled."""
        with self.masked():
            return self.model(**self.forward_inputs(), **kwargs)

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> Any:
        """Output of `generate()` in any of its modes."""
        with self.masked():
            return self.model.generate(**self.generation_inputs(), **kwargs)

    @torch.no_grad()
    def logits_along(self, tokens: Tensor) -> Tensor:
        """Teacher-forced cached decoding with a plain loop of forwards.

        Parameters
        ----------
        tokens : (B, n) long
            The answer to follow.

        Returns
        -------
        (B, n, V)
            Logits that predict each of the tokens: the first from the prefill, the others from cached steps.
        """
        inputs = self.generation_inputs()
        mask, positions = inputs["attention_mask"], inputs["position_ids"]
        if positions.dim() == 3:
            positions = positions[1:]  # the leading text axis exists in generate() only
        inputs["position_ids"] = positions + 1 if self._one_based else positions
        logits = []
        with self.masked():
            out = self.model(**inputs, use_cache=True)
            logits.append(out.logits[:, -1])
            for step in range(tokens.shape[1] - 1):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                out = self.model(
                    input_ids=tokens[:, step : step + 1],
                    attention_mask=mask,
                    position_ids=inputs["position_ids"][..., -1:] + 1 + step,
                    **{CACHE: out[CACHE]},
                    use_cache=True,
                )
                logits.append(out.logits[:, -1])
        return torch.stack(logits, dim=1)

    @torch.no_grad()
    def logits_at_once(self, tokens: Tensor) -> Tensor:
        """`logits_along` without a cache: one forward over the left-padded prompt and its answer."""
        inputs = self.generation_inputs()
        length, n = inputs["input_ids"].shape[1], tokens.shape[1] - 1
        positions = inputs["position_ids"]
        positions = positions[1:] if positions.dim() == 3 else positions
        following = positions[..., -1:] + 1 + torch.arange(n)
        inputs["position_ids"] = torch.cat([positions, following], dim=-1) + int(self._one_based)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, n), value=value)
        with self.masked():
            return self.model(**inputs, use_cache=False).logits[:, length - 1 :]

    @property
    def _one_based(self) -> bool:
        return self.model.config.model_type == "paligemma"


def _rope_arguments(inputs: Inputs) -> Inputs:
    names = (
        "input_ids",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "attention_mask",
        "second_per_grid_ts",
    )
    return {name: inputs[name] for name in names if name in inputs}


# ----------------------------------------------------------------------- reference for linear-attention decoders


@torch.no_grad()
def logits_of_packed_rows(model: Any, inputs: Inputs, keep: Tensor, tokens: Tensor) -> Tensor:
    """Logits of a model that never had the dropped tokens: every row alone, without padding, through the decoder.

    A linear-attention layer lets a masked token decay its state, so hiding a token is not the same as not having
    it. This is the reference for such decoders, and only for stages before the language model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Untouched.
    inputs : dict
        What the compressed model was called with.
    keep : (B, L) bool
        Columns left before the language model.
    tokens : (B, n) long
        The answer to follow.

    Returns
    -------
    (B, n, V)
    """
    embeds = merged_embeddings(model, inputs)
    positions = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    decoder, embed = text_model(model), model.get_input_embeddings()
    keep = keep & inputs["attention_mask"].bool()
    rows: list[Tensor] = []
    for row in range(len(tokens)):
        row_positions = positions[..., row : row + 1, :][..., keep[row]]
        last = row_positions[..., -1:]
        answer = tokens[row : row + 1, :-1]
        x, logits, cache, seen = embeds[row : row + 1, keep[row]], [], None, int(keep[row].sum())
        for step in range(tokens.shape[1]):
            if step:
                x, row_positions = embed(answer[:, step - 1 : step]), last + step
                seen += 1
            mask = torch.ones(1, seen, dtype=torch.long)
            out = decoder(
                inputs_embeds=x, attention_mask=mask, position_ids=row_positions, use_cache=True, **{CACHE: cache}
            )
            cache = out[CACHE]
            logits.append(model.lm_head(out.last_hidden_state[:, -1]))
        rows.append(torch.stack(logits, dim=1))
    return torch.cat(rows)


# ----------------------------------------------------------------------------------------------------- comparing


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where one side is not finite, so that NaN never passes."""
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.detach().double()).abs()
    return float(torch.where(difference.isfinite(), difference, torch.inf).max()) if difference.numel() else 0.0


def stacked_logits(generated: Any) -> Tensor:
    """(B, n, V) of `generate(..., output_logits=True)`."""
    return torch.stack(generated.logits, dim=1)


def answers(generated: Any, inputs: Sequence[int] | Inputs) -> Tensor:
    """(B, n) tokens after the prompt."""
    prompt = inputs["input_ids"].shape[1] if isinstance(inputs, dict) else len(inputs)
    return generated.sequences[:, prompt:]
