r"""Train a reference model on cached tower features.

    python -m eval.reference.train llava --minutes 60 --cache cache/ --folder runs/llava [--resume]
    python -m eval.reference.train internvl --minutes 60 --cache cache_tiles/ --folder runs/internvl --start llava

On a busy CPU, two processes of one thread each get much further than one of two threads: start the same command twice
with RANK=0 and RANK=1, WORLD_SIZE=2, MASTER_ADDR, MASTER_PORT (or through ``torchrun --nproc-per-node 2``).

``cache/train*`` and ``cache/test`` come from ``python -m eval.reference.train.cache`` (``--tiles`` for internvl). The
learning rate follows the share of ``--minutes`` used up, so a run ends on time on any machine; a checkpoint is written
every ``--save-every`` seconds, and ``--resume`` continues from it with the clock where it stood.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import vtc_reference
from eval.reference.train import models
from eval.reference.train.labels import patch_labels
from eval.reference.train.packing import IGNORE, Packer, bare_scene
from eval.tasks.scenes.questions import ask
from eval.tasks.scenes.scene import Scene
from eval.tasks.scenes.vocabulary import KINDS

TOKENIZER = Path(__file__).parents[1] / "src" / "vtc_reference" / "tokenizer"


PRACTICE = (*KINDS, "relation", "relation", "relation", "extreme", "place", "digit", "digit", "digit", "reading")
"""Kinds of question in training: what takes longest to learn is asked more often."""


@dataclass
class Data:
    """Cached features with what the scenes hold."""

    shards: list[np.ndarray]
    scenes: list[Scene]
    places: list[tuple[int, int]]

    @classmethod
    def load(cls, split: str, cache: Path) -> Data:
        """Read every shard ``<split>*`` of the cache, as far as it is filled."""
        data = cls([], [], [])
        for folder in sorted(cache.glob(f"{split}*")):
            if not (folder / "state.json").exists():
                continue
            state = json.loads((folder / "state.json").read_text())
            things = pickle.loads((folder / "things.pkl").read_bytes())[: state["done"]]
            data.places += [(len(data.shards), index) for index in range(len(things))]
            data.shards.append(np.load(folder / "features.npy", mmap_mode="r"))
            data.scenes += [bare_scene(t, split, state["seed"], index) for index, t in enumerate(things)]
        if not data.scenes:
            raise ValueError(f"no cached {split} scenes in {cache}; make them with train.cache")
        return data

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Features ``(n, views, 256, 384)`` of the scenes, in the order given."""
        places = [self.places[int(index)] for index in indices]
        return torch.from_numpy(np.stack([self.shards[shard][index] for shard, index in places]))


def learning_rate(peak: float, step: int, share: float, warmup: int = 100) -> float:
    """Warm-up by steps, flat until 55 % of the time, then a linear descent to 2 % of the peak."""
    descent = 1.0 if share < 0.55 else max(0.02, (1 - share) / 0.45)
    return peak * min(1.0, (step + 1) / warmup) * descent


@torch.no_grad()
def accuracy(
    packed: models.PackedModel, packer: Packer, data: Data, scenes: int, per_scene: int = 10
) -> dict[str, float]:
    """Share of questions whose whole answer is the greedy one, by kind and over all, on the first ``scenes`` scenes."""
    right: dict[str, list[bool]] = defaultdict(list)
    packed.eval()
    for start in range(0, scenes, 20):
        indices = np.arange(start, min(start + 20, scenes))
        rows = [ask(data.scenes[int(i)], per_scene) for i in indices]
        text = packer.pack(rows)
        with torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):
            logits, *_ = packed(data.batch(indices), text)
        hit = torch.ones_like(text.labels, dtype=torch.bool)
        hit[text.labels != IGNORE] = logits.argmax(-1) == text.labels[text.labels != IGNORE]
        for row, questions in enumerate(rows):
            for number, question in enumerate(questions, 1):
                own = text.segments[row] == number
                if own.any():
                    right[question.kind].append(bool(hit[row][own].all()))
    packed.train()
    table = {kind: round(float(np.mean(right[kind])), 3) for kind in KINDS if right[kind]}
    return table | {"all": round(float(np.mean([hit for hits in right.values() for hit in hits])), 4)}


