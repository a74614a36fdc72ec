"""Configurations of the image models, and the wrapper that trains one of them on cached tower features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from eval.reference.train import tower
from eval.reference.train.labels import word_ids
from eval.reference.train.packing import EOS_WEIGHT, IGNORE, PackedText, attention_mask

HIDDEN = 256
LAYERS = 6


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


class PackedLlava(nn.Module):
    """Projector, decoder and head of a LLaVA model, fed with cached features and packed questions.

    Parameters
    ----------
    model : LlavaForConditionalGeneration
        The stock model whose parts are trained (its tower stays untouched and unused).
    tokenizer : PreTrainedTokenizerBase
        The shared tokenizer.
    mean, std : Tensor (384,)
        Statistics of the features. Training sees standardised features; :meth:`fold` moves the statistics into the
        projector's first layer, so that the stock model sees raw ones and computes the same.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, mean: Tensor, std: Tensor
    ) -> None:
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.decoder = model.model.language_model
        self.head = model.lm_head
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.scale = nn.Parameter(torch.ones(()))  # temperature of the word loss; not part of the shipped model
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.prefix = torch.tensor([tokenizer.bos_token_id] + [image] * 256)
        self.groups = word_ids(tokenizer)

    def visual(self, features: Tensor) -> Tensor:
        """Cached features ``(B, views, 256, 384)`` to visual tokens ``(B, 256, HIDDEN)``."""
        return self.projector((features.flatten(1, 2).float() - self.mean) / self.std)

    def forward(self, features: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        """Logits ``(answers, vocabulary)`` at every labelled place, and the visual tokens ``(B, N, HIDDEN)``."""
        visual = self.visual(features)
        hidden = self.decode(visual, text)
        return self.head(hidden[text.labels != IGNORE]).float(), visual

    def decode(self, visual: Tensor, text: PackedText, kept: Tensor | None = None) -> Tensor:
        """Hidden states ``(B, T, HIDDEN)`` of the questions behind ``visual (B, N, HIDDEN)``.

        ``kept (B, N)`` gives the original index of each visual token where only some are passed; positions are kept.
        """
        batch = len(visual)
        is_image = self.prefix == self.prefix.mode().values
        first = int(is_image.nonzero()[0])
        before, after = self.prefix[:first], self.prefix[~is_image][first:]
        embed = self.decoder.embed_tokens
        rows = [
            embed(before).expand(batch, -1, -1).to(visual.dtype),
            visual,
            embed(after).expand(batch, -1, -1).to(visual.dtype),
            embed(text.ids).to(visual.dtype),
        ]
        count = int(is_image.sum())
        index = torch.arange(count).expand(batch, -1) if kept is None else kept
        positions = [
            torch.arange(first).expand(batch, -1),
            index + first,
            torch.arange(first + count, len(self.prefix)).expand(batch, -1),
            text.positions,
        ]
        prefix_length = len(self.prefix) - count + visual.shape[1]
        out = self.decoder(
            inputs_embeds=torch.cat(rows, 1),
            attention_mask=attention_mask(prefix_length, text.segments),
            position_ids=torch.cat(positions, 1),
            use_cache=False,
        )
        return out.last_hidden_state[:, prefix_length:]

    def word_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each visual token against the embeddings of the words of what it shows.

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
        return loss

    def answer_loss(self, logits: Tensor, targets: Tensor, eos: int) -> Tensor:
        """Mean cross-entropy of answer tokens, the end token weighing little."""
        weight = torch.where(targets == eos, EOS_WEIGHT, 1.0)
        return (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()

    @torch.no_grad()
    def fold(self) -> None:
        """Move the feature statistics into the projector's first layer; afterwards it takes raw features."""
        first = self.projector.linear_1
        first.weight.copy_(first.weight / self.std)
        first.bias.copy_(first.bias - first.weight @ self.mean)
        self.mean.zero_()
        self.std.fill_(1.0)


def new_llava(tokenizer: PreTrainedTokenizerBase) -> LlavaForConditionalGeneration:
    """An untrained model of the right shape."""
    return LlavaForConditionalGeneration(llava_config(tokenizer))
