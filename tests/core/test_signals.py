"""Signals: what each computes from an observation, against a softmax over the whole matrix."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from vtc.core.context import VisualContext
from vtc.core.observations import (
    DecoderAttention,
    DecoderHidden,
    PatchPixels,
    PromptText,
    TokenGrids,
    VisionAttention,
    VisionHidden,
)
from vtc.core.signals import (
    SHARED,
    ClsAttention,
    HiddenStates,
    Origin,
    PreProjector,
    ReceivedAttention,
    Signal,
    TextAttention,
    TextEmbeds,
    VisionKeys,
    VisionSignal,
    resolve_layers,
)
from vtc.errors import ConfigError, InputError
from vtc.kernels import VisibilityMask, patch_entropy
from vtc.kernels import reference as specification
from vtc.selectors.aim import PageRank
from vtc.selectors.learned.atp import ModalityAttention, TextValues
from vtc.selectors.prumerge import WideClsAttention
from vtc.selectors.todre import AttentionExchange
from vtc.selectors.vflowopt import ContextRelevance, PixelEntropy

ALL: tuple[type[Signal], ...] = (
    *SHARED,
    PageRank,
    ModalityAttention,
    TextValues,
    AttentionExchange,
    ContextRelevance,
    PixelEntropy,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def softmax(query: Tensor, key: Tensor, scaling: float, allowed: Tensor | None = None) -> Tensor:
    """(B, H, Q, K) with all heads of the keys written out."""
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3) * scaling
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.softmax(dim=-1).nan_to_num(0.0)


# --- the tower --------------------------------------------------------------------------------------------------------


def tower(batch: int = 2, n: int = 9, prefix: int = 1, mask: Tensor | None = None) -> VisionAttention:
    return VisionAttention(
        draw(batch, 4, n, 6), draw(batch, 2, n, 6, seed=1), draw(batch, 2, n, 6), 0.4, mask, None, prefix
    )


PADDED = torch.arange(9).lt(7).expand(2, 1, 1, 9)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["all", "padded"])
def test_tower_attention_is_that_of_the_matrix(mask: Tensor | None) -> None:
    raw = tower(mask=mask)
    whole = softmax(raw.queries, raw.keys, raw.scaling, mask)
    torch.testing.assert_close(ClsAttention().compute(raw), whole[:, :, 0].transpose(1, 2))
    seen = whole if mask is None else whole[:, :, :7]
    torch.testing.assert_close(ReceivedAttention().compute(raw), seen.mean(dim=2).transpose(1, 2))
    expected = torch.stack(
        [
            specification.context_relevance_of(m, 1.1, "sum")
            for m in softmax(raw.queries, raw.keys, raw.scaling).mean(1)[:, 1:, 1:]
        ]
    )
    if mask is None:
        torch.testing.assert_close(ContextRelevance(t=1.1).compute(raw)[:, 1:], expected)


def test_what_cls_sees_of_merged_tokens_is_what_it_sees_of_those_they_stand_for() -> None:
    raw = tower()  # the last token stands for three; behind it is padding
    times = torch.tensor([1] * 8 + [3])
    apart = VisionAttention(*(x.repeat_interleave(times, dim=2) for x in (raw.queries, raw.keys, raw.values)), 0.4)
    padded = [torch.cat([x, x[:, :, :2]], dim=2) for x in (raw.queries, raw.keys, raw.values)]
    mask = torch.arange(11).lt(9).expand(2, 1, 1, 11)
    bias = torch.cat([times, torch.ones(2)]).log().expand(2, 11)
    merged = VisionAttention(*padded, 0.4, mask, None, 1, bias)
    for signal in (ClsAttention(), WideClsAttention()):
        whole, found = signal.compute(apart), signal.compute(merged)
        expected = torch.cat([whole[:, :8], whole[:, 8:].sum(dim=1, keepdim=True), torch.zeros_like(whole[:, :2])], 1)
        torch.testing.assert_close(found, expected, msg=lambda text, s=signal: f"{s.name}: {text}")


@pytest.mark.parametrize(
    "signal", [ClsAttention(), ReceivedAttention(), VisionKeys(), ContextRelevance(t=1.0)], ids=lambda s: s.name
)
def test_packed_sequences_are_separate_calls(signal: VisionSignal) -> None:
    lengths, raw = [4, 9, 6], tower(batch=1, n=19, prefix=0)
    bounds = torch.tensor([0, 4, 13, 19], dtype=torch.int32)
    packed = VisionAttention(raw.queries, raw.keys, raw.values, raw.scaling, None, bounds)
    parts = [x.split(lengths, dim=2) for x in (raw.queries, raw.keys, raw.values)]
    alone = [signal.compute(VisionAttention(q, k, v, raw.scaling)) for q, k, v in zip(*parts, strict=True)]
    torch.testing.assert_close(signal.compute(packed), torch.cat(alone, dim=1))
    assert [part.queries.shape[2] for part in packed.sequences()] == lengths
    assert list(raw.sequences()) == [raw]


def test_keys_have_their_heads_side_by_side() -> None:
    raw = tower()
    keys = VisionKeys().compute(raw)
    assert keys.shape == (2, 9, 12)
    assert torch.equal(keys[1, 3, 6:], raw.keys[1, 1, 3])
    assert torch.equal(PreProjector().compute(VisionHidden(keys)), keys)


def test_values_of_layers_are_presented() -> None:
    values = draw(5, 3, 4)  # tokens, layers, heads
    assert torch.equal(ClsAttention().present(values), values.permute(1, 2, 0))
    assert torch.equal(ReceivedAttention().present(values)[2, 1], values[:, 2, 1])
    assert torch.equal(VisionKeys().present(values), values[:, -1])
    assert torch.equal(ContextRelevance().present(values[..., 0]), values[:, -1, 0])


@pytest.mark.parametrize("packed", [False, True])
def test_entropy_is_a_share_of_each_crop(packed: bool) -> None:
    crops = (draw(3, 8, 8), draw(3, 8, 8, seed=5))
    mean, std = (0.4, 0.5, 0.6), 0.2
    found = PixelEntropy(mean, std).compute(PatchPixels(crops, (4, 4), packed))
    each = [patch_entropy(crop, torch.tensor(mean), torch.full((3,), std), size=(4, 4)).softmax(0) for crop in crops]
    assert torch.equal(found, torch.cat(each)[None] if packed else torch.stack(each))


# --- the decoder ------------------------------------------------------------------------------------------------------


def decoder(past: int = 0, room: int = 0) -> DecoderAttention:
    """Two rows of eight tokens: two of text, three visual, three of text; the second row begins with two of padding."""
    source = torch.arange(8).expand(2, 8) + past
    source = torch.where(torch.tensor([[False] * 8, [True] * 2 + [False] * 6]), -1, source)
    earlier = torch.arange(past).expand(2, past)
    visual = torch.zeros(2, 8, dtype=torch.bool)
    visual[0, 2:5] = visual[1, 4:6] = True
    valid = source >= 0
    return DecoderAttention(
        draw(2, 4, 8, 6),
        draw(2, 2, past + 8 + room, 6, seed=1),
        draw(2, 2, past + 8 + room, 6),
        0.4,
        VisibilityMask(source, torch.cat([earlier, source], dim=1)),
        past + 8,
        valid,
        valid & ~visual,
        visual,
        torch.tensor([7, 7]),
    )


def whole_of(raw: DecoderAttention, past: int) -> Tensor:
    """(B, H, 8, P): causal attention without padding."""
    keys = raw.keys[:, :, : raw.key_length]
    source, place = raw.visibility.query_positions, raw.visibility.key_positions
    allowed = (place[:, None] <= source[:, :, None]) & (place[:, None] >= 0) & (source[:, :, None] >= 0)
    return softmax(raw.queries, keys, raw.scaling, allowed[:, None])[..., past:]


CONVERSATIONS = pytest.mark.parametrize(("past", "room"), [(0, 0), (5, 0), (5, 7)], ids=["first", "later", "static"])


@CONVERSATIONS
def test_text_attention_is_the_row_of_the_last_token(past: int, room: int) -> None:
    raw = decoder(past, room)
    values = TextAttention().compute(raw)
    assert values.shape == (2, 8, 4, 1)
    torch.testing.assert_close(values[..., 0], whole_of(raw, past)[:, :, 7].transpose(1, 2))
    assert torch.equal(TextAttention().present(values[0]), values[0].permute(1, 2, 0))


@CONVERSATIONS
@pytest.mark.parametrize(("window", "blocks"), [(3, False), (2, True)], ids=["window", "window-and-blocks"])
def test_text_attention_sees_what_its_layer_sees(past: int, room: int, window: int, blocks: bool) -> None:
    raw = decoder(past, room)
    # The prompt ends with a picture, whose tokens see each other across the window.
    block = torch.tensor([[-1] * 4 + [0] * 4]).expand(2, 8) if blocks else None
    visibility = dataclasses.replace(raw.visibility, window=window, blocks=block)
    raw = dataclasses.replace(raw, visibility=visibility)
    allowed = torch.zeros(past + 8, dtype=torch.bool)
    allowed[-4 if blocks else -window :] = True
    expected = softmax(raw.queries[:, :, 7:], raw.keys[:, :, : past + 8], raw.scaling, allowed)[:, :, 0, past:]
    torch.testing.assert_close(TextAttention().compute(raw)[..., 0], expected.transpose(1, 2))


@CONVERSATIONS
@pytest.mark.parametrize("text", ["after", "all"])
def test_modalities_receive_from_each_other(past: int, room: int, text: str) -> None:
    raw = decoder(past, room)
    mean = whole_of(raw, past).mean(dim=1)
    received = ModalityAttention(text).compute(raw)
    exchange = AttentionExchange(text).compute(raw)
    for row in range(2):
        asking = raw.text[row] & (raw.visual[row].cumsum(0) > 0) if text == "after" else raw.text[row]
        expected = torch.stack([mean[row, asking].mean(dim=0), mean[row, raw.visual[row]].mean(dim=0)])
        torch.testing.assert_close(ModalityAttention().present(received[row]), expected)
        sums = torch.stack([expected[0, raw.visual[row]].sum(), expected[1, asking].sum()])
        torch.testing.assert_close(exchange[row], sums)


@CONVERSATIONS
@pytest.mark.parametrize("text", ["after", "all"])
def test_values_of_the_text_are_averaged(past: int, room: int, text: str) -> None:
    raw = decoder(past, room)
    raw.values[1, :, past : past + 2] = torch.nan  # padding
    found = TextValues(text).compute(raw)
    for row in range(2):
        asking = raw.text[row] & (raw.visual[row].cumsum(0) > 0) if text == "after" else raw.text[row]
        own = torch.stack([raw.values[row, :, past + at].flatten() for at in asking.nonzero()[:, 0].tolist()])
        torch.testing.assert_close(found[row], own.mean(dim=0))


def test_a_row_without_text_behind_its_image_is_named() -> None:
    raw = decoder()
    raw.text[1, 6:] = False
    with pytest.raises(InputError, match=r'row 1 of the prompt has no text behind its first image.*text="all"'):
        raw.text_and_visual("after")
    raw.text[1] = raw.text[0] & False
    with pytest.raises(InputError, match=r"row 1 of the prompt has no text$"):
        raw.text_and_visual("all")


def test_pagerank_is_the_walk_over_the_logits() -> None:
    raw, walk = decoder(), {"temperature": 0.5, "iterations": 3, "damping": 0.1}
    logits = raw.queries @ raw.keys.repeat_interleave(2, dim=1).transpose(2, 3) * raw.scaling
    place = torch.arange(8)
    hidden = torch.finfo(torch.float32).min
    allowed = (place <= place[:, None]) & raw.valid[:, None, None] & raw.valid[:, None, :, None]
    expected = specification.pagerank_of_logits(logits.masked_fill(~allowed, hidden), **walk)
    found = PageRank(**walk).compute(raw)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, 2:], expected[1, 2:], rtol=1e-4, atol=1e-5)


def test_what_is_passed_through() -> None:
    hidden = draw(2, 8, 3)
    assert torch.equal(HiddenStates().compute(DecoderHidden(hidden)), hidden)
    assert torch.equal(TextEmbeds().compute(PromptText(torch.arange(8), hidden[0])), hidden[0])


def test_origin_counts_views_times_rows_and_columns() -> None:
    origin = Origin().compute(TokenGrids(((1, 1, 2), (2, 2, 1))))
    assert origin.tolist() == [
        [0, 0, 0, 0, 1, 2],
        [0, 0, 0, 1, 1, 2],
        [1, 0, 0, 0, 2, 1],
        [1, 0, 1, 0, 2, 1],
        [1, 1, 0, 0, 2, 1],
        [1, 1, 1, 0, 2, 1],
    ]


# --- parameters, shapes, lookup ---------------------------------------------------------------------------------------


def test_layers_are_counted_like_indices() -> None:
    assert ClsAttention((-8, -1)).vision_layers(24, 22) == (16, 23)
    assert ClsAttention().vision_layers(24, 22) == (22,)
    assert resolve_layers((0, -1), 3, "x") == (0, 2)
    for layer in (24, -25):
        with pytest.raises(ConfigError, match=f"cls_attention: layer {layer} was asked for, .* layers 0 to 23"):
            ClsAttention((layer,)).vision_layers(24, 22)
    assert TextAttention().vision_layers(24, 22) == ()


def test_equal_parameters_make_equal_signals() -> None:
    assert ClsAttention((1, 2)) == ClsAttention((1, 2))
    assert len({ContextRelevance(t=1.0), ContextRelevance(t=1.0), ContextRelevance(t=2.0)}) == 2
    assert ClsAttention((1,)) != ReceivedAttention((1,))
    assert VisionKeys(modalities=("image",)).wanted_of("image")
    assert not VisionKeys(modalities=("image",)).wanted_of("video")
    assert Origin().wanted_of("video")


def test_names_are_distinct() -> None:
    assert len({signal.name for signal in ALL}) == len(ALL)


@pytest.mark.parametrize("signal", ALL, ids=lambda signal: signal.name)
def test_shapes_are_checked_and_tell_n(signal: type[Signal]) -> None:
    sizes = [7 if name == "N" else int(name) if name.isdecimal() else 3 for name in signal.axes]
    value = torch.zeros(sizes)
    signal().check(value, 7)
    assert signal.count(value) == (7 if "N" in signal.axes else None)
    with pytest.raises(InputError, match=f"{signal.name} must have {len(sizes)} axes"):
        signal().check(value[None], 7)
    if "N" in signal.axes:
        with pytest.raises(InputError, match=f"{signal.name} must have .* with N=8"):
            signal().check(value, 8)
        with pytest.raises(InputError, match=f"{signal.name}: a scalar has no axis of N tokens"):
            signal.count(torch.tensor(1.0))


@dataclass(frozen=True)
class Half(Origin):
    """A special kind of origin."""

    name: ClassVar[str] = "half"


def test_a_context_finds_signals_by_type_and_by_value() -> None:
    one, two = torch.rand(1, 1, 4), torch.rand(2, 1, 4)
    signals = {ClsAttention((1,)): one, ClsAttention((1, 2)): two, Half(): torch.zeros(4, 6)}
    ctx = VisualContext(torch.rand(4, 2), 2, torch.Generator(), ((1, 2, 2),), signals=signals).check()
    assert ctx[ClsAttention((1, 2))] is two
    assert ctx[Origin] is ctx[Half]
    with pytest.raises(InputError, match="2 signals cls_attention; name one by its parameters"):
        ctx[ClsAttention]
    with pytest.raises(InputError, match="needs keys, which was not supplied"):
        ctx[VisionKeys]
    with pytest.raises(InputError, match="needs cls_attention, which was not supplied"):
        ctx[ClsAttention((3,))]
