"""The three models as trained: projector and decoder on cached features, with packed questions and auxiliary losses."""

from __future__ import annotations

from typing import Any, ClassVar, Final, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.reference.train.cache import PACKAGE, VIEWS
from eval.reference.train.labels import COLUMN, EVENTS, word_id, word_ids
from eval.reference.train.packing import IGNORE, PackedText, attention_mask
from eval.tasks.scenes.vocabulary import GRID

HIDDEN: Final = 256
LAYERS: Final = 6
POINTER_WIDTH: Final = 64
EOS_WEIGHT: Final = 0.1  # the end of an answer is learned in minutes and then only dilutes the loss
AUXILIARY_WEIGHT: Final = 0.3


def new_model(name: str) -> Any:
    """Build an untrained stock model of the shape that the distribution's ``config.json`` describes."""
    config = AutoConfig.from_pretrained(PACKAGE / name)
    return getattr(transformers, config.architectures[0])(config)


class Example(NamedTuple):
    """One training batch: features and classes ``(B, N, 4)`` of patches or visual tokens, and packed questions.

    ``grid (t, h, w)`` in tokens and, for clips, ``events (B, N)`` are for ``qwen2_5_vl`` only.
    """

    features: Tensor
    labels: Tensor
    text: PackedText
    grid: tuple[int, int, int] | None = None
    events: Tensor | None = None


