"""What trained modules may take over from the decoder of their model when they begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Decoder"]


@dataclass(frozen=True, eq=False)
class Decoder:
    """The language model of one model, as far as modules begin with parts of it.

    Attributes
    ----------
    shape
        ``heads``, ``kv_heads``, ``head_width``, ``hidden`` (of the MLP), ``theta`` (of the rotation), ``eps`` (of the
        norms) and ``bias`` (of queries, keys and values).
    layers
        Weights of every layer, under the names that they have there.
    """

    shape: Mapping[str, Any]
    layers: Sequence[Mapping[str, Tensor]]

    @classmethod
    def of(cls, config: Any, layers: Any) -> Decoder:
        """Read the text configuration and the layers of a language model of transformers."""
        heads = config.num_attention_heads
        rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        weights = [layer.state_dict() for layer in layers]
        shape = {
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_width": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "hidden": config.intermediate_size,
            "theta": float(rotation.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
            "eps": float(getattr(config, "rms_norm_eps", 1e-6)),
            "bias": any(name.endswith("q_proj.bias") for name in weights[0]),
        }
        return cls(shape, weights)
