"""The PyTorch backend: runs anywhere, O(N (k + w)) time, O(N) memory."""

from sparsek_kernels.pytorch.attention import attend
from sparsek_kernels.pytorch.decode import decode, insert

__all__ = ["attend", "decode", "insert"]
