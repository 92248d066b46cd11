"""Whether a model came out of `sparsek convert`: one answer for everybody who asks."""

from collections.abc import Mapping
from typing import Any


def is_converted(config: Any) -> bool:
    """Whether a config is of a converted model.

    Args:
        config: the content of config.json, or transformers' config object.
    """
    if isinstance(config, Mapping):
        return str(config.get("model_type", "")).startswith("sparsek_") or "sparsek" in config
    return getattr(config, "sparsek", None) is not None
