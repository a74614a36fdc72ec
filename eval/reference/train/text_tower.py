"""Train a text tower that matches the patches of ``llava``'s tower: a contrastive model in open_clip's format.

The tower of images is locked: it is the shared one, of which ``llava`` reads the second-last layer, here behind a
LayerNorm and a projection that learn. The text tower learns with them. Texts are questions about scenes of the train
split and captions of their objects. Two losses of equal weight: which patches of its own scene a text speaks of, and
which of all objects in the batch a caption names. Needs ``open_clip_torch``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

import vtc_reference
from eval.reference.train.cache import IMAGE_MEAN, IMAGE_STD, PACKAGE, TOKENIZER, normalised, tower_features
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import Scene, Thing, make_scene

WIDTH: Final = 128
CONTEXT: Final = 20

CONFIG: Final[dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "custom_text": True,
        "vision_cfg": {
            "layers": 11,
            "width": 384,
            "head_width": 64,
            "patch_size": 14,
            "image_size": 224,
            "ls_init_value": 1.0,
            "no_ln_pre": True,
            "pool_type": "avg",
            "norm_kwargs": {"eps": 1e-6},
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 960,
            "hf_tokenizer_name": "tokenizer files beside this one",
            "width": WIDTH,
            "heads": 4,
            "layers": 2,
            "pool_type": "last",
        },
    },
    "preprocess_cfg": {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "interpolation": "bicubic"},
}
"""What open_clip builds; its tokenizer pads on the left, so that a text ends at the last place."""

PARTS: Final = ("text.", "visual.ln_post.", "visual.proj", "logit_scale")
"""Weights that are stored; the others are the shared tower's."""


class Matcher(nn.Module):
    """The parts that learn."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.model import CustomTextCLIP

        parts = CONFIG["model_cfg"]
        whole = CustomTextCLIP(parts["embed_dim"], dict(parts["vision_cfg"]), dict(parts["text_cfg"]))
        self.text, self.norm, self.projection = whole.text, whole.visual.ln_post, nn.Parameter(whole.visual.proj.data)
        self.scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def patches(self, features: Tensor) -> Tensor:
        """Embeddings ``(n, 256, WIDTH)`` of patches ``(n, 256, 384)``."""
        return F.normalize(self.norm(features.float()) @ self.projection, dim=-1)

    def texts(self, ids: Tensor) -> Tensor:
        """Embeddings ``(t, WIDTH)`` of texts ``(t, CONTEXT)``."""
        return F.normalize(self.text(ids), dim=-1)

    @classmethod
    def stored(cls, folder: Path = PACKAGE / "openclip") -> Matcher:
        """With the weights of the distribution."""
        matcher, weights = cls(), load_file(folder / "open_clip_model.safetensors")
        matcher.projection.data, matcher.scale.data = weights["visual.proj"].float(), weights["logit_scale"].float()
        for prefix, part in (("text.", matcher.text), ("visual.ln_post.", matcher.norm)):
            own = {name.removeprefix(prefix): x.float() for name, x in weights.items() if name.startswith(prefix)}
            part.load_state_dict(own, strict=False)  # the mask of its attention is no weight
        return matcher.eval()

    def weights(self) -> dict[str, Tensor]:
        """Under open_clip's names, in float16."""
        found = {f"text.{name}": weight for name, weight in self.text.state_dict().items()}
        found |= {f"visual.ln_post.{name}": weight for name, weight in self.norm.state_dict().items()}
        found |= {"visual.proj": self.projection.detach(), "logit_scale": self.scale.detach()}
        return {name: weight.half().contiguous() for name, weight in found.items() if weight.is_floating_point()}


def captions(thing: Thing, rng: np.random.Generator) -> str:
    """A name of an object or a sign."""
    if thing.role == "sign":
        return str(rng.choice([f"the {thing.colour} sign", f"a sign that says {thing.text}", "the sign"]))
    names = [f"the {thing.colour} {thing.name}", f"a {thing.colour} {thing.name}", f"the {thing.colour} object"]
    names += [f"the digit on the {thing.colour} {thing.name}", f"the number {thing.text}"] if thing.text else []
    return str(rng.choice(names))


def encode(scenes: Sequence[Scene]) -> Tensor:
    """Patch tokens ``(n, 256, 384)`` float16 of ``llava``'s tower."""
    tower = vtc_reference.load("llava")[0].model.vision_tower
    images = [np.stack([scene.image for scene in scenes[at : at + 16]]) for at in range(0, len(scenes), 16)]
    return torch.cat([tower_features(tower, normalised(some))[0] for some in images])


