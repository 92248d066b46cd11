"""`sparsek evaluate`."""


def evaluate() -> None:
    """To be written."""
