"""Checkpoints whose weights are quantised: which methods are read, what each needs, and how.

The files stay as they are, whatever the method; conversion adds scorers beside them, which are no
`nn.Linear` and therefore no method's business. In memory there are two kinds. Where transformers
has a way, weights are unpacked while they load, and the model is then as any other. Else they stay
packed, and whatever needs a weight asks its module (see weights.py).
"""

from sparsek_cli.quantised.checks import check, check_training
from sparsek_cli.quantised.load import load
from sparsek_cli.quantised.methods import (
    ACTIVATION_SCALES,
    METHODS,
    REFUSED,
    described,
    method_of,
    stays_packed,
)

__all__ = [
    "ACTIVATION_SCALES",
    "METHODS",
    "REFUSED",
    "check",
    "check_training",
    "described",
    "load",
    "method_of",
    "stays_packed",
]
