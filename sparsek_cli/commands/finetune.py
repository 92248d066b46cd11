"""`sparsek finetune`."""


def finetune() -> None:
    """To be written."""
