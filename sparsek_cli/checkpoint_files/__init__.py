"""A checkpoint folder as it lies on disk: its files, JSON and headers, no tensors."""
