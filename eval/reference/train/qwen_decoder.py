"""Step 2 of the ``qwen2_5_vl`` reference model: teach the decoder to answer, on cached tokens of the trained tower.

    python -m eval.reference.train.qwen_decoder --out runs/qwen --minutes 50

reads ``OUT/tower.pt``, ``OUT/train`` and ``OUT/test`` (see ``qwen_tower`` and ``qwen_data``), resumes from
``OUT/decoder.pt`` if that exists. Scenes and clips alternate; every question sees its picture and itself only,
exactly as alone in ``generate`` (see ``packing``). Auxiliary losses speed things up and leave nothing behind in the
model: visual tokens stay tied to the words of what they show; half-way up they must know what is written on them, where
and when they are, and what becomes of what they show; and there the place that will say the answer must point at the
tokens that the answer speaks about."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

import vtc_reference
from eval.reference.train.packing import EOS_WEIGHT, IGNORE, PackedText, Packer, attention_mask
from eval.reference.train.qwen_crops import ATTRIBUTES
from eval.reference.train.qwen_data import LABELS, Batch, Cache
from eval.reference.train.qwen_model import TOKENIZER, WIDTH, new_model
from eval.tasks.clips.clip import Actor, Clip
from eval.tasks.clips.questions import KINDS as CLIP_KINDS
from eval.tasks.clips.questions import TIMES, part_of
from eval.tasks.scenes.questions import Question
from eval.tasks.scenes.scene import Thing
from eval.tasks.scenes.vocabulary import COLOURS, SHAPES, SIGN_COLOURS
from eval.tasks.scenes.vocabulary import KINDS as SCENE_KINDS

TEXT_LENGTH: Final = 176
"""Question tokens per packed row; a fixed length is what ``torch.compile`` likes."""

_HALFWAY: Final = 3  # layers below the states that the auxiliary losses look at
_PROBE_CLASSES: Final = (8, 20, 20)  # time, row, column
_EVENT_CLASSES: Final = 1 + 1 + 2 * len(TIMES)  # not asked, always there, appears at ..., disappears at ...
_HELP_WEIGHT: Final = 0.3
_POINTER_WIDTH: Final = 64


def prefix_positions(grid: tuple[int, int, int]) -> Tensor:
    """Temporal, row and column positions ``(3, P)`` of ``<s> <|vision_start|> tokens <|vision_end|>``.

    Clips have 4 frames a second, two in a token, and the model counts two positions a second: one position a token.
    """
    time_, height, width = grid
    axes = torch.meshgrid(torch.arange(time_), torch.arange(height), torch.arange(width), indexing="ij")
    visual = torch.stack([axis.flatten() for axis in axes]) + 2
    ends = torch.tensor([0, 1]).expand(3, -1), torch.tensor([2 + max(height, width)]).expand(3, -1)
    return torch.cat([ends[0], visual, ends[1]], 1)


def text_start(grid: tuple[int, int, int]) -> int:
    """Position of the first token after ``<|vision_end|>``."""
    return 3 + max(grid[1], grid[2])


@dataclass(frozen=True)
class Spots:
    """What points where.

    Attributes
    ----------
    places : LongTensor (M, 2)
        Row and place in the packed text: where each answer begins, and every word that names something.
    focus : BoolTensor (M, N)
        The visual tokens that each points at: what the answer speaks about, or everything that the word fits.
    words : BoolTensor (M,)
        Which of them are words.
    """

    places: Tensor
    focus: Tensor
    words: Tensor


def spots_of(text: PackedText, rows: Sequence[Sequence[Question]], batch: Batch, names: Mapping[int, str]) -> Spots:
    """Find what points where in a packed batch; ``names`` are the token ids of colours and shapes."""
    places: list[tuple[int, int]] = []
    focus: list[Tensor] = []
    words: list[bool] = []
    for row, (questions, source) in enumerate(zip(rows, batch.sources, strict=True)):
        things: Sequence[Actor | Thing] = source.actors if isinstance(source, Clip) else source.things
        for number, question in enumerate(questions, 1):
            own = (text.segments[row] == number).nonzero().flatten().tolist()
            if not own:
                break
            first = next(place for place in own if text.labels[row, place] != IGNORE)
            pointers = [(first, question.focus, False)]
            for place in own[: own.index(first)]:
                if (name := names.get(int(text.ids[row, place]))) is not None:
                    pointers.append((place, tuple(i for i, t in enumerate(things) if name in (t.colour, t.name)), True))
            for place, meant, is_word in pointers:
                shown = [token for index in meant for token in batch.owned[row][index]]
                if shown:
                    mask = torch.zeros(batch.tokens, dtype=torch.bool)
                    mask[shown] = True
                    places.append((row, place))
                    focus.append(mask)
                    words.append(is_word)
    stacked = torch.stack(focus) if focus else torch.zeros(0, batch.tokens, dtype=torch.bool)
    return Spots(torch.tensor(places, dtype=torch.long).view(-1, 2), stacked, torch.tensor(words, dtype=torch.bool))


def event_labels(batch: Batch) -> Tensor:
    """What becomes of the object that each visual token of a clip shows, ``(B, N)`` of :data:`_EVENT_CLASSES`."""
    labels = torch.zeros(len(batch.sources), batch.tokens, dtype=torch.long)
    for row, clip in enumerate(batch.sources):
        if not isinstance(clip, Clip):
            continue
        for actor, shown in zip(clip.actors, batch.owned[row], strict=True):
            if actor.role != "object":
                continue
            event = 1
            if actor.first > 0:
                event = 2 + TIMES.index(part_of(actor.first, clip.length))
            elif actor.last < clip.length:
                event = 2 + len(TIMES) + TIMES.index(part_of(actor.last, clip.length))
            labels[row, list(shown)] = event
    return labels


def names_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Token ids of the words that name things, plurals of shapes included."""
    words = {name: name for name in (*COLOURS, *SIGN_COLOURS, *SHAPES, "sign")} | {
        f"{shape}s": shape for shape in SHAPES
    }
    return {tokenizer(word, add_special_tokens=False).input_ids[0]: name for word, name in words.items()}


