"""SparseK attention for the models people already have: convert, fine-tune, evaluate, chat."""

__version__ = "0.1.0"
