"""What must hold before work begins: room on the disk, and tensors as config.json says."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsek_cli import byte_units
from sparsek_cli.checkpoint_files.shards import Shard
from sparsek_cli.checkpoint_files.wrapped_names import WRAPPED, in_place_of
from sparsek_cli.conversion.geometry import Geometry
from sparsek_cli.errors import SparsekError
from sparsek_cli.families import Row
from sparsek_cli.families.own_config import has_key, own_config

# Maps of an attention module to its keys, alone or with queries and values.
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
_VALUES = "v_proj"
# Number formats of weights that have the model's shapes, quantised or not.
_WHOLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")


def check_room(parent: Path, needed: int, *, packed: bool) -> None:
    """Raises SparsekError where the disk cannot hold the copies."""
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SparsekError(
            f"not enough space in {parent}: {byte_units.size(needed)} needed, "
            f"{byte_units.size(free)} free",
            hint="free some space, or choose OUT on another disk"
            if packed
            else "free some space, or choose OUT on the base's filesystem so that it can be linked",
        )


def check_tensors(
    shards: list[Shard],
    row: Row,
    layers: tuple[int, ...],
    size: Geometry,
    *,
    packed: Mapping[str, Any] | None = None,
) -> bool:
    """Whether names carry the prefix; attention tensors of these layers must be there, and fit.

    Args:
        size: what config.json says.
        packed: config.json where weights are quantised, and shapes need not be the model's.

    Raises:
        SparsekError: a tensor is missing, or keys have another number of heads or another width.
        UsageError: so it is by the family's own classes.
    """
    names = {name: entry for shard in shards for name, entry in shard.tensors.items()}
    holders = {name.rpartition(".")[0] for name in names} if packed else set()
    prefixed = any(name.startswith(f"{row.stored}.") for name in names)
    for layer in layers:
        for projection in row.projections:
            if projection == _VALUES and size.values_are_keys:
                continue
            path = f"{row.attention_path(layer)}.{projection}"
            if not prefixed:
                path = path.removeprefix(f"{row.stored}.")
            # Packed weights are several tensors, of which none need be named weight.
            if path not in holders and f"{path}.weight" not in names:
                instead = in_place_of(f"{path}.weight", names)
                raise SparsekError(
                    f"the checkpoint lacks {path}.weight, which its config.json promises"
                    + (f"; it holds {instead}" if instead else ""),
                    hint=WRAPPED if instead else "download or save the checkpoint again",
                )
            entry = names.get(f"{path}.weight")
            if projection in _KEYS and entry and (not packed or entry.dtype in _WHOLE):
                _check_heads(f"{path}.weight", entry.shape, row, size)
    if packed:
        _check_foreign_heads(row, packed, layers)
    return prefixed


def _check_foreign_heads(row: Row, config: Mapping[str, Any], layers: tuple[int, ...]) -> None:
    """Raises UsageError where head keys that the family does not have contradict its attention.

    For packed weights, whose shapes tell nothing: the family's own classes are asked, without
    weights.
    """
    keys = [row.key(key) for key in ("num_key_value_heads", "head_dim")]
    if all(config.get(key) is None or has_key(row, key) for key in keys):
        return
    import torch
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models.heads import check_heads

    own = own_config(row, {k: v for k, v in config.items() if k != "quantization_config"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    for module in model.modules():
        if type(module).__name__ == row.attention_class and module.layer_idx in layers:
            check_heads(module, own)


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