class PackedQwen(nn.Module):
    """The language model of a ``Qwen2_5_VLForConditionalGeneration``, fed with cached tokens and packed questions.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        The stock model whose language model and head are trained.
    tokenizer : PreTrainedTokenizerBase
        The shared tokenizer.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.decoder: Any = model.model.language_model
        self.head = model.lm_head
        self.adapter = nn.Linear(WIDTH, WIDTH)  # starts as the identity, ends inside the merger's last matrix
        nn.init.eye_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)
        self.probe = nn.Linear(WIDTH, sum(_PROBE_CLASSES))
        self.pointer = nn.Linear(WIDTH, _POINTER_WIDTH)
        self.pointed = nn.Linear(WIDTH, _POINTER_WIDTH)
        self.events = nn.Linear(WIDTH, _EVENT_CLASSES)
        self.scale = nn.Parameter(torch.ones(()))  # temperature of the word loss
        ids = tokenizer.convert_tokens_to_ids(["<s>", "<|vision_start|>", "<|vision_end|>"])
        self.register_buffer("frame_ids", torch.tensor(ids), persistent=False)
        self.groups = [word_ids(tokenizer, name) for name in LABELS]
        self.run = self._run

    def compile(self) -> None:
        """Compile the layers; every sequence length is compiled once."""
        self.run = torch.compile(self._run, dynamic=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int], text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at labelled places, visual tokens ``(B, N, WIDTH)``, all states half-way up ``(B, P + T, WIDTH)``."""
        visual = self.adapter(tokens)
        halfway, hidden = self.decode(visual, prefix_positions(grid), text)
        return self.head(hidden[text.labels != IGNORE]).float(), visual, halfway

    def decode(self, visual: Tensor, positions: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        """All states half-way up, and the last states of the text; ``positions (3, P)`` of the prefix."""
        batch, count, _ = visual.shape
        frame = self.decoder.embed_tokens(self.frame_ids).to(visual.dtype).expand(batch, -1, -1)
        words = self.decoder.embed_tokens(text.ids).to(visual.dtype)
        embeds = torch.cat([frame[:, :2], visual, frame[:, 2:], words], 1)
        every = torch.cat([positions[:, None].expand(-1, batch, -1), text.positions.expand(3, -1, -1)], 2)
        cos, sin = self.decoder.rotary_emb(embeds, every)
        halfway, hidden = self.run(embeds, cos, sin, attention_mask(count + 3, text.segments))
        return halfway, hidden[:, count + 3 :]

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        halfway = x
        for number, layer in enumerate(self.decoder.layers, 1):
            x = layer(x, attention_mask=mask, position_embeddings=(cos, sin))
            if number == _HALFWAY:
                halfway = x
        return halfway, self.decoder.norm(x)

    def help_loss(
        self,
        visual: Tensor,
        halfway: Tensor,
        labels: Tensor,
        grid: tuple[int, int, int],
        spots: Spots,
        events: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The auxiliary losses by name; ``events (B, N)`` are :func:`event_labels`."""
        middle = halfway[:, 2 : 2 + visual.shape[1]]
        states = halfway[:, visual.shape[1] + 3 :]
        losses = {
            "words": self.word_loss(visual, labels),
            "reading": self.reading_loss(middle, labels),
            "places": 0.3 * self.probe_loss(self.probe(middle).float(), grid),
            "pointing": self.pointing_loss(middle, states, spots),
        }
        if events is not None:
            there = events > 0
            losses["events"] = functional.cross_entropy(self.events(middle[there]).float(), events[there])
        return losses

    def reading_loss(self, middle: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of what is written, at the tokens of writing half-way up: no token alone can tell."""
        column = LABELS.index("text")
        wanted = labels[..., column]
        if not bool((wanted > 0).any()):
            return middle.new_zeros(())
        states = functional.layer_norm(middle[wanted > 0].float(), (WIDTH,))
        vectors = self.decoder.embed_tokens.weight[self.groups[column]] * self.scale
        return functional.cross_entropy(states @ vectors.t(), wanted[wanted > 0])

    def pointing_loss(self, middle: Tensor, states: Tensor, spots: Spots) -> Tensor:
        """Cross-entropy of pointers over the visual tokens against those that show what is meant."""
        if not len(spots.places):
            return middle.new_zeros(())
        rows, places = spots.places.unbind(1)
        queries = self.pointer(states[rows, places])
        scores = (self.pointed(middle)[rows] @ queries[..., None]).squeeze(-1).float() / _POINTER_WIDTH**0.5
        wanted = spots.focus.float()
        each = functional.cross_entropy(scores, wanted / wanted.sum(-1, keepdim=True), reduction="none")
        groups = [each[chosen] for chosen in (spots.words, ~spots.words)]
        return torch.stack([group.mean() for group in groups if len(group)]).mean()

    def word_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of visual tokens against the words of what they show; ``labels (B, N, 4)``."""
        flat = functional.layer_norm(visual.float(), (WIDTH,)).flatten(0, 1)
        weight = (1.0 + 6.0 * (labels[..., 0] > 0)).flatten()
        loss = flat.new_zeros(())
        for column, ids in enumerate(self.groups):
            if LABELS[column] == "text":  # see reading_loss
                continue
            logits = flat @ (self.decoder.embed_tokens.weight[ids] * self.scale).t()
            each = functional.cross_entropy(logits, labels[..., column].flatten(), reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
        return loss

    def probe_loss(self, logits: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Cross-entropy of time, row and column of every visual token."""
        loss = logits.new_zeros(())
        positions = prefix_positions(grid)[:, 2:-1] - 2
        for part, target in zip(logits.split(_PROBE_CLASSES, -1), positions, strict=True):
            loss = loss + functional.cross_entropy(part.flatten(0, 1), target.repeat(len(logits)))
        return loss


def word_ids(tokenizer: PreTrainedTokenizerBase, attribute: str) -> Tensor:
    """Token ids of an attribute's words, the pad token first (it stands for none).

    Raises
    ------
    ValueError
        If a word is not a single token of this tokenizer.
    """
    ids = [tokenizer.pad_token_id]
    for word in ATTRIBUTES[attribute]:
        encoded = tokenizer(word, add_special_tokens=False).input_ids
        if len(encoded) != 1:
            raise ValueError(
                f"the word {word!r} takes {len(encoded)} tokens; train the tokenizer on it so that it takes one"
            )
        ids.append(encoded[0])
    return torch.tensor(ids)


def begin(packed: PackedQwen, tables: dict[str, Tensor], tokens: Tensor) -> None:
    """Give the words that the tower was trained on the tower's vectors, and visual tokens the scale of words.

    Parameters
    ----------
    packed : PackedQwen
        Freshly initialised.
    tables : dict of Tensor
        ``CellVocabulary.tables``: word vectors per attribute, row 0 for "nothing".
    tokens : Tensor (n, WIDTH)
        Some visual tokens.
    """
    with torch.no_grad():
        weight = packed.decoder.embed_tokens.weight
        vectors = torch.cat([tables[f"tables.{name}"][1:] - tables[f"tables.{name}"][:1] for name in LABELS])
        weight.normal_(std=float(vectors.std()))
        weight[packed.tokenizer.pad_token_id].zero_()  # "nothing": word vectors are relative to it
        weight[torch.cat([ids[1:] for ids in packed.groups])] = vectors
        packed.adapter.weight.mul_(vectors.std() / tokens.float().std())


@torch.no_grad()
def begin_from_llava(packed: PackedQwen, data: Cache, features: Path) -> float:
    """Start from the shipped ``llava`` reference model, whose decoder has the same shape.

    The adapter is fitted so that the tower's tokens look like those of that model's projector on the same scenes. New
    are only the biases of queries, keys and values (zero), the pointers (which are not shipped), and the meaning of
    positions, which training must mend.

    Parameters
    ----------
    packed : PackedQwen
        Gets the weights.
    data : Cache
        Cached tokens of this model's tower.
    features : Path
        Folder with cached features of the tower of ``llava`` (see ``cache``).

    Returns
    -------
    float
        Share of the variance of the projector's tokens that the fitted adapter explains.

    Raises
    ------
    ValueError
        If the decoder has another shape, or no scene is in both caches.
    """
    llava, _ = vtc_reference.load("llava")
    found = packed.decoder.load_state_dict(llava.model.language_model.state_dict(), strict=False)
    if found.unexpected_keys or not all(key.endswith("_proj.bias") for key in found.missing_keys):
        raise ValueError(f"not a decoder of this shape: {found}")
    for name in found.missing_keys:
        packed.decoder.get_parameter(name).zero_()
    packed.head.load_state_dict(llava.lm_head.state_dict())
    tokens, wanted, labels = _pairs(data, llava.model.multi_modal_projector, features)
    mean, goal = tokens.mean((0, 1)), wanted.mean((0, 1))
    flat = (tokens - mean).flatten(0, 1)
    gram = flat.T @ flat
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, flat.T @ (wanted - goal).flatten(0, 1)).T
    packed.adapter.weight.copy_(weight)
    packed.adapter.bias.copy_(goal - weight @ mean)
    fitted = packed.adapter(tokens)
    losses = {}
    for scale in (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0):  # the temperature of the word loss is not shipped either
        packed.scale.fill_(scale)
        losses[scale] = packed.word_loss(fitted, labels).item()
    packed.scale.fill_(min(losses, key=lambda scale: losses[scale]))
    return 1.0 - float((fitted - wanted).square().sum() / (wanted - goal).square().sum())


def _pairs(data: Cache, projector: nn.Module, features: Path, most: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of this tower and of the other model's projector for the same patches, each ``(n, 256, WIDTH)``.

    With their classes ``(n, 256, 4)``.
    """
    described = json.loads((features / "state.json").read_text())
    stored = np.load(features / "features.npy", mmap_mode="r")
    tokens: list[Tensor] = []
    wanted: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in data.batches:
        if batch.grid != (1, 16, 16) or len(tokens) == most:
            continue
        rows = [i for i, s in enumerate(batch.sources) if s.seed == described["seed"] and s.index < described["done"]]
        if rows:
            raw = torch.from_numpy(np.stack([stored[batch.sources[i].index, -1] for i in rows])).float()
            wanted.append(projector(raw))
            tokens.append(data.tokens(batch)[rows])
            labels.append(data.labels(batch)[rows])
    if not tokens:
        raise ValueError(f"no scene of this cache is among the first {described['done']} of {features}")
    return torch.cat(tokens), torch.cat(wanted), torch.cat(labels)


def learning_rate(peak: float, step: int, share: float, warmup: int = 100) -> float:
    """Warm-up by steps, flat until half of the time, then a linear descent to 2 % of the peak."""
    descent = 1.0 if share < 0.5 else max(0.02, (1 - share) / 0.5)
    return peak * min(1.0, (step + 1) / warmup) * descent


@torch.no_grad()
def accuracy(
    packed: PackedQwen, packers: dict[int, Packer], cache: Cache, modality: str, batches: int
) -> dict[str, float]:
    """Share of questions whose whole answer is the greedy one, by kind and over all, on the first batches."""
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in [b for b in cache.batches if b.modality == modality][:batches]:
        rows = batch.ask(9, 0)
        text = packer_for(packers, batch.grid, packed).pack(rows)
        with torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):
            logits = packed(cache.tokens(batch), batch.grid, text)[0]
        hit = torch.ones_like(text.labels, dtype=torch.bool)
        hit[text.labels != IGNORE] = logits.argmax(-1) == text.labels[text.labels != IGNORE]
        for row, questions in enumerate(rows):
            for number, question in enumerate(questions, 1):
                own = text.segments[row] == number
                if own.any():
                    right[question.kind].append(bool(hit[row][own].all()))
    kinds = SCENE_KINDS if modality == "image" else CLIP_KINDS
    table = {kind: round(float(np.mean(right[kind])), 3) for kind in kinds if right[kind]}
    return table | {"all": round(float(np.mean([hit for hits in right.values() for hit in hits])), 4)}


def packer_for(packers: dict[int, Packer], grid: tuple[int, int, int], packed: PackedQwen) -> Packer:
    """The packer whose texts begin at the right position for this grid."""
    start = text_start(grid)
    if start not in packers:
        packers[start] = Packer(packed.tokenizer, start, TEXT_LENGTH)
    return packers[start]


def answer_loss(logits: Tensor, targets: Tensor, eos: int) -> Tensor:
    """Mean cross-entropy of answer tokens, the end token weighing little."""
    weight = torch.where(targets == eos, EOS_WEIGHT, 1.0)
    return (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()


def train(
    out: Path,
    minutes: float,
    peak: float,
    seed: int = 0,
    compiled: bool = True,
    per_row: int = 18,
    llava: Path | None = None,
    most_steps: int | None = None,
) -> list[float]:
    """Train until ``minutes`` are used up, or for ``most_steps``, and return the losses; checkpoints go to ``out``."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    data = Cache(out / "train")
    tests = Cache(out / "test") if (out / "test").exists() else None
    packed = PackedQwen(new_model(tokenizer), tokenizer)
    begin(
        packed,
        torch.load(out / "tower.pt", weights_only=True)["vocabulary"],
        data.tokens(data.batches[0]).flatten(0, 1),
    )
    optimiser = torch.optim.AdamW(packed.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = out / "decoder.pt"
    step, used = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        packed.load_state_dict(saved["packed"])
        optimiser.load_state_dict(saved["optimiser"])
        step, used = saved["step"], saved["seconds"]
    elif llava is not None:
        print(f"adapter explains {begin_from_llava(packed, data, llava):.3f} of the llava tokens' variance", flush=True)
    if compiled:
        packed.compile()
    packers: dict[int, Packer] = {}
    names = names_of(tokenizer)
    losses: list[float] = []
    window: dict[str, list[float]] = defaultdict(list)
    began = saved_at = watched_at = time.time()
    before = used
    while (share := used / (60 * minutes)) < 1 and step != most_steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(peak, step, share)
        epoch, place = divmod(step, len(data.batches))
        order = np.random.default_rng([seed, epoch]).permutation(len(data.batches))
        batch: Batch = data.batches[int(order[place])]
        rows = batch.ask(per_row, epoch + 1, practice=True)
        text = packer_for(packers, batch.grid, packed).pack(rows)
        targets = text.labels[text.labels != IGNORE]
        with torch.autocast("cpu", torch.bfloat16):
            logits, visual, halfway = packed(data.tokens(batch), batch.grid, text)
            spots = spots_of(text, rows, batch, names)
            events = event_labels(batch) if batch.modality == "video" else None
            helps = packed.help_loss(visual, halfway, data.labels(batch), batch.grid, spots, events)
        answer = answer_loss(logits, targets, packers[text_start(batch.grid)].eos)
        optimiser.zero_grad(set_to_none=True)
        (answer + _HELP_WEIGHT * torch.stack(list(helps.values())).sum()).backward()
        nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
        optimiser.step()
        step += 1
        used = before + time.time() - began
        losses.append(float(answer.detach()))
        content = targets != packers[text_start(batch.grid)].eos
        hit = float((logits.argmax(-1) == targets)[content].float().mean())
        window[batch.modality].append(hit)
        window["loss"].append(losses[-1])
        for name, value in helps.items():
            window[name].append(float(value.detach()))
        if step % 50 == 0:
            means = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in sorted(window.items()))
            window.clear()
            print(f"step {step}, {used:.0f} s, {time.process_time():.0f} s CPU: {means}", flush=True)
        done = used >= 60 * minutes or step == most_steps
        if done or time.time() - saved_at > 240:
            state = {"packed": packed.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "seconds": used}
            torch.save(state, out / "decoder.part")
            (out / "decoder.part").replace(checkpoint)  # never leaves half a checkpoint behind
            saved_at = time.time()
        if tests is not None and (done or time.time() - watched_at > 400):
            for modality in ("image", "video"):
                table = accuracy(packed, packers, tests, modality, 40 if done else 8)
                print(f"test, step {step}, {modality}: {table}", flush=True)
            watched_at = time.time()
    return losses


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and caches")
    parser.add_argument("--minutes", type=float, default=60.0, help="in all, counting those of a checkpoint")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument(
        "--llava", type=Path, help="start from the shipped llava's decoder; folder of its tower's cached features"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(
        arguments.out,
        arguments.minutes,
        arguments.lr,
        compiled=not arguments.no_compile,
        llava=arguments.llava,
    )


if __name__ == "__main__":
    main()
