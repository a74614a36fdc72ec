"""Train ATP-LLaVA's thresholds on the reference model.

    python -m eval.train_atp --cache cache/ --out atp.pt

Tower features come from `python -m eval.reference.train cache`. The model is frozen (the paper's cheaper variant); only
the modules after the decoder layers are trained, which compute two thresholds per image and layer from the scores. The
loss is the sum of the answer loss, the depth loss and the target loss.

Masks are binary in the forward pass, as they are in use, and have the slope of the paper's soft mask in the backward
pass (a straight-through estimator). At the paper's temperature of 10 the soft masks of tokens near the threshold are
about one half, so their sum, which the target loss compares, is not the number of tokens that the compressed model
keeps. ``--soft`` uses the soft masks in the forward pass as well, as in the paper. Later layers do not attend to a
dropped token; attention is renormalised as in DynamicViT. One forward pass covers all tokens, so images that keep
different numbers of tokens need no packing.

Source: arXiv 2412.00447, section 3; losses and their weights as secondary sources state them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc.reference
from eval.reference.train.__main__ import PRACTICE, Data
from eval.reference.train.packing import IGNORE, PackedText, Packer
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.vocabulary import GRID
from vtc import ModelShape
from vtc.files import check_writable
from vtc.selectors.atp import (
    AtpModule,
    AtpSelector,
    depth_loss,
    redundancy_score,
    save_modules,
    soft_mask,
    spatial_score,
    target_loss,
)

_ATTENTION = "vtc-eval-gated"
_TEXT = 40  # tokens per question and answer


def gated_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention (B, H, L, d) with probabilities multiplied by `gate` (B, L), if given, and renormalised.

    A query always attends to itself. The probabilities, averaged over heads, are appended to `record`.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(dim=-1)
    gate = kwargs["gate"]
    if gate is not None:
        own = torch.eye(gate.shape[1], dtype=torch.bool, device=gate.device)
        weights = weights * gate[:, None, None, :].masked_fill(own, 1.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
    kwargs["record"].append(weights.mean(dim=1))
    return (weights @ value).transpose(1, 2).contiguous(), None


class Gated:
    """A frozen LLaVA whose decoder runs layer by layer, with a differentiable selection of tokens in between.

    Parameters
    ----------
    model : LlavaForConditionalGeneration
        Has `GRID` x `GRID` tokens of one image after the first token of the prompt. Its attention implementation is
        changed.
    modules : sequence of AtpModule
        One for each stage.
    options : AtpSelector
        Defines layers, stride and scale of scores; its thresholds are not used.
    temperature : float
        Temperature of the soft masks.
    soft : bool
        Use soft masks in the forward pass; otherwise binary ones with their slope.
    """

    first = 1
    """Position of the first visual token."""

    def __init__(
        self,
        model: Any,
        modules: Sequence[AtpModule],
        options: AtpSelector,
        temperature: float = 10.0,
        soft: bool = False,
    ) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, gated_attention)
        self.model, self.modules, self.options = model.requires_grad_(False), modules, options
        self.temperature, self.soft = temperature, soft
        self.decoder = model.model.language_model
        self.decoder.config._attn_implementation = _ATTENTION
        self.layers = places(model, options)
        row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        zero, size = torch.zeros(GRID**2, dtype=torch.long), torch.full((GRID**2,), GRID)
        self.origin = torch.stack([zero, zero, row.flatten(), column.flatten(), size, size], dim=1)

    def __call__(self, features: Tensor, text: PackedText) -> tuple[Tensor, list[Tensor]]:
        """Answer one question about each image.

        Parameters
        ----------
        features : Tensor (B, N, Dv)
            Tower features.
        text : PackedText
            One question per row.

        Returns
        -------
        logits : Tensor (M, vocabulary)
            At the positions of `text.labels`.
        masks : list of Tensor (B, N)
            Mask of the kept tokens after each stage, with the slope of the soft mask.
        """
        embed = self.model.get_input_embeddings()
        bos = embed(torch.full((len(features), 1), self.decoder.config.bos_token_id))
        hidden = torch.cat([bos, self.model.model.multi_modal_projector(features), embed(text.ids)], dim=1)
        length, begin = hidden.shape[1], self.first + len(self.origin)
        labelled = text.labels != IGNORE
        # The last token of the question predicts the first of the answer; later answer tokens are not queries.
        asking = functional.pad((text.segments > 0) & (labelled.cumsum(dim=1) <= 1), (begin, 0)).to(hidden.dtype)
        causal = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        rotary = self.decoder.rotary_emb(hidden, torch.arange(length)[None])
        gate, left, masks = None, hidden.new_ones(len(hidden), len(self.origin)), []
        for index, layer in enumerate(self.decoder.layers):
            record: list[Tensor] = []
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, gate=gate, record=record)
            if index in self.layers:
                to_visual = record[0][:, :, self.first : begin]
                s_self = _average(to_visual[:, self.first : begin], left) * left
                s_cross = _average(to_visual, asking) * left
                left = left * self._choose(len(masks), s_self, s_cross, left)
                masks.append(left)
                gate = functional.pad(left, (self.first, length - begin), value=1.0)
        return self.model.lm_head(self.decoder.norm(hidden)[:, begin:][labelled]), masks

    @torch.autocast("cpu", enabled=False)
    def _choose(self, place: int, s_self: Tensor, s_cross: Tensor, left: Tensor) -> Tensor:
        """Return the mask (B, N) of what `AtpSelector.select` keeps of `left`, with the slope of the soft mask."""
        theta_r, theta_s = self.modules[place](s_self, s_cross, self.origin)
        redundancy = redundancy_score(s_self, s_cross, self.options.scale, count=left.sum(dim=-1, keepdim=True))
        stride = self.options.stride
        stride = stride[place] if isinstance(stride, tuple) else stride
        spatial = spatial_score(self.origin, stride, self.options.lambda_sample).expand_as(redundancy)
        soft = soft_mask(redundancy, spatial, theta_r, theta_s, self.temperature)
        if self.soft:
            return soft
        above = torch.maximum(redundancy - theta_r[:, None], spatial - theta_s[:, None])
        above = above.masked_fill(left == 0, -torch.inf)
        hard = (above > 0) | (above == above.amax(dim=1, keepdim=True))  # at least one stays
        return hard.to(soft.dtype) + soft - soft.detach()


def places(model: Any, options: AtpSelector) -> tuple[int, ...]:
    """Return the decoder layers after which tokens are dropped."""
    return options.resolve(ModelShape(len(model.model.language_model.layers)), None).layers or ()


def _average(attention: Tensor, weights: Tensor) -> Tensor:
    """Average the rows of `attention` (B, Q, N) with `weights` (B, Q); returns (B, N)."""
    return (attention * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)


def questions(packer: Packer, data: Data, indices: np.ndarray, seed: int) -> PackedText:
    """Return one question about each of these scenes; each seed asks others."""
    text = packer.pack([ask(data.scenes[int(index)], 1, kinds=PRACTICE, seed=seed) for index in indices])
    longest = int((text.segments > 0).sum(dim=1).max())
    cut = {name: getattr(text, name)[:, :longest] for name in ("ids", "labels", "positions", "segments")}
    return dataclasses.replace(text, **cut)


def train(gated: Gated, packer: Packer, data: Data, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Train the modules of `gated`; returns losses and kept tokens of every step."""
    parameters = [parameter for module in gated.modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps, eta_min=arguments.rate / 20)
    chance, target = np.random.default_rng(arguments.seed), arguments.target * GRID**2
    history: list[dict[str, float]] = []
    began = time.time()
    for step in range(arguments.steps):
        indices = chance.integers(len(data.scenes), size=arguments.batch)
        text = questions(packer, data, indices, seed=1 + step)
        with torch.autocast("cpu", torch.bfloat16):
            logits, masks = gated(data.batch(indices)[:, 0].float(), text)
        answer = functional.cross_entropy(logits.float(), text.labels[text.labels != IGNORE])
        depth, missed = depth_loss(masks, gated.layers), target_loss(masks, target)
        loss = answer + arguments.depth_weight * depth + arguments.target_weight * missed
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        kept = torch.stack(masks).detach().sum(dim=-1)  # (places, B)
        history.append(
            {
                "answer": answer.item(),
                "loss": loss.item(),
                "kept": kept.mean().item(),
                "spread": kept.mean(dim=0).std().item(),
            }
        )
        if step % 50 == 49:
            means = {name: np.mean([seen[name] for seen in history[-50:]]) for name in history[-1]}
            numbers = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
            print(f"step {step + 1}, {time.time() - began:.0f} s, target {target:.0f}: {numbers}", flush=True)
    return history


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of cached training scenes")
    parser.add_argument("--out", type=Path, required=True, help="file for the modules")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=16, help="of the modules' hidden layer")
    parser.add_argument("--target", type=float, default=0.25, help="share of tokens kept, averaged over the stages")
    parser.add_argument("--target-weight", type=float, default=0.2)
    parser.add_argument("--depth-weight", type=float, default=0.01, help="sources differ: 0.01 and 0.05")
    parser.add_argument("--temperature", type=float, default=10.0, help="sources differ: 10 and 100")
    parser.add_argument("--soft", action="store_true", help="use soft masks in the forward pass")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    check_writable(arguments.out)
    torch.manual_seed(arguments.seed)
    model, processor = vtc.reference.load("llava")
    options = AtpSelector()
    modules = [AtpModule(GRID, arguments.width) for _ in places(model, options)]
    gated = Gated(model, modules, options, arguments.temperature, arguments.soft)
    data = Data.load("train", arguments.cache)
    train(gated, Packer(processor.tokenizer, gated.first + GRID**2, _TEXT), data, arguments)
    save_modules(modules, arguments.out)


if __name__ == "__main__":
    main()
