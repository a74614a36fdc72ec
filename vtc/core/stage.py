"""Stages: what a method does at one site, and the numbers of a model that its plan may depend on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError
from .actions import Action
from .signals import Signal
from .sites import BeforeDecoder, Site

__all__ = ["ModelShape", "Stage"]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model that methods plan with.

    Attributes
    ----------
    decoder_layers
        Layers of the language model.
    vision_layers
        Layers of the vision tower; None where its attention layers are not known.
    feature_layer
        Layer of the tower (0-based) whose output feeds the projector.
    cls
        Whether the tower of images has a [CLS] token.
    family
        `config.model_type`; None where no model is at hand.
    width
        Of the language model's embeddings; None where it is not known.
    vision_width
        Of the hidden states of the vision tower; None where it is not known.
    """

    decoder_layers: int
    vision_layers: int | None = None
    feature_layer: int | None = None
    cls: bool = False
    family: str | None = None
    width: int | None = None
    vision_width: int | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a method works.

    Attributes
    ----------
    site
        Where tokens leave.
    requires
        Signals that the method reads there. Those of the vision tower are there at every later site, for the tokens
        that are left.
    keep
        Fraction of the tokens entering this stage that is its budget; None: what the configuration says.
    action
        What happens to the tokens.

    Raises
    ------
    ConfigError
        `keep` is no fraction.
    """

    site: Site = field(default_factory=BeforeDecoder)
    requires: tuple[Signal, ...] = ()
    keep: float | None = None
    action: Action = Action.KEEP

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ConfigError(f"A stage keeps a fraction between 0 and 1 of what enters it, got {self.keep}.")