class PackedModel(nn.Module):
    """Projector, decoder and head of a stock model, trained in place; its tower is not used.

    ``before`` and ``after`` are the chat template's tokens around the visual tokens, up to the question.
    """

    word_columns: ClassVar[tuple[str, ...]] = ("colour", "shape", "text")
    """Attributes whose words each visual token is asked for."""

    sources: Tensor | None = None
    """``(N, m)`` long: the patches of the scene that each visual token shows, where the two are not the same."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, before: list[str], after: list[str]
    ) -> None:
        super().__init__()
        self.decoder = model.model.language_model
        self.head = model.lm_head
        self.before = torch.tensor(tokenizer.convert_tokens_to_ids(before))
        self.after = torch.tensor(tokenizer.convert_tokens_to_ids(after), dtype=torch.long)
        self.words = word_ids(tokenizer)
        self.sides: list[tuple[Tensor, Tensor]] = []  # word ids of two sides, and the side of each visual token
        self.eos = tokenizer.eos_token_id
        # Temperature of the word loss and the pointers serve the auxiliary losses and are not shipped.
        self.scale = nn.Parameter(torch.ones(()))
        self.pointer = nn.Linear(HIDDEN, POINTER_WIDTH)
        self.pointed = nn.Linear(HIDDEN, POINTER_WIDTH)

    def visual(self, features: Tensor) -> Tensor:
        """Visual tokens ``(B, N, HIDDEN)`` of cached features."""
        raise NotImplementedError

    def prefix_positions(self, count: int, grid: tuple[int, int, int] | None) -> Tensor:
        """Position ids of the prefix with ``count`` visual tokens, ``(..., 1, P)``."""
        return torch.arange(len(self.before) + count + len(self.after))[None]

    def forward(
        self, features: Tensor, text: PackedText, grid: tuple[int, int, int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``(answer tokens, vocabulary)``, visual tokens ``(B, N, HIDDEN)`` and states half-way up.

        The states ``(B, P + T, HIDDEN)`` behind half of the decoder layers are what the auxiliary losses read.
        """
        visual = self.visual(features)
        batch, count = visual.shape[:2]
        before, after, words = (
            self.decoder.embed_tokens(ids).to(visual.dtype).expand(batch, -1, -1)
            for ids in (self.before, self.after, text.ids)
        )
        hidden = torch.cat([before, visual, after, words], 1)
        prefix = self.prefix_positions(count, grid)
        axes = prefix.shape[:-2]
        positions = torch.cat([prefix.expand(*axes, batch, -1), text.positions.expand(*axes, -1, -1)], -1)
        mask = attention_mask(prefix.shape[-1], text.segments)
        rotary = self.decoder.rotary_emb(hidden, positions)
        halfway = hidden
        for number, layer in enumerate(self.decoder.layers, 1):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            if number == LAYERS // 2:
                halfway = hidden
        answers = self.decoder.norm(hidden)[:, prefix.shape[-1] :][text.labels != IGNORE]
        return self.head(answers).float(), visual, halfway

    def losses(self, example: Example) -> dict[str, Tensor]:
        """All losses of a batch by name, with their weights."""
        logits, visual, halfway = self(example.features, example.text)
        labels = self.token_labels(example.labels)
        return {
            "answer": self.answer_loss(logits, example.text),
            "words": AUXILIARY_WEIGHT * self.word_loss(visual, labels),
            "pointing": AUXILIARY_WEIGHT * self.pointing_loss(halfway, example.text),
            "reading": self.reading_loss(self.visual_states(halfway, example.text), labels),
        }

    def token_labels(self, labels: Tensor) -> Tensor:
        """Classes of visual tokens ``(B, N, 4)`` from those of patches: of the first patch that shows anything."""
        if self.sources is None:
            return labels
        candidates = labels[:, self.sources]
        first = (candidates[..., 0] > 0).int().argmax(-1)
        return candidates.gather(2, first[..., None, None].expand(-1, -1, 1, labels.shape[-1])).squeeze(2)

    def answer_loss(self, logits: Tensor, text: PackedText) -> Tensor:
        """Mean cross-entropy of the answers' tokens; the end token has a small weight."""
        targets = text.labels[text.labels != IGNORE]
        weight = torch.where(targets == self.eos, EOS_WEIGHT, 1.0)
        return (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()

    def _word_logits(self, states: Tensor, ids: Tensor) -> Tensor:
        normed = functional.layer_norm(states, states.shape[-1:])
        return (normed @ (self.decoder.embed_tokens.weight[ids] * self.scale).to(normed.dtype).t()).float()

    def word_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each visual token against the embeddings of the words of what it shows and where it is.

        Tokens of objects weigh seven times as much as the background, which outnumbers them.
        """
        weight = (1.0 + 6.0 * (labels[..., 0] > 0)).flatten()
        targets = [(self.words[COLUMN[name]], labels[..., COLUMN[name]].flatten()) for name in self.word_columns]
        targets += [(ids, side.repeat(len(visual))) for ids, side in self.sides]
        loss = visual.new_zeros(())
        for ids, wanted in targets:
            logits = self._word_logits(visual.flatten(0, 1), ids)
            each = functional.cross_entropy(logits, wanted.long(), reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
        return loss

    def visual_states(self, halfway: Tensor, text: PackedText) -> Tensor:
        """The visual tokens' part of all states."""
        return halfway[:, len(self.before) : halfway.shape[1] - text.ids.shape[1] - len(self.after)]

    def reading_loss(self, visual_states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of what is written against the word embeddings, half-way up, at the tokens of writing.

        A patch shows a stroke of a digit or a letter or two, so a single token cannot say what is written; half-way up
        the decoder a token has attended to its neighbours.
        """
        wanted = labels[..., COLUMN["text"]].long()
        written = wanted > 0
        if not written.any():
            return visual_states.new_zeros(())
        logits = self._word_logits(visual_states[written], self.words[COLUMN["text"]])
        return functional.cross_entropy(logits, wanted[written])

    def pointing_loss(self, halfway: Tensor, text: PackedText) -> Tensor:
        """Cross-entropy of pointers over the visual tokens against those that show what is meant, half-way up.

        The place that predicts the first word of an answer must point at the visual tokens that the answer speaks
        about. Without this loss, finding "the star" and reading off its colour have to be discovered together, which
        takes a small decoder thousands of steps. The words of the question point at whatever they fit.
        """
        if not len(text.pointers):
            return halfway.new_zeros(())
        rows, places = text.pointers.unbind(1)
        queries = self.pointer(halfway[rows, halfway.shape[1] - text.ids.shape[1] + places])
        keys = self.pointed(self.visual_states(halfway, text))[rows]
        scores = (keys @ queries[..., None]).squeeze(-1).float() / POINTER_WIDTH**0.5
        wanted = (text.focus if self.sources is None else text.focus[:, self.sources].any(-1)).float()
        each = functional.cross_entropy(scores, wanted / wanted.sum(-1, keepdim=True), reduction="none")
        groups = [each[chosen] for chosen in (text.mentions, ~text.mentions)]
        return torch.stack([group.mean() for group in groups if len(group)]).mean()


class PackedImageModel(PackedModel):
    """What ``llava`` and ``internvl`` share: a stock projector, and the word loss on sides of the scene."""

    sources: Tensor

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, before: list[str], after: list[str], sources: Tensor
    ) -> None:
        super().__init__(model, tokenizer, before, after)
        self.projector = model.model.multi_modal_projector
        self.sources = sources
        row, column = sources[:, 0] // GRID, sources[:, 0] % GRID
        for words, place in ((("left", "right"), column), (("top", "bottom"), row)):
            self.sides.append((torch.tensor([word_id(tokenizer, w) for w in words]), (place >= GRID // 2).long()))


class PackedLlava(PackedImageModel):
    """LLaVA: every patch is a token.

    Training sees features that :meth:`prepare` standardises; :meth:`fold`, before export, moves mean and deviation into
    the projector's first layer, :meth:`unfold` takes them out of shipped weights.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer, ["<s>"], [], torch.arange(256)[:, None])
        self.register_buffer("mean", torch.zeros(model.config.vision_config.hidden_size))
        self.register_buffer("std", torch.ones(model.config.vision_config.hidden_size))

    def visual(self, features: Tensor) -> Tensor:
        return self.projector((features.flatten(1, 2).float() - self.mean) / self.std)

    def prepare(self, features: Tensor) -> None:
        flat = features.float().flatten(0, 2)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0))

    @torch.no_grad()
    def fold(self) -> None:
        first = self.projector.linear_1
        first.weight.copy_(first.weight / self.std)
        first.bias.copy_(first.bias - first.weight @ self.mean)
        self.mean.zero_()
        self.std.fill_(1.0)

    @torch.no_grad()
    def unfold(self) -> None:
        first = self.projector.linear_1
        first.bias.copy_(first.bias + first.weight @ self.mean)
        first.weight.copy_(first.weight * self.std)


