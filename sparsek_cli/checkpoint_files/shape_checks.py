"""Whether tensors in the files are as many and as long as config.json says."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparsek_cli.checkpoint_files.shards import Shard
from sparsek_cli.errors import SparsekError

_FEW_LAYERS = 1000
# Integers of a config.json that no tensor is as large as.
_NO_SIZE = re.compile(r"position|n_ctx|_id$|_token|_length|_seed|window|topk|_layer|chunk|multiple")
_LAYER = re.compile(r"(?<![^.])(\d{1,9})(?![^.])")  # the first number in a tensor's name


def check_layers(shards: list[Shard], config: dict[str, Any], name: str) -> None:
    """Thousands of layers are there: building them to find out takes minutes, or all memory."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        promised = config.get(key)
        if not isinstance(promised, int) or promised <= _FEW_LAYERS:
            continue
        numbers = (_LAYER.search(tensor) for shard in shards for tensor in shard.tensors)
        held = 1 + max((int(found[1]) for found in numbers if found), default=-1)
        if promised > held:
            raise SparsekError(
                f"'{name}': config.json has {key} {promised}, the weights are of {held} layers",
                hint="correct config.json, or fetch the model again",
            )


def sizes_beyond(shards: Iterable[Shard], config: Mapping[str, Any]) -> bool:
    """Whether a size in config.json is larger than any dimension of any tensor.

    Then a tensor is of another shape, or the size is none of a tensor's. Drawing what such a config
    promises, to find that the weights are smaller, takes minutes, or all memory.

    Args:
        config: all of config.json, defaults filled in or not.
    """
    rows = config.get("vocab_size")
    shapes = (entry.shape for shard in shards for entry in shard.tensors.values())
    largest = max((size for shape in shapes for size in shape if size != rows), default=0)
    sizes = {k: v for k, v in config.items() if type(v) is int and not _NO_SIZE.search(k)}
    heads = [size for key, size in sizes.items() if "head" in key and "dim" not in key]
    widths = [size for key, size in sizes.items() if "head_dim" in key]
    sizes["features"] = max(heads, default=0) * max(widths, default=1)
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    return any(size > largest for key, size in sizes.items() if key != "vocab_size") or any(
        sizes_beyond(shards, block) for block in nested
    )


def check_rows(shards: list[Shard], config: dict[str, Any]) -> None:
    """Embeddings and output layer have as many rows as config.json's vocabulary."""
    rows = config.get("vocab_size")
    embeddings = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")
    for shard in shards:
        for name, entry in shard.tensors.items():
            whole = name.endswith(embeddings) and entry.dtype not in ("U8", "I32")
            if whole and isinstance(rows, int) and entry.shape[0] != rows:
                raise SparsekError(
                    f"{name} in {shard.path.name} has shape {list(entry.shape)}, config.json says "
                    f"vocab_size {rows}",
                    hint=f"set vocab_size to {entry.shape[0]} in config.json if the weights were "
                    "resized, else fetch the model again",
                )