def train(drawn: Sequence[Scene], features: Tensor, steps: int, seed: int = 5, batch: int = 24) -> Matcher:
    """Train on scenes and their features, `batch` a step; prints the losses."""
    scenes, rate = len(drawn), 1e-3
    torch.manual_seed(seed)
    tokenizer, matcher, rng = AutoTokenizer.from_pretrained(TOKENIZER), Matcher(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    history = []
    for step in range(steps):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, max(0.02, (1 - share) / 0.5))
        chosen = rng.choice(scenes, batch, replace=False)
        losses = _losses(matcher, tokenizer, features[chosen], [drawn[i] for i in chosen], rng, step)
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(matcher.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            matcher.scale.clamp_(max=float(np.log(100)))
        history.append([loss.item() for loss in losses])
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: patches {np.mean(history[-100:], 0)[0]:.3f}, captions "
                  f"{np.mean(history[-100:], 0)[1]:.3f}", flush=True)  # fmt: skip
    return matcher.eval()


def _losses(
    matcher: Matcher, tokenizer: Any, features: Tensor, scenes: Sequence[Scene], rng: np.random.Generator, step: int
) -> tuple[Tensor, Tensor]:
    patches = matcher.patches(features)
    texts: list[str] = []
    owners: list[int] = []
    targets: list[tuple[int, ...]] = []
    named: list[tuple[int, Thing]] = []
    for place, scene in enumerate(scenes):
        for question in ask(scene, 2, seed=step):
            texts.append(question.text)
            targets.append(tuple(p for thing in question.targets for p in scene.things[thing].patches))
            owners.append(place)
        named += [(place, scene.named[i]) for i in rng.permutation(len(scene.named))[:3]]
    texts += [captions(thing, rng) for _, thing in named]
    owners += [place for place, _ in named]
    targets += [thing.patches for _, thing in named]
    ids = tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids
    said = matcher.texts(ids)
    scale = matcher.scale.exp()
    own = torch.tensor(owners)
    logits = scale * (patches[own] @ said[:, :, None])[..., 0]
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    for row, target in enumerate(targets):
        wanted[row, list(target)] = True
    seen = wanted.any(dim=1)
    inside = logits.masked_fill(~wanted, -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    pointing = -inside[seen].mean()
    objects = F.normalize(torch.stack([patches[place, list(thing.patches)].mean(0) for place, thing in named]), dim=-1)
    names = said[len(texts) - len(named) :]
    table = scale * names @ objects.T
    same = torch.tensor([[_same(a, b) for _, b in named] for _, a in named])
    table = table.masked_fill(same & ~torch.eye(len(named), dtype=torch.bool), -torch.inf)  # neither right nor wrong
    at = torch.arange(len(named))
    return pointing, (F.cross_entropy(table, at) + F.cross_entropy(table.T, at)) / 2


def _same(a: Thing, b: Thing) -> bool:
    """Whether a name of one could be meant for the other."""
    return a.role == b.role and (a.colour == b.colour or (bool(a.text) and a.text == b.text))


def run(scenes: int = 800, steps: int = 800, seed: int = 5) -> None:
    """Train the text tower beside ``llava``'s tower and store it in the distribution."""
    drawn = [make_scene("train", seed, index) for index in range(scenes)]
    export(train(drawn, encode(drawn), steps, seed))


@torch.no_grad()
def rank(scenes: int = 60, seed: int = 0) -> None:
    """Print how often a patch of the asked object is more relevant than another patch, on scenes of the test split.

    Of questions about one object or sign; beside it relevance by the input embeddings of ``llava`` itself.
    """
    model, _ = vtc_reference.load("llava")
    matcher, tokenizer = Matcher.stored(), AutoTokenizer.from_pretrained(TOKENIZER)
    found: dict[str, list[tuple[float, float]]] = {}
    for index in range(scenes):
        scene = make_scene("test", seed, index)
        pixels = normalised(scene.image[None])
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        own = F.normalize(model.model.multi_modal_projector(hidden)[0], dim=1)
        patches = matcher.patches(hidden)[0]
        for question in ask(scene, 10):
            if len(question.targets) != 1:
                continue
            ids = tokenizer([question.text], return_tensors="pt", add_special_tokens=False).input_ids
            padded = F.pad(ids, (CONTEXT - ids.shape[1], 0), value=tokenizer.pad_token_id)
            words = F.normalize(model.get_input_embeddings()(ids)[0], dim=1).mean(dim=0)
            there = torch.zeros(len(patches), dtype=torch.bool)
            there[list(scene.things[question.targets[0]].patches)] = True
            pair = [_above(scores, there) for scores in (patches @ matcher.texts(padded)[0], own @ words)]
            found.setdefault(question.kind, []).append((pair[0], pair[1]))
    print(f"{scenes} scenes, share of pairs in which a patch of the object is above another patch")
    found["all"] = [pair for pairs in found.values() for pair in pairs]
    for kind, pairs in found.items():
        ours, theirs = np.mean(pairs, axis=0)
        print(f"{kind}: text tower {ours:.3f}, own embeddings {theirs:.3f}, n = {len(pairs)}")


def _above(scores: Tensor, there: Tensor) -> float:
    return float((scores[there][:, None] > scores[~there]).float().mean())


def export(matcher: Matcher, folder: Path = PACKAGE / "openclip") -> None:
    """Store configuration and weights in the distribution."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(matcher.weights(), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
