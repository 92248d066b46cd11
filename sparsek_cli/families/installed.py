"""Which families the installed transformers has: it gains some with every version."""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


@cache
def _models() -> Path:
    """The folder of transformers' models; nothing is imported for it."""
    spec = find_spec("transformers")
    return Path(spec.submodule_search_locations[0]) / "models"


def has(module: str) -> bool:
    """Whether transformers has models/<module>."""
    return (_models() / module).is_dir()


def transformers_version() -> str:
    return version("transformers")
