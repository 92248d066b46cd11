"""`sparsek chat`."""


def chat() -> None:
    """To be written."""
