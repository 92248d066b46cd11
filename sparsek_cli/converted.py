"""Whether a config is that of a converted model."""

from collections.abc import Mapping
from typing import Any

# The name under which transformers knows our attention function. It stands in config.json, too, so
# that the base's own class (LlamaForCausalLM), which would drop the scorers and attend densely,
# refuses the folder: it knows no such attention, or finds no scorer.
ATTENTION = "sparsek"


def is_converted(config: Any) -> bool:
    """Whether a config is of a converted model.

    Args:
        config: the content of config.json, or transformers' config object.
    """
    if isinstance(config, Mapping):
        return str(config.get("model_type", "")).startswith("sparsek_") or "sparsek" in config
    return getattr(config, "sparsek", None) is not None
