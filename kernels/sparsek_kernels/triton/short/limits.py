"""Which calls are short."""

from sparsek_kernels.dispatch import are_all_long
from sparsek_kernels.triton.geometry import Geometry

# Up to here a GPU has done its work before the CPU has launched what longer calls take.
MOST_KEYS = 1 << 14  # of a row, all of which a program of `lists.py` may walk
MOST_PAIRS = 9 << 27  # rows times keys squared, as their work grows: 12,288 keys of 8 heads


def is_short(geometry: Geometry) -> bool:
    """Whether the call takes the ways of this folder."""
    keys = geometry.keys
    return keys <= MOST_KEYS and geometry.rows * keys**2 <= MOST_PAIRS and not are_all_long()
