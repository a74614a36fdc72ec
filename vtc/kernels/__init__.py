"""The operations that methods share, as plain functions.

Every operation has one name and one signature here. Underneath stand its specification (`reference`: plain PyTorch, as
slow and as large as the definition is), a fast PyTorch path and, where there is one, a Triton kernel; `use` and the
environment variable ``VTC_KERNELS`` choose between the last two, see `dispatch`.
"""

from __future__ import annotations

from .dispatch import use
from .greedy import coverage_greedy, dpp_greedy
from .merge import bipartite_merge, recycle_cells, segment_merge
from .pack import Packed, gather_planes, select_gather, topk_indices
from .pick import farthest_point, max_sum
from .reference import attention_exchange, context_relevance, pagerank, patch_entropy

__all__ = [
    "Packed",
    "attention_exchange",
    "bipartite_merge",
    "context_relevance",
    "coverage_greedy",
    "dpp_greedy",
    "farthest_point",
    "gather_planes",
    "max_sum",
    "pagerank",
    "patch_entropy",
    "recycle_cells",
    "segment_merge",
    "select_gather",
    "topk_indices",
    "use",
]
