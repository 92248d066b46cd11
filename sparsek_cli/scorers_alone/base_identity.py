"""What scorers were made for, the base's config and a hash of its weights, and who is that base.

Scorers read the hidden states of one set of weights. On any other model they would load just as
well and keep the wrong tokens, so the base is compared before they are put on it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files.seal import digest
from sparsek_cli.checkpoint_files.shards import read_shards, without_scorers
from sparsek_cli.errors import UsageError
from sparsek_cli.families import Row
from sparsek_cli.families.layers import idle_window_off
from sparsek_cli.families.own_config import own_config

# What a config may say otherwise about the same model.
_NOISE = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "dtype", "sparsek",
    "model_type", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# Buffers that older versions of transformers saved and newer ones compute.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


def comparable(row: Row, config: dict[str, Any]) -> dict[str, Any]:
    """All settings of a dense config.json that describe the model, its class's defaults included.

    Imports transformers. A sliding window that never binds is off, as conversion leaves it.
    """
    plain = {**config, "model_type": row.model_type}
    context = own_config(row, plain).max_position_embeddings
    full = own_config(row, {**plain, **idle_window_off(row, plain, context)}).to_dict()
    kept = {
        key: value
        for key, value in full.items()
        if key not in _NOISE and key != row.dropout and not key.startswith("_")
        # Ids of special tokens are the tokenizer's affair.
        and not key.endswith("_token_id")
    }  # fmt: skip
    return json.loads(json.dumps(kept, default=str))


def weights_digest(
    folder: Path, row: Row, advance: Callable[[int], Any] = lambda done: None
) -> str:
    """sha256 over the dense weights of a checkpoint: names, dtypes, shapes and every byte.

    The same however they are spread over files, and whether names carry the base model's prefix.
    """
    tensors = {
        name.removeprefix(f"{row.stored}."): (shard, entry)
        for shard in without_scorers(read_shards(folder))
        for name, entry in shard.tensors.items()
        if not name.endswith(_BUFFERS)
    }
    return digest(tensors, advance)


def check_config(mark: dict[str, Any], row: Row, config: dict[str, Any], name: str) -> None:
    """A base's config.json must be that of the scorers' own base.

    Args:
        mark: what the scorers say of their base. name: what to call the one at hand.

    Raises:
        UsageError: another family, or a setting that differs, which is named.
    """
    if row.model_type != mark["model_type"]:
        raise _wrong(mark, f"'{name}' is a {row.model_type} model, theirs a {mark['model_type']}")
    ours, theirs = comparable(row, config), mark["config"]
    # Other versions of transformers know other settings.
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            values = (json.dumps(value)[:60] for value in (ours[key], theirs[key]))
            raise _wrong(mark, f"{key} of '{name}' is {next(values)}, theirs {next(values)}")


def check_weights(mark: dict[str, Any], weights: str, name: str) -> None:
    """A base's weights must be those of the scorers' own base, to the last bit.

    Raises:
        UsageError: they are not.
    """
    if weights != mark["weights"]:
        raise _wrong(mark, f"the weights of '{name}' are others")


def _wrong(mark: dict[str, Any], why: str) -> UsageError:
    return UsageError(
        f"the scorers were made for another base, '{mark['name']}': {why}",
        hint="name the base that they were made for, in the number format it had",
    )
