"""Documents packed along one row: their keys in one list, and the tables that kernels read."""
