"""SparseK attention: operator, prefix selection, attention, decode."""

from sparsek_kernels.attention import GATES, attend_to_state, sparsek_attention
from sparsek_kernels.operator import sparsek
from sparsek_kernels.pytorch.thresholds import NoThreshold
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import SparseKState, StateRows, cache_bytes

__all__ = [
    "GATES",
    "NoThreshold",
    "SparseKState",
    "StateRows",
    "attend_to_state",
    "cache_bytes",
    "effective_scores",
    "sparsek",
    "sparsek_attention",
]
