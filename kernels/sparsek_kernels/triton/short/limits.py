"""Which calls are short."""

from sparsek_kernels.dispatch import are_all_long
from sparsek_kernels.triton.geometry import Geometry

# Up to here a GPU has done its work before the CPU has launched what longer calls take.
MOST_KEYS = 1 << 14  # of a row, all of which a program of `lists.py` may walk
# Rows times keys squared, as their work grows.
MOST_PAIRS = 1 << 31  # of ends and lists: 16,384 keys of 8 heads
MOST_THRESHOLD_PAIRS = 9 << 27  # of tau, several passes each: 12,288 keys of 8 heads


def is_short(geometry: Geometry) -> bool:
    """Whether the call takes the ways of this folder for what is kept."""
    return geometry.keys <= MOST_KEYS and _pairs(geometry) <= MOST_PAIRS and not are_all_long()


def has_short_thresholds(geometry: Geometry) -> bool:
    """Whether the call takes this folder's way for tau, too."""
    return is_short(geometry) and _pairs(geometry) <= MOST_THRESHOLD_PAIRS


def _pairs(geometry: Geometry) -> int:
    return geometry.rows * geometry.keys**2
