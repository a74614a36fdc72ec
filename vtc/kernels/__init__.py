"""Tensor operations shared by the compression methods, as functions.

Every operation has one name and one signature. Behind it are a specification (`reference`, naive PyTorch), an
optimised PyTorch implementation and, for most operations, a Triton implementation. `use` and the environment variable
``VTC_KERNELS`` choose between the last two, see `dispatch`.
"""

from __future__ import annotations

from .attention import attention_column_sums, attention_rows
from .cluster import density_clusters, density_peaks, nearest_in_group
from .cover import multimodal_coverage, weighted_coverage
from .dispatch import use
from .greedy import coverage_greedy, dpp_greedy
from .merge import bipartite_merge, nearest_slots, recycle_cells, segment_merge
from .pack import Packed, gather_planes, select_gather, topk_indices
from .pick import farthest_point, max_sum, relevant_farthest_point
from .pixels import patch_entropy
from .received import attention_received, context_relevance, pagerank, received_from
from .video import earlier_tokens, temporal_similarity
from .visibility import VisibilityMask

__all__ = [
    "Packed",
    "VisibilityMask",
    "attention_column_sums",
    "attention_received",
    "attention_rows",
    "bipartite_merge",
    "context_relevance",
    "coverage_greedy",
    "density_clusters",
    "density_peaks",
    "dpp_greedy",
    "earlier_tokens",
    "farthest_point",
    "gather_planes",
    "max_sum",
    "multimodal_coverage",
    "nearest_in_group",
    "nearest_slots",
    "pagerank",
    "patch_entropy",
    "received_from",
    "recycle_cells",
    "relevant_farthest_point",
    "segment_merge",
    "select_gather",
    "temporal_similarity",
    "topk_indices",
    "use",
    "weighted_coverage",
]
