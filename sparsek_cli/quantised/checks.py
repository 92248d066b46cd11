"""Whether a checkpoint is quantised as its config says, by a method that is read."""

from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from sparsek_cli.checkpoint_files.shards import Shard, TensorEntry
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.quantised.methods import (
    METHODS,
    REFUSED,
    Method,
    block_of,
    described,
    groups_of,
    method_of,
    stays_packed,
)

_ORIGINAL = "name the checkpoint it was made from; quantise the converted model, if you must"
# Where config.json says that weights are quantised; older files have the second.
_BLOCKS = ("quantization_config", "compression_config")
_PLAIN = ("F64", "F32", "F16", "BF16")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8")
# Beside tensors of these names lie weights that are packed or scaled.
_PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB",
           "._weight_qdata", "._weight_scale", "._data", ".absmax", ".quant_map",
           "_proj_blocks")  # fmt: skip


def check(
    config: Mapping[str, Any], shards: Iterable[Shard], name: str, apart: str | None = None
) -> None:
    """Raises where a checkpoint is quantised in a way that is not read, or that contradicts itself.

    Args:
        config: config.json. shards: headers of the weights. name: what to call the checkpoint.
        apart: the method that a file beside config.json names.

    Raises:
        UsageError: a method that is not read, a missing package, or tensors of another method.
    """
    said = [key for key in _BLOCKS if config.get(key) is not None]
    tensors = {key: entry for shard in shards for key, entry in shard.tensors.items()}
    method, packed = method_of(config), _first_packed(tensors)
    if method is None or "quantization_config" not in config:
        if packed and (said or apart):
            raise _refusal(name, method or apart, "its config.json does not say so where it should")
        if packed:
            raise _refusal(name, None, f"{packed}, and config.json names no method")
        if said:
            raise UsageError(
                f"'{name}': config.json has a {said[0]} that names no method, and the weights are "
                "plain",
                hint=f"take {said[0]} out of config.json",
            )
        if apart:
            raise UsageError(
                f"'{name}' holds a file of settings of {apart}, and its weights are plain",
                hint="move quantize_config.json (quant_config.json) away if they were never "
                "quantised or are unpacked, else fetch the model again",
            )
        return
    if method not in METHODS:
        raise _refusal(name, method, REFUSED.get(method, "transformers knows no such method"))
    found, family = METHODS[method], str(config.get("model_type")).removeprefix("sparsek_")
    if family in found.families:
        raise _refusal(name, method, f"of {family} models, activations are scaled, too")
    marked = any(key.endswith(found.marks) for key in tensors)
    if packed and not marked:
        marks = " or ".join(found.marks)
        raise _refusal(name, method, f"{packed}, and no tensor's name ends in {marks}")
    if not marked:
        raise UsageError(
            f"'{name}': config.json says that weights are quantised ({method}), and none is",
            hint="take quantization_config out of config.json if the weights are plain, else "
            "fetch the model again",
        )
    if method == "compressed-tensors":
        _check_compressed(block_of(config), name)
    if found.unpacked:
        _check_scaled(tensors, name, method)
    _check_packages(found, name, method)


def check_training(config: Any, train: str, *, merges: bool, processes: int = 1) -> None:
    """Raises UsageError where quantised weights were to be trained, or merged into.

    Unpacked ones could be, but transformers packs them again as it saves, and rounds what was
    learned.

    Args:
        train: the recipe's. merges: whether LoRA adapters are merged into the weights.
        processes: of the run.
    """
    if not described(config):
        return
    what = f"the model is quantised ({described(config)})"
    if train == "all":
        raise UsageError(
            f"{what}: its weights cannot be trained",
            hint="set train=scorers, or train=lora with lora.merge=false",
        )
    if processes > 1 and stays_packed(config):
        raise UsageError(
            f"{what}: packed weights were never tried in {processes} processes",
            hint="start it in one process, on one GPU",
        )
    if train == "lora" and merges:
        raise UsageError(
            f"{what}: adapters cannot be merged into its weights",
            hint="set lora.merge=false: OUT then holds the adapters, to be loaded onto the model",
        )


def _refusal(name: str, method: str | None, why: str) -> UsageError:
    by = f" ({method})" if method else ""
    return UsageError(f"'{name}' is quantised{by}, and is not read: {why}", hint=_ORIGINAL)


def _first_packed(tensors: Mapping[str, TensorEntry]) -> str:
    """A tensor that is no plain weight, and what it is instead; "": there is none."""
    for key, entry in tensors.items():
        packed = key.endswith(_PACKED) or "quant_state" in key
        if packed or (key.endswith(".weight") and entry.dtype not in _PLAIN):
            return f"{key} is {'packed' if packed else entry.dtype}"
    return ""


def _check_scaled(tensors: Mapping[str, TensorEntry], name: str, method: str) -> None:
    """Eight bits without a scale would load as they are, and be other numbers."""
    for key, entry in tensors.items():
        scales = (f"{key}_scale", f"{key}_scale_inv")
        small = key.endswith(".weight") and entry.dtype in _EIGHT_BITS
        if small and not any(scale in tensors for scale in scales):
            raise SparsekError(
                f"'{name}' is quantised ({method}), and {key} has no scale beside it",
                hint="fetch the model again",
            )


def _check_compressed(block: Mapping[str, Any], name: str) -> None:
    """What transformers would unpack wrongly, and nobody would see it."""
    groups = groups_of(block)
    why = None
    if len(groups) != 1 or "num_bits" not in groups[0]["weights"]:
        why = "its weights are of more than one kind, or of none that config.json describes"
    elif block.get("transform_config"):
        why = "its weights are rotated (transform_config), which unpacking does not undo"
    elif (block.get("sparsity_config") or {}).get("format", "dense") != "dense":
        why = "its weights are sparse, too (sparsity_config)"
    if why:
        raise _refusal(name, "compressed-tensors", why)


def _check_packages(method: Method, name: str, called: str) -> None:
    from packaging.version import Version

    for package, least in method.needs.items():
        found = metadata.version(package) if find_spec(package.replace("-", "_")) else None
        if found is None or Version(found) < Version(least):
            state = "is not installed" if found is None else f"is {found}, older than {least}"
            wanted = " ".join(f'"{p}>={v}"' for p, v in method.needs.items())
            raise UsageError(
                f"'{name}' is quantised ({called}), and {package} {state}",
                hint=f"`pip install {wanted}`",
            )
