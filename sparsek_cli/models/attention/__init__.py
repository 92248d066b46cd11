"""Attention functions that transformers calls in converted models, by name: sparsek and dense."""
