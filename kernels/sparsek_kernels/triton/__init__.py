"""Triton backend: prefix selection, gathered attention forward and backward, decode.

Import it only where Triton is installed; `sparsek_kernels.dispatch` decides when that is.
"""

from sparsek_kernels.triton.run import run, unsupported

__all__ = ["run", "unsupported"]
