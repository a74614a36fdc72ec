"""Configurations of the image models, and the wrappers that train them on cached tower features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.reference.train import tower
from eval.reference.train.labels import side_ids, side_labels, word_ids
from eval.reference.train.packing import EOS_WEIGHT, IGNORE, PackedText, attention_mask

HIDDEN = 256
LAYERS = 6
VIEWS = 5  # InternVL: four tiles and the thumbnail


def text_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """The decoder: six layers, grouped-query attention (two key-value heads for four query heads)."""
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=HIDDEN,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )


def llava_config(tokenizer: PreTrainedTokenizerBase) -> LlavaConfig:
    """LLaVA-1.5's shape: features of the second-last tower layer without [CLS], two-layer projector, Llama decoder."""
    return LlavaConfig(
        vision_config=tower.config(tower.IMAGE_SIZE),
        text_config=text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=256,
        tie_word_embeddings=False,
    )


def internvl_config(tokenizer: PreTrainedTokenizerBase) -> InternVLConfig:
    """InternVL's shape around the same tower: 2 x 2 tiles and a thumbnail, pixel shuffle, the same decoder."""
    vision = InternVLVisionConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        attention_bias=True,
        layer_norm_eps=1e-6,
        layer_scale_init_value=1.0,
        image_size=[tower.IMAGE_SIZE, tower.IMAGE_SIZE],
        patch_size=[tower.PATCH, tower.PATCH],
        use_mean_pooling=False,
        use_mask_token=False,
    )
    return InternVLConfig(
        vision_config=vision,
        text_config=text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=64,
        downsample_ratio=0.5,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


class PackedModel(nn.Module):
    """Projector, decoder and head of a stock model, fed with cached features and packed questions.

    The model's parts are trained in place; its tower stays untouched and unused.

    Parameters
    ----------
    model : PreTrainedModel
        A LLaVA-like model: ``model.model.multi_modal_projector``, ``model.model.language_model``, ``model.lm_head``.
    tokenizer : PreTrainedTokenizerBase
        The shared tokenizer.
    prefix : list of int
        Tokens of the chat template up to the first word of the question.
    image_token : int
        Which of them are placeholders.
    """

    sources: Tensor
    """``(N, m)`` long: the patches of the scene that each visual token shows."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefix: list[int], image_token: int
    ) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.decoder = model.model.language_model
        self.head = model.lm_head
        self.scale = nn.Parameter(torch.ones(()))  # temperature of the word loss; not part of the shipped model
        self.prefix = torch.tensor(prefix)
        self.is_image = self.prefix == image_token
        self.groups = word_ids(tokenizer)
        self.sides = side_ids(tokenizer)
        self.pointer = nn.Linear(HIDDEN, 64)  # these two serve the pointing loss and are not shipped either
        self.pointed = nn.Linear(HIDDEN, 64)

    def visual(self, features: Tensor) -> Tensor:
        """Cached features ``(B, views, 256, 384)`` to visual tokens ``(B, N, HIDDEN)``."""
        raise NotImplementedError

    def prepare(self, features: Tensor) -> None:
        """Look at some features ``(n, views, 256, 384)`` before training, to standardise what the projector sees."""
        raise NotImplementedError

    def fold(self) -> None:
        """Make the stock model compute what this wrapper computes; called once, before export."""

    def unfold(self) -> None:
        """The opposite of :meth:`fold`, for weights that come from the stock model."""

    def token_labels(self, labels: Tensor) -> Tensor:
        """Labels of visual tokens ``(B, N, groups)`` from those of patches ``(B, patches, groups)``.

        A token over several patches takes the labels of the first that shows anything.
        """
        candidates = labels[:, self.sources]
        first = (candidates[..., 0] > 0).int().argmax(-1)
        return candidates.gather(2, first[..., None, None].expand(-1, -1, 1, labels.shape[-1])).squeeze(2)

    def forward(self, features: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(answers, vocabulary)`` where labelled, visual tokens ``(B, N, HIDDEN)``, states half-way up."""
        visual = self.visual(features)
        hidden, halfway = self.decode(visual, text)
        return self.head(hidden[text.labels != IGNORE]).float(), visual, halfway

    def _visual_part(self, halfway: Tensor) -> Tensor:
        first = int(self.is_image.nonzero()[0])
        return halfway[:, first : first + len(self.sources)]

    def reading_loss(self, halfway: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of what is written against the word embeddings, at the tokens of writing, half-way up.

        One patch shows a stroke of a digit or a letter or two, so the word loss on single tokens cannot teach reading;
        half-way up the decoder a token has seen its neighbours. ``labels (B, N, groups)``.
        """
        wanted = labels[..., -1]
        written = wanted > 0
        if not written.any():
            return halfway.new_zeros(())
        states = functional.layer_norm(self._visual_part(halfway)[written], halfway.shape[-1:])
        embeddings = self.decoder.embed_tokens.weight[self.groups[-1]] * self.scale
        return functional.cross_entropy((states @ embeddings.to(states.dtype).t()).float(), wanted[written].long())

    def pointing_loss(self, halfway: Tensor, text: PackedText) -> Tensor:
        """Where the answer is to be found: cross-entropy of pointers against the patches that they should point at.

        Half-way up the decoder, the place that will say the first word of the answer must point at the visual tokens
        that the answer speaks about. Without this, finding "the star" and reading off its colour have to be discovered
        together, which takes a small decoder thousands of steps. The words of the question point as well, at whatever
        they fit: that is learned at once, and aligns the pointers for the places that have to earn it.
        ``halfway (B, P + T, HIDDEN)``.
        """
        if not len(text.spots):
            return halfway.new_zeros(())
        prefix_length = halfway.shape[1] - text.ids.shape[1]
        rows, places = text.spots.unbind(1)
        queries = self.pointer(halfway[rows, prefix_length + places])
        keys = self.pointed(self._visual_part(halfway))[rows]
        scores = (keys @ queries[..., None]).squeeze(-1).float() / queries.shape[-1] ** 0.5
        wanted = text.focus[:, self.sources].any(-1).float()
        each = functional.cross_entropy(scores, wanted / wanted.sum(-1, keepdim=True), reduction="none")
        groups = [each[chosen] for chosen in (text.mentions, ~text.mentions)]
        return torch.stack([group.mean() for group in groups if len(group)]).mean()

    def decode(self, visual: Tensor, text: PackedText, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States ``(B, T, HIDDEN)`` of the questions behind ``visual (B, N, HIDDEN)``, and all states half-way up.

        ``kept (B, N)`` gives the original index of each visual token where only some are passed; positions are kept.
        """
        batch = len(visual)
        first = int(self.is_image.nonzero()[0])
        before, after = self.prefix[:first], self.prefix[~self.is_image][first:]
        embed = self.decoder.embed_tokens
        rows = [
            embed(before).expand(batch, -1, -1).to(visual.dtype),
            visual,
            embed(after).expand(batch, -1, -1).to(visual.dtype),
            embed(text.ids).to(visual.dtype),
        ]
        count = int(self.is_image.sum())
        index = torch.arange(count).expand(batch, -1) if kept is None else kept
        positions = [
            torch.arange(first).expand(batch, -1),
            index + first,
            torch.arange(first + count, len(self.prefix)).expand(batch, -1),
            text.positions,
        ]
        prefix_length = len(self.prefix) - count + visual.shape[1]
        mask = attention_mask(prefix_length, text.segments)
        hidden, halfway = self.layers(torch.cat(rows, 1), mask, torch.cat(positions, 1))
        return hidden[:, prefix_length:], halfway

    def layers(self, hidden: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's own layers, run one by one to get at the states half-way; returns ``(last, halfway)``."""
        rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
        halfway = hidden
        for number, layer in enumerate(self.decoder.layers, 1):
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            if number == LAYERS // 2:
                halfway = hidden
        return self.decoder.norm(hidden), halfway

    def word_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each visual token against the embeddings of the words of what it shows and where it is.

        ``labels (B, N, groups)`` as :func:`~eval.reference.train.labels.patch_labels`; object patches weigh seven times
        as much as the background, which outnumbers them.
        """
        flat = functional.layer_norm(visual, visual.shape[-1:])
        weight = (1.0 + 6.0 * (labels[..., 0] > 0)).flatten()
        loss = visual.new_zeros(())
        for column, ids in enumerate(self.groups):
            embeddings = self.decoder.embed_tokens.weight[ids] * self.scale
            logits = (flat @ embeddings.to(flat.dtype).t()).float().flatten(0, 1)
            each = functional.cross_entropy(logits, labels[..., column].flatten().long(), reduction="none")
            loss = loss + (each * weight).sum() / weight.sum()
        sides = side_labels(self.sources[:, 0]).expand(len(visual), -1, -1).flatten(0, 1)
        for column, ids in enumerate(self.sides):
            embeddings = self.decoder.embed_tokens.weight[ids] * self.scale
            logits = (flat @ embeddings.to(flat.dtype).t()).float().flatten(0, 1)
            loss = (
                loss
                + (functional.cross_entropy(logits, sides[:, column], reduction="none") * weight).sum() / weight.sum()
            )
        return loss

    def answer_loss(self, logits: Tensor, targets: Tensor, eos: int) -> Tensor:
        """Mean cross-entropy of answer tokens, the end token weighing little."""
        weight = torch.where(targets == eos, EOS_WEIGHT, 1.0)
        return (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()


class PackedLlava(PackedModel):
    """LLaVA: every patch is a token.

    Training sees standardised features; :meth:`fold` moves mean and deviation into the projector's first layer, so that
    the stock model sees raw ones and computes the same.
    """

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        image = tokenizer.convert_tokens_to_ids("<image>")
        super().__init__(model, tokenizer, [tokenizer.bos_token_id] + [image] * 256, image)
        width = model.config.vision_config.hidden_size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.sources = torch.arange(256)[:, None]

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


class PackedInternVL(PackedModel):
    """InternVL: four tiles and a thumbnail, pixel shuffle turns each view's 256 patches into 64 tokens.

    The projector begins with a LayerNorm of its own; :meth:`prepare` sets its gain and shift so that training begins on
    standardised features, and nothing has to be folded.
    """

    def __init__(self, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        context, start, end = tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>", "</img>"])
        prefix = [tokenizer.bos_token_id, start, *[context] * 64 * VIEWS, end]
        super().__init__(model, tokenizer, prefix, context)
        self._shuffle = model.model.pixel_shuffle
        self.sources = self._sources()

    def _shuffled(self, views: Tensor) -> Tensor:
        """``(n, 256, C)`` patches to ``(n, 64, 4 C)`` tokens, by the stock model's own pixel shuffle."""
        grid = views.unflatten(1, (16, 16))
        return self._shuffle(grid, scale_factor=0.5).flatten(1, 2)

    def _sources(self) -> Tensor:
        """Which patches of the 16 x 16 board of the scene each token shows, found by shuffling patch numbers."""
        numbers = self._shuffled(torch.arange(256.0)[None, :, None])[0].long()  # (64, 4) patches of the view
        rows, columns = numbers // 16, numbers % 16
        tiles = [(8 * r + rows // 2) * 16 + 8 * c + columns // 2 for r in range(2) for c in range(2)]
        return torch.cat([*tiles, numbers])

    def visual(self, features: Tensor) -> Tensor:
        batch, views = features.shape[:2]
        tokens = self.projector(self._shuffled(features.flatten(0, 1).float()))
        return tokens.unflatten(0, (batch, views)).flatten(1, 2)

    @torch.no_grad()
    def prepare(self, features: Tensor) -> None:
        norm = self.projector.layer_norm
        tokens = functional.layer_norm(self._shuffled(features.float().flatten(0, 1)), norm.normalized_shape)
        mean, std = tokens.flatten(0, 1).mean(0), tokens.flatten(0, 1).std(0)
        norm.weight.copy_(1 / std)
        norm.bias.copy_(-mean / std)


def new_packed(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, PackedModel]:
    """An untrained stock model and the wrapper that trains it; ``name`` is ``"llava"`` or ``"internvl"``."""
    if name == "llava":
        llava = LlavaForConditionalGeneration(llava_config(tokenizer))
        return llava, PackedLlava(llava, tokenizer)
    internvl = InternVLForConditionalGeneration(internvl_config(tokenizer))
    return internvl, PackedInternVL(internvl, tokenizer)
