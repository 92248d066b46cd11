"""What must hold before work begins: room on the disk, and tensors as config.json says."""

import shutil
from pathlib import Path

from sparsek_cli import byte_units
from sparsek_cli.checkpoint_files.shards import Shard
from sparsek_cli.conversion.geometry import Geometry
from sparsek_cli.errors import SparsekError
from sparsek_cli.families import Row

# Maps of an attention module to its keys, alone or with queries and values.
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")


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