def workers() -> tuple[int, int]:
    """Rank of this process and number of processes (see ``torchrun``)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Mean of the gradients over the processes, in one exchange; parameters without a gradient are skipped."""
    _, world = workers()
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def tokens_like(teacher: torch.nn.Module, packed: models.PackedModel, features: torch.Tensor) -> torch.Tensor:
    """What another family's projector makes of the patches that each visual token shows: their mean ``(B, N, HIDDEN)``.

    ``features (B, views, 256, 384)``, the whole scene last.
    """
    tokens: torch.Tensor = teacher(features[:, -1].float())
    return tokens[:, packed.sources].mean(2)


def learn_words(
    packed: models.PackedModel,
    data: Data,
    labels: torch.Tensor,
    arguments: argparse.Namespace,
    teacher: torch.nn.Module | None = None,
) -> None:
    """Before anything else: projector and word embeddings alone, by the word loss.

    A step costs a tenth of a full one, and a decoder that starts on tokens which already carry their words skips the
    long plateau in which it can only guess. With ``--start`` the words are already there and only the projector moves;
    where it is another family's, its tokens are pulled towards those of the ``teacher``, the projector that the decoder
    was trained with.
    """
    rank, world = workers()
    steps, batch, seed = arguments.word_steps, arguments.word_batch, arguments.seed
    parameters = list(packed.projector.parameters())
    if arguments.start is None:
        parameters += [packed.decoder.embed_tokens.weight, packed.scale]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng([seed, rank, 1])
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        indices = np.sort(rng.choice(len(data.scenes), batch // world, replace=False))
        features = data.batch(indices)
        with torch.autocast("cpu", torch.bfloat16):
            visual = packed.visual(features)
            loss = packed.word_loss(visual, packed.token_labels(labels[indices]))
            if teacher is not None:
                wanted = tokens_like(teacher, packed, features).float()
                loss = loss + (visual.float() - wanted).square().mean() / wanted.var()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        optimiser.step()
        losses.append(loss.item())
        if rank == 0 and step % 100 == 99:
            print(f"words, step {step + 1}: {np.mean(losses[-100:]):.3f}, {time.process_time():.0f} s CPU", flush=True)


def begin_with(packed: models.PackedModel, start: str, name: str) -> torch.nn.Module | None:
    """Take over trained weights: of a checkpoint of this script, or of a shipped model by its name.

    A shipped model has lost what only training needs: the pointers begin anew, and the temperature of the word loss is
    found by `fit_scale`.

    Returns
    -------
    nn.Module or None
        The projector of a shipped model of another family, which does not fit here but can be imitated.
    """
    if start in vtc_reference.names():
        shipped, _ = vtc_reference.load(start)
        packed.decoder.load_state_dict(shipped.model.language_model.state_dict())
        packed.head.load_state_dict(shipped.lm_head.state_dict())
        if name == start:
            packed.projector.load_state_dict(shipped.model.multi_modal_projector.state_dict())
            packed.unfold()
            return None
        projector: torch.nn.Module = shipped.model.multi_modal_projector
        return projector
    weights = torch.load(start, weights_only=True)["model"]
    if name != "llava":
        weights = {key: tensor for key, tensor in weights.items() if key.startswith(("decoder.", "head.", "scale"))}
    found = packed.load_state_dict(weights, strict=False)
    if found.unexpected_keys or any(not key.startswith(("projector.", "pointe")) for key in found.missing_keys):
        raise ValueError(f"the checkpoint to start from does not fit: {found}")
    return None


@torch.no_grad()
def fit_scale(
    packed: models.PackedModel, data: Data, labels: torch.Tensor, teacher: torch.nn.Module | None, scenes: int = 32
) -> None:
    """Set the temperature of the word loss to the best of a few, on the first scenes' tokens (or the teacher's)."""
    indices = np.arange(min(scenes, len(data.scenes)))
    features, shown = data.batch(indices), packed.token_labels(labels[indices])
    visual = packed.visual(features) if teacher is None else tokens_like(teacher, packed, features)
    losses = {}
    for candidate in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
        packed.scale.fill_(candidate)
        losses[candidate] = packed.word_loss(visual, shown).item()
    packed.scale.fill_(min(losses, key=lambda candidate: losses[candidate]))


def train(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
    """The training loop."""
    torch.manual_seed(arguments.seed)
    rank, world = workers()
    if world > 1:
        dist.init_process_group("gloo")
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    data, test = (Data.load(split, arguments.cache) for split in ("train", "test"))
    labels = torch.stack([patch_labels(scene.things) for scene in data.scenes])
    _, packed = models.new_packed(arguments.model, tokenizer)
    packed.prepare(data.batch(np.arange(0, len(data.scenes), max(1, len(data.scenes) // 200))))
    packer = Packer(tokenizer, len(packed.prefix), arguments.text_length)
    evaluator = Packer(tokenizer, len(packed.prefix), 192)
    parameters = [p for p in packed.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.05)
    step, used, epoch, order = 0, 0.0, 0, np.empty(0, np.int64)
    checkpoint = folder / "checkpoint.pt"
    if arguments.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        packed.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step, used, epoch = saved["step"], saved["used"], saved["epoch"] + 1
    else:
        teacher = None
        if arguments.start is not None:
            teacher = begin_with(packed, arguments.start, arguments.model)
            if arguments.start in vtc_reference.names():
                fit_scale(packed, data, labels, teacher)
        learn_words(packed, data, labels, arguments, teacher)
    if rank == 0:
        print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {len(data.scenes)} scenes", flush=True)
    if arguments.compile:
        packed.layers = torch.compile(packed.layers, dynamic=False)

    def save() -> None:
        state = {"model": packed.state_dict(), "optimiser": optimiser.state_dict()}
        torch.save(state | {"step": step, "used": used, "epoch": epoch}, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(checkpoint)

    start, window = time.time() - used, defaultdict(list)
    saved_at = evaluated_at = time.time()
    while True:
        used = time.time() - start
        if world > 1:  # all processes must stop at the same step
            clock = torch.tensor(used, dtype=torch.float64)
            dist.broadcast(clock, 0)
            used = float(clock)
        share = used / (60 * arguments.minutes)
        if share >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(arguments.lr, step, share)
        if len(order) < arguments.batch:
            epoch += 1
            data = Data.load("train", arguments.cache)  # scenes that were cached meanwhile join in
            labels = torch.stack([patch_labels(scene.things) for scene in data.scenes])
            order = np.random.default_rng([arguments.seed, epoch]).permutation(len(data.scenes))
        indices, order = np.sort(order[: arguments.batch][rank::world]), order[arguments.batch :]
        scenes = [data.scenes[int(i)] for i in indices]
        text = packer.ask_and_pack(scenes, arguments.per_scene, seed=epoch, kinds=PRACTICE)
        with torch.autocast("cpu", torch.bfloat16):
            logits, visual, halfway = packed(data.batch(indices), text)
            targets = text.labels[text.labels != IGNORE]
            loss = packed.answer_loss(logits, targets, packer.eos)
            shown = packed.token_labels(labels[indices])
            words, reading = packed.word_loss(visual, shown), packed.reading_loss(halfway, shown)
            pointing = packed.pointing_loss(halfway, text)
        optimiser.zero_grad(set_to_none=True)
        help_weight = arguments.help_weight
        (loss + help_weight * (words + pointing) + arguments.reading_weight * reading).backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        if rank != 0:
            continue
        content = targets != packer.eos
        window["loss"].append(loss.item())
        window["words"].append(words.item())
        window["reading"].append(reading.item())
        window["pointing"].append(pointing.item())
        window["hit"].append((logits.argmax(-1) == targets)[content].float().mean().item())
        if step % 50 == 0:
            means = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in window.items())
            window.clear()
            print(f"step {step}, {used:.0f} s, {time.process_time():.0f} s CPU: {means}", flush=True)
        if time.time() - saved_at > arguments.save_every:
            save()
            saved_at = time.time()
        if time.time() - evaluated_at > arguments.evaluate_every:
            print(f"test, step {step}: {accuracy(packed, evaluator, test, 100)}", flush=True)
            evaluated_at = time.time()
    if rank != 0:
        return
    save()
    print(f"end, step {step}: {accuracy(packed, evaluator, test, len(test.scenes))}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("llava", "internvl"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--start", help="checkpoint, or name of a shipped model, to begin with (a new clock, a new optimiser)"
    )
    parser.add_argument("--batch", type=int, default=8, help="scenes per step, over all processes")
    parser.add_argument("--word-steps", type=int, default=1200, help="steps of the word loss alone at the start")
    parser.add_argument("--word-batch", type=int, default=48)
    parser.add_argument("--per-scene", type=int, default=18)
    parser.add_argument("--text-length", type=int, default=175)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--help-weight", type=float, default=0.3, help="weight of the word and pointing losses")
    parser.add_argument("--reading-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save-every", type=float, default=240.0)
    parser.add_argument("--evaluate-every", type=float, default=420.0)
    arguments = parser.parse_args()
    train(arguments, AutoTokenizer.from_pretrained(TOKENIZER))


if __name__ == "__main__":
    main()
