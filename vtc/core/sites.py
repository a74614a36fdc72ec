"""Sites: the places on the way from pixels to the key-value cache where visual tokens can leave.

Tokens meet the sites in the order of this file. In configurations and on the command line a site is a word:

=========================  ==================  ========================================
site                       word                what gets shorter
=========================  ==================  ========================================
`Pixels()`                 ``pixels``          the whole vision tower
`VisionLayer(k)`           ``vision:k``        tower layers from k on
`BeforeDecoder()`          ``decoder``         the prompt, every layer and cache
`DecoderLayer(k)`          ``decoder:k``       decoder layers from k on, and their caches
`CacheAfterPrefill()`      ``cache``           the caches, once the prompt was read
`CacheWhileDecoding()`     ``cache:decoding``  the caches, at every step
=========================  ==================  ========================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from ..plain import integer, shown

__all__ = [
    "SITES",
    "BeforeDecoder",
    "CacheAfterPrefill",
    "CacheWhileDecoding",
    "DecoderLayer",
    "Pixels",
    "Site",
    "VisionLayer",
    "parse_site",
]


@dataclass(frozen=True)
class Site:
    """A place where tokens can leave; ``str(site)`` is its word and ``site.order`` its rank among all places."""

    word: ClassVar[str]

    @property
    def order(self) -> tuple[int, int]:
        """Rank: of the kind of site, then of the layer."""
        return SITES.index(type(self)), getattr(self, "layer", 0)

    def __str__(self) -> str:
        return self.word


@dataclass(frozen=True)
class _LayerSite(Site):
    first: ClassVar[int] = 0

    layer: int

    def __post_init__(self) -> None:
        layer = integer(self.layer)
        if layer is None or not self.first <= layer < 2**63:
            raise ConfigError(
                f"The layer of {self.word}:K is an integer of at least {self.first}, got {shown(self.layer)}."
                + (' On entering layer 0 tokens leave at "decoder".' if self.first else "")
            )
        object.__setattr__(self, "layer", layer)

    def __str__(self) -> str:
        return f"{self.word}:{self.layer}"


@dataclass(frozen=True)
class Pixels(Site):
    """Before the vision tower: patches that leave are never encoded."""

    word: ClassVar[str] = "pixels"


@dataclass(frozen=True)
class VisionLayer(_LayerSite):
    """On entering layer `layer` (0-based) of the vision tower: earlier layers see every patch."""

    word: ClassVar[str] = "vision"


@dataclass(frozen=True)
class BeforeDecoder(Site):
    """Before the language model: no decoder layer sees what leaves."""

    word: ClassVar[str] = "decoder"


@dataclass(frozen=True)
class DecoderLayer(_LayerSite):
    """On entering decoder layer `layer` (0-based, at least 1): earlier layers see everything and cache everything."""

    word: ClassVar[str] = "decoder"
    first: ClassVar[int] = 1


@dataclass(frozen=True)
class CacheAfterPrefill(Site):
    """Between the prompt and the first decode step: entries leave the key-value caches."""

    word: ClassVar[str] = "cache"


@dataclass(frozen=True)
class CacheWhileDecoding(Site):
    """After the prefill and every later pass: entries leave the key-value caches so that they do not grow."""

    word: ClassVar[str] = "cache:decoding"


SITES: tuple[type[Site], ...] = (
    Pixels,
    VisionLayer,
    BeforeDecoder,
    DecoderLayer,
    CacheAfterPrefill,
    CacheWhileDecoding,
)
"""All kinds of sites, in the order in which tokens meet them."""

_PLAIN: dict[str, type[Site]] = {
    site.word: site for site in (Pixels, BeforeDecoder, CacheAfterPrefill, CacheWhileDecoding)
}
_LAYERED: dict[str, type[_LayerSite]] = {site.word: site for site in (VisionLayer, DecoderLayer)}


def parse_site(at: Any) -> Site:
    """Read a site from its word; a `Site` is returned as it is.

    Raises
    ------
    ConfigError
        It is neither a site nor one of the words.
    """
    if isinstance(at, Site):
        return at
    if isinstance(at, str):
        if at in _PLAIN:
            return _PLAIN[at]()
        word, _, number = at.partition(":")
        if word in _LAYERED and number.isdecimal() and len(number) < 10:
            return _LAYERED[word](int(number))
    words = ", ".join([*_PLAIN, *(f"{word}:K" for word in _LAYERED)])
    raise ConfigError(f"at must be a site or one of the words {words} (K a layer), got {shown(at)}.")
