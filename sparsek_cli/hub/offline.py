"""Whether the hub may be asked at all, and why there is no way to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRUE = ("1", "TRUE", "ON", "YES")  # as huggingface_hub and datasets read their switches
_closed = False  # within `offline`: what the libraries say is not the user's word


def switch(kind: str = "model") -> str | None:
    """The environment variable by which the user keeps everyone from asking the hub, if any does.

    Args:
        kind: `model` or `dataset`: datasets have one of their own.
    """
    from huggingface_hub import constants

    general = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    for name in (general, *(["HF_DATASETS_OFFLINE"] if kind == "dataset" else [])):
        if os.environ.get(name, "").upper() in _TRUE:
            return name
    return "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE and not _closed else None


def no_way(kind: str = "model") -> tuple[str, str]:
    """Why there is no way to the hub, and what to do about it."""
    if name := switch(kind):
        return f"{name} is set", "unset it"
    return "the Hugging Face hub cannot be reached", "connect"


@contextmanager
def offline() -> Iterator[None]:
    """Within the block every attempt to reach the hub fails at once; what is cached still loads.

    For a hub that was found not to answer: `no_way` still says that.
    """
    global _closed
    import datasets
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    places = [(module, name) for module in (constants, datasets.config) for name in names]
    before = [(m, name, getattr(m, name)) for m, name in places if hasattr(m, name)]
    _closed = True
    for module, name, _ in before:
        setattr(module, name, True)
    try:
        yield
    finally:
        _closed = False
        for module, name, value in before:
            setattr(module, name, value)
