"""The PyTorch backend: runs anywhere, O(N (k + w)) time, O(N) memory."""

from sparsek_kernels.pytorch.run import run

__all__ = ["run"]
