"""Gradients of queries and keys, each walked as it was read."""
