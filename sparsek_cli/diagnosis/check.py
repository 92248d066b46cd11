"""One row of `sparsek doctor`, and how far apart two computations may be."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

# float32, differences come from another order of summation only.
TOLERANCE = 2e-3
# Packed weights compute in 16 bits, and some methods round activations, too.
PACKED_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Check:
    """One row: `ok` is None for a plain fact."""

    name: str
    ok: bool | None
    detail: str
    hint: str = ""


REPORT_IT = "please report this with the output of `sparsek doctor --json`"
