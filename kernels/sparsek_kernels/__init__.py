"""SparseK attention: operator, prefix selection, attention, decode."""
