"""CrossLMM: pooled tokens, and text, look at the original visual tokens by gated cross-attention inside the decoder."""

from __future__ import annotations

from .method import CrossLmmSelector
from .module import CrossAttentions, GatedAttention
from .training import begin

__all__ = ["CrossAttentions", "CrossLmmSelector", "GatedAttention", "begin"]
