"""Train the thresholds of Adaptive Sparse ViT on the tower of the reference model.

    python -m eval.train_asvit --out asvit.json

The tower is frozen; three numbers are trained, the thresholds. All tokens stay in the batch; a mask on the keys, binary
in the forward pass and with the slope of a sigmoid in the backward pass, says which of them the layers behind a place
still see. The loss has two parts: how far the arithmetic of the tower is from the share that was asked for, and how far
its features, [CLS] and the patches that stay, turn away from those of the tower with all tokens. No labels are needed;
pictures are drawn scenes. The paper trains the whole network, with labels and a teacher.

What comes out is a configuration for `vtc.compress`. Beside it stands what needs no training: the initial thresholds,
and the same times one number that meets the same share, found by bisection (`vtc.tuning.tower`). All three are compared
on pictures that no training saw.

Source: arXiv 2209.13802 and its code; equations as in `vtc.selectors.adaptive_sparse_vit`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc.reference
from eval.tasks.scenes.scene import make_scene
from vtc import CompressionConfig, ModelShape
from vtc.files import check_writable, write_text
from vtc.selectors.adaptive_sparse_vit import (
    AdaptiveSparseVitSelector,
    arithmetic_share,
    masked_attention,
    straight_through,
    token_scores,
)
from vtc.tuning.tower import fit_multiplier

_ATTENTION = "vtc-eval-masked"
_ANY_NUMBER = 2**31 - 1


class Masked:
    """A frozen tower whose layers see fewer and fewer tokens, differentiably in the thresholds.

    Parameters
    ----------
    tower : Dinov2Model
        Its attention implementation is changed.
    feature_layer : int
        Layer (0-based) whose output makes the features.
    tau : float
        Temperature of the masks.
    """

    def __init__(self, tower: Any, feature_layer: int, tau: float = 1e-4) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, self._attention)
        tower.config._attn_implementation = _ATTENTION
        self.tower, self.blocks, self.tau = tower.requires_grad_(False), tower.encoder.layer, tau
        self.feature_layer, self.width = feature_layer, tower.config.hidden_size
        shape = ModelShape(1, len(self.blocks), feature_layer)
        method = AdaptiveSparseVitSelector().resolve(shape, None)
        self.layers, self.initial = method.layers or (), torch.tensor(method.thresholds)
        self._mask: Tensor | None = None
        self._scores: Tensor | None = None

    def _attention(self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention = masked_attention(query, key, kwargs["scaling"], self._mask)
        self._scores = token_scores(attention, value)
        return (attention @ value).transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def begin(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers in front of the first place, which no threshold touches: (B, N, D) and scores (B, N - 1)."""
        hidden, self._mask = self.tower.embeddings(pixels), None
        for block in self.blocks[: self.layers[0]]:
            hidden = _output(block(hidden))
        assert self._scores is not None  # noqa: S101
        return hidden, self._scores

    @torch.no_grad()
    def full(self, hidden: Tensor) -> Tensor:
        """Run the other layers with all tokens, up to the features (B, N, D)."""
        self._mask = None
        for block in self.blocks[self.layers[0] : self.feature_layer + 1]:
            hidden = _output(block(hidden))
        return hidden

    def __call__(self, hidden: Tensor, scores: Tensor, thresholds: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the other layers with the thresholds (places,), as multiples of 1 / N.

        Returns
        -------
        features : Tensor (B, N, D)
        masks : list of Tensor (B, N)
            Of every place, [CLS] included.
        share : Tensor (B,)
            Of the arithmetic of the tower.
        """
        self._mask, self._scores = None, scores
        patches, masks, tokens = scores.shape[1], [], [torch.tensor(float(hidden.shape[1]))] * self.layers[0]
        for index in range(self.layers[0], len(self.blocks)):
            if index in self.layers:
                mask = straight_through(self._scores, thresholds[len(masks)] / patches, self.tau)
                self._mask = functional.pad(mask, (1, 0), value=1.0)
                masks.append(self._mask)
            tokens.append(masks[-1].sum(dim=1))
            if index <= self.feature_layer:
                hidden = _output(self.blocks[index](hidden))
        self._mask = None
        return hidden, masks, arithmetic_share(tokens, self.width, hidden.shape[1])


def _output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def turned(ours: Tensor, full: Tensor, mask: Tensor) -> Tensor:
    """(B,): one minus the cosine of features (B, N, D) with `full`, of [CLS] plus the mean of patches that stay."""
    away = 1 - functional.cosine_similarity(ours, full, dim=-1)
    kept = mask[:, 1:]
    return away[:, 0] + (away[:, 1:] * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def pictures(split: Any, seed: int, count: int) -> list[Any]:
    """Draw scenes."""
    return [make_scene(split, seed, index).image for index in range(count)]


def pixels_of(processor: Any, images: Sequence[Any]) -> Tensor:
    """Return what the tower is given of these pictures, (B, 3, H, W)."""
    return processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]


def train(masked: Masked, pixels: Tensor, arguments: argparse.Namespace) -> tuple[Tensor, list[dict[str, Any]]]:
    """Train the thresholds; return them as multiples of 1 / N, and losses and shares of every step."""
    count = pixels.shape[-1] // masked.tower.config.patch_size * (pixels.shape[-2] // masked.tower.config.patch_size)
    # Trained are the thresholds themselves, not their multiples: a step is then about as long as in the paper.
    theta = (masked.initial / count).clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=arguments.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps, eta_min=arguments.rate / 10)
    chance = torch.Generator().manual_seed(arguments.seed)
    history: list[dict[str, Any]] = []
    began = time.time()
    for step in range(arguments.steps):
        hidden, scores = masked.begin(pixels[torch.randperm(len(pixels), generator=chance)[: arguments.batch]])
        ours, masks, share = masked(hidden, scores, theta * count)
        away = turned(ours, masked.full(hidden), masks[-1]).mean()
        missed = (share.mean() - arguments.share).abs()
        loss = arguments.share_weight * missed + away
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            theta.clamp_(min=0)
        multiples = [round(float(value) * count, 4) for value in theta.detach()]
        history.append(
            {"loss": loss.item(), "share": share.mean().item(), "away": away.item(), "thresholds": multiples}
        )
        if step % 10 == 9:
            means = ", ".join(f"{name} {sum(h[name] for h in history[-10:]) / 10:.4f}" for name in ("share", "away"))
            print(f"step {step + 1}, {time.time() - began:.0f} s: {means}, thresholds {multiples}", flush=True)
    return (theta * count).detach(), history


@torch.no_grad()
def measure(masked: Masked, pixels: Tensor, thresholds: Tensor, batch: int = 8) -> dict[str, Any]:
    """Measure the share, the features, and how many patches stay at the last place, over pictures."""
    shares, away, kept = [], [], []
    for part in pixels.split(batch):
        hidden, scores = masked.begin(part)
        ours, masks, share = masked(hidden, scores, thresholds)
        shares.append(share)
        away.append(turned(ours, masked.full(hidden), masks[-1]))
        kept.append(torch.stack([mask[:, 1:].sum(dim=1) for mask in masks]))
    counts = torch.cat(kept, dim=1)
    return {
        "thresholds": [round(float(value), 4) for value in thresholds],
        "share": round(float(torch.cat(shares).mean()), 4),
        "away": round(float(torch.cat(away).mean()), 4),
        "kept": [round(float(count), 1) for count in counts.mean(dim=1)],
        "spread": round(float(counts[-1].std()), 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file for the configuration")
    parser.add_argument("--results", type=Path, help="file for the comparison, as JSON")
    parser.add_argument("--share", type=float, default=0.65, help="of the tower's arithmetic")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--share-weight", type=float, default=2.0)
    parser.add_argument("--tau", type=float, default=1e-4)
    parser.add_argument("--pictures", type=int, default=400, help="drawn for training")
    parser.add_argument("--held-out", type=int, default=64, help="drawn for the comparison")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for path in (arguments.out, arguments.results):
        if path is not None:
            check_writable(path)
    torch.manual_seed(arguments.seed)
    model, processor = vtc.reference.load("llava")
    drawn = pictures("train", 11 + arguments.seed, arguments.pictures)
    few = [(image, "What is there?") for image in drawn[: arguments.held_out]]
    scaled = fit_multiplier(model, processor, few, share=arguments.share)
    tower, index = model.model.vision_tower, model.config.vision_feature_layer
    masked = Masked(tower, index + len(tower.encoder.layer) if index < 0 else index - 1, arguments.tau)
    thresholds, _ = train(masked, pixels_of(processor, drawn), arguments)
    config = CompressionConfig(
        "adaptive-sparse-vit",
        keep_tokens=_ANY_NUMBER,
        options={"thresholds": [round(float(value), 4) for value in thresholds]},
    )
    config.save(arguments.out)
    unseen = pixels_of(processor, pictures("test", 12, arguments.held_out))
    settings = {
        "initial": masked.initial,
        "multiplied": masked.initial * scaled.options["multiplier"],
        "trained": thresholds,
    }
    results = {name: measure(masked, unseen, values) for name, values in settings.items()}
    for name, found in results.items():
        print(name, json.dumps(found), flush=True)
    if arguments.results is not None:
        write_text(arguments.results, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