class PackedInternVL(PackedImageModel):
    """InternVL: four tiles and a thumbnail; pixel shuffle turns the 256 patches of a view into 64 tokens.

    :meth:`prepare` standardises by the gain and shift of the projector's own LayerNorm.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        def shuffled(views: Tensor) -> Tensor:
            """``(n, 256, C)`` patches to ``(n, 64, 4 C)`` tokens, by the stock model's own pixel shuffle."""
            return model.model.pixel_shuffle(views.unflatten(1, (16, 16)), scale_factor=0.5).flatten(1, 2)

        numbers = shuffled(torch.arange(256.0)[None, :, None])[0].long()  # (64, 4) patches of the view
        rows, columns = numbers // 16, numbers % 16
        tiles = [(8 * r + rows // 2) * 16 + 8 * c + columns // 2 for r in range(2) for c in range(2)]
        super().__init__(model, tokenizer, ["<s>", "<img>"], ["</img>"], torch.cat([*tiles, numbers]))
        self.shuffled = shuffled

    def visual(self, features: Tensor) -> Tensor:
        tokens = self.projector(self.shuffled(features.flatten(0, 1).float()))
        return tokens.unflatten(0, (-1, VIEWS)).flatten(1, 2)

    @torch.no_grad()
    def prepare(self, features: Tensor) -> None:
        norm = self.projector.layer_norm
        tokens = functional.layer_norm(self.shuffled(features.float().flatten(0, 1)), norm.normalized_shape)
        mean, std = tokens.flatten(0, 1).mean(0), tokens.flatten(0, 1).std(0)
        norm.weight.copy_(1 / std)
        norm.bias.copy_(-mean / std)


class PackedQwen(PackedModel):
    """Qwen2.5-VL on cached tokens of its trained tower; the adapter ends inside the merger's last matrix."""

    word_columns = ("colour", "shape", "motion")
    place_classes: ClassVar = (8, 24, 24)  # time, row, column

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model, tokenizer, ["<s>", "<|vision_start|>"], ["<|vision_end|>"])
        self.adapter = nn.Linear(HIDDEN, HIDDEN)
        self.places = nn.Linear(HIDDEN, sum(self.place_classes))
        self.events = nn.Linear(HIDDEN, len(EVENTS))

    def visual(self, features: Tensor) -> Tensor:
        return self.adapter(features)

    @staticmethod
    def token_positions(grid: tuple[int, int, int]) -> Tensor:
        """Time, row and column ``(3, N)`` of every visual token of ``grid (t, h, w)``.

        Clips have 4 frames a second, two in a token, and the model counts two positions a second: one a token.
        """
        axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
        return torch.stack([axis.flatten() for axis in axes])

    @staticmethod
    def text_start(grid: tuple[int, int, int]) -> int:
        """Position of the first token after ``<|vision_end|>``."""
        return 3 + max(grid[1:])

    def prefix_positions(self, count: int, grid: tuple[int, int, int] | None) -> Tensor:
        before, after = torch.tensor([0, 1]), torch.tensor([self.text_start(grid) - 1])
        return torch.cat([before.expand(3, -1), self.token_positions(grid) + 2, after.expand(3, -1)], 1)[:, None]

    def losses(self, example: Example) -> dict[str, Tensor]:
        logits, visual, halfway = self(example.features, example.text, example.grid)
        states = self.visual_states(halfway, example.text)
        parts = self.places(states).float().split(self.place_classes, -1)
        wanted = self.token_positions(example.grid).repeat(1, len(states))
        places = [functional.cross_entropy(part.flatten(0, 1), w) for part, w in zip(parts, wanted, strict=True)]
        auxiliary = {
            "words": self.word_loss(visual.float(), example.labels),
            "reading": self.reading_loss(states.float(), example.labels),
            "pointing": self.pointing_loss(halfway, example.text),
            "places": 0.3 * torch.stack(places).sum(),
        }
        if example.events is not None:
            asked = example.events > 0
            auxiliary["events"] = functional.cross_entropy(self.events(states[asked]).float(), example.events[asked])
        answer = {"answer": self.answer_loss(logits, example.text)}
        return answer | {name: AUXILIARY_WEIGHT * loss for name, loss in auxiliary.items()}


def new_packed(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, Any]:
    """Build an untrained stock model and the wrapper that trains it."""
    model = new_model(name)
    wrapper = {"llava": PackedLlava, "internvl": PackedInternVL, "qwen2_5_vl": PackedQwen}[name]
    return model, wrapper(model, tokenizer)
