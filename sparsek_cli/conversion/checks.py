"""What must hold before work begins: room on the disk, and tensors as config.json says."""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsek_cli.conversion.geometry import Geometry
from sparsek_cli.conversion.shards import Shard
from sparsek_cli.errors import SparsekError
from sparsek_cli.families import Row

_FEW_LAYERS = 1000
# Integers of a config.json that no tensor is as large as.
_NO_SIZE = re.compile(r"position|n_ctx|_id$|_token|_length|_seed|window|topk|_layer|chunk|multiple")
# Maps of an attention module to its keys, alone or with queries and values.
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
_LAYER = re.compile(r"(?<![^.])(\d{1,9})(?![^.])")  # the first number in a tensor's name


def check_room(parent: Path, needed: int, *, packed: bool) -> None:
    """Raises SparsekError where the disk cannot hold the copies."""
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SparsekError(
            f"not enough space in {parent}: {needed / 2**30:.1f} GiB needed, "
            f"{free / 2**30:.1f} GiB free",
            hint="free some space, or choose OUT on another disk"
            if packed
            else "free some space, or choose OUT on the base's filesystem so that it can be linked",
        )


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


def check_tensors(
    shards: list[Shard], row: Row, layers: tuple[int, ...], size: Geometry, *, packed: bool = False
) -> bool:
    """Whether names carry the prefix; attention tensors of these layers must be there, and fit.

    Args:
        size: what config.json says.
        packed: whether weights are quantised, and shapes not those of the model.

    Raises:
        SparsekError: a tensor is missing, or keys have another number of heads or another width.
    """
    names = {name: entry for shard in shards for name, entry in shard.tensors.items()}
    holders = {name.rpartition(".")[0] for name in names} if packed else set()
    prefixed = any(name.startswith(f"{row.stored}.") for name in names)
    for layer in layers:
        for projection in row.projections:
            path = f"{row.attention_path(layer)}.{projection}"
            if not prefixed:
                path = path.removeprefix(f"{row.stored}.")
            # Packed weights are several tensors, of which none need be named weight.
            if path not in holders and f"{path}.weight" not in names:
                raise SparsekError(
                    f"the checkpoint lacks {path}.weight, which its config.json promises",
                    hint="download or save the checkpoint again",
                )
            if not packed and projection in _KEYS:
                _check_heads(f"{path}.weight", names[f"{path}.weight"].shape, row, size)
    return prefixed


def _check_heads(name: str, shape: tuple[int, ...], row: Row, size: Geometry) -> None:
    """Keys have as many features as config.json says.

    Some families go by other keys than the file's, and the model would be another than its config.
    """
    fused = not name.endswith("k_proj.weight")
    heads = size.heads + 2 * size.kv_heads if fused else size.kv_heads
    # GPT-2's maps are stored the other way round; three parts are never as wide as what they read.
    if heads * size.head_dim not in (shape if fused else shape[:1]):
        raise SparsekError(
            f"{name} has shape {list(shape)}, and config.json says {size.kv_heads} KV heads of "
            f"{size.head_dim} features",
            hint="correct num_key_value_heads and head_dim in config.json, or take them out if "
            f"{row.model_type} models have none; else fetch the model again",
        )
