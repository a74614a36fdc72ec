"""The compression of one model: what the transitions of a call need to know, and what they note for the report."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtc.adapters.base import Adapter
from vtc.engine.cache import Owner
from vtc.engine.calls import Calls
from vtc.engine.encoder import Encoder
from vtc.engine.masks import LayerTypes
from vtc.engine.plan import Plan

__all__ = ["Compression"]


class Compression:
    """One plan for one model.

    Parameters
    ----------
    model : PreTrainedModel
    adapter : Adapter
    plan : Plan

    Attributes
    ----------
    encoder : Encoder
        Reads the vision towers.
    layer_types : LayerTypes
        Attention of the decoder layers.
    calls : Calls
        Its open calls, and the last prompt of each thread or task, for the report.
    owner : Owner
        What caches know of the engine that filled them.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, plan: Plan) -> None:
        self.model: Any = model
        self.adapter, self.plan = adapter, plan
        self.encoder = Encoder(adapter, plan)
        self.text_config = adapter.text_model.config
        self.layer_types = LayerTypes(self.text_config)
        self.calls = Calls()
        self.owner = Owner()

    @property
    def enabled(self) -> bool:
        """Whether this thread or task wants images and videos compressed; what is in a cache already stays as it is."""
        return not self.calls.paused
