"""Sites and stages: their words, their order and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from vtc.core.actions import Action
from vtc.core.signals import ClsAttention
from vtc.core.sites import (
    SITES,
    BeforeDecoder,
    CacheAfterPrefill,
    CacheWhileDecoding,
    DecoderLayer,
    Pixels,
    Site,
    VisionLayer,
    parse_site,
)
from vtc.core.stage import Stage
from vtc.errors import ConfigError

WORDS = {
    "pixels": Pixels(),
    "vision:0": VisionLayer(0),
    "vision:23": VisionLayer(23),
    "decoder": BeforeDecoder(),
    "decoder:1": DecoderLayer(1),
    "decoder:16": DecoderLayer(16),
    "cache": CacheAfterPrefill(),
    "cache:decoding": CacheWhileDecoding(),
}
"""Words of sites in the order in which tokens meet them."""


@pytest.mark.parametrize(("word", "site"), WORDS.items(), ids=WORDS)
def test_words_round_trip(word: str, site: Site) -> None:
    assert str(site) == word
    assert parse_site(word) == site
    assert parse_site(site) is site
    assert hash(parse_site(word)) == hash(site)


def test_order_is_that_of_the_tokens() -> None:
    sites = list(WORDS.values())
    assert {type(site) for site in sites} == set(SITES)
    backwards = sites[::-1]
    assert sorted(backwards, key=lambda site: site.order) == sites
    assert len({site.order for site in sites}) == len(sites)
    assert VisionLayer(3) != DecoderLayer(3), "equal numbers in different places"


@pytest.mark.parametrize(
    "at",
    ["", "Decoder", "decoder:", "decoder:-1", "decoder:1.0", "vision", "cache:2", "pixels:0", "decoder:x", 3, None],
)
def test_what_is_no_site_is_told_the_words(at: Any) -> None:
    message = r"one of the words pixels, decoder, cache, cache:decoding, vision:K, decoder:K \(K a layer\), got "
    with pytest.raises(ConfigError, match=message) as error:
        parse_site(at)
    assert repr(at) in str(error.value)


@pytest.mark.parametrize("layer", [-1, True, False, 1.0, "1", None])
@pytest.mark.parametrize(("kind", "first"), [(VisionLayer, 0), (DecoderLayer, 1)])
def test_layers_are_integers(kind: Any, first: int, layer: Any) -> None:
    with pytest.raises(ConfigError, match=f"{kind.word}:K is an integer of at least {first}, got {layer!r}"):
        kind(layer)


def test_decoder_layer_0_points_to_the_site_before_the_decoder() -> None:
    assert VisionLayer(0).layer == 0
    for make in (lambda: DecoderLayer(0), lambda: parse_site("decoder:0")):
        with pytest.raises(ConfigError, match=r'at least 1, got 0.*layer 0 tokens leave at "decoder"'):
            make()


def test_stages_default_to_keeping_before_the_decoder() -> None:
    assert Stage() == Stage(BeforeDecoder(), requires=(), keep=None, action=Action.KEEP)
    stage = Stage(DecoderLayer(2), requires=(ClsAttention(),), keep=0.5, action=Action.MERGE)
    assert hash(stage) == hash(Stage(DecoderLayer(2), (ClsAttention(),), 0.5, Action.MERGE))
    assert Action("merge") is Action.MERGE
    assert [Stage(keep=keep).keep for keep in (0, 0.5, 1)] == [0, 0.5, 1]
    for keep in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=f"fraction between 0 and 1 of what enters it, got {keep}"):
            Stage(keep=keep)
