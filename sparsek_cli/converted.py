"""Configs of converted models: whether one is, and what it was before."""

from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError

# The name under which transformers knows our attention function. It stands in config.json, too, so
# that the base's own class (LlamaForCausalLM), which would drop the scorers and attend densely,
# refuses the folder: it knows no such attention, or finds no scorer.
ATTENTION = "sparsek"
# What the `sparsek` block of every file holds, as every version wrote it. A config that is made in
# Python may leave keys to their defaults; read from a file, those would be another model's.
SETTINGS = ("topk", "window", "sinks", "gate", "scorer")


def is_converted(config: Any) -> bool:
    """Whether a config is of a converted model.

    Args:
        config: the content of config.json, or transformers' config object.
    """
    if isinstance(config, Mapping):
        return str(config.get("model_type", "")).startswith("sparsek_") or "sparsek" in config
    return getattr(config, "sparsek", None) is not None


def lacking(block: Any) -> str:
    """The settings that a `sparsek` block from a file lacks, as one text; "" where it is whole."""
    found = block if isinstance(block, Mapping) else {}
    return ", ".join(key for key in SETTINGS if key not in found)


def check_whole_settings(block: Any, name: str) -> None:
    """Raises UsageError where the `sparsek` block of the config.json of `name` lacks a setting."""
    if missing := lacking(block):
        raise UsageError(
            f"{name}: the sparsek block of config.json lacks {missing}, and nothing else says what "
            "the model keeps",
            hint="fetch or convert the model again, or put back what the block held",
        )


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it was before conversion, but for a sliding window that never bound."""
    ours = ("sparsek", "auto_map", "attn_implementation")
    dense = {key: config[key] for key in config if key not in ours}
    dense["model_type"] = dense["model_type"].removeprefix("sparsek_")
    names = dense.get("architectures") or []
    dense["architectures"] = [name.removeprefix("SparseK") for name in names]
    return dense
