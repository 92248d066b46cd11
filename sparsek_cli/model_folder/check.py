"""A folder that holds a causal language model in plain safetensors, and nothing else."""

import logging
from pathlib import Path
from typing import Any

from sparsek_cli import quantised
from sparsek_cli.checkpoint_files.shape_checks import check_layers, check_rows
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.checkpoint_files.weights_beside import left_out
from sparsek_cli.errors import UsageError
from sparsek_cli.model_folder.config_file import check_config, read_config
from sparsek_cli.model_folder.not_a_model import merge_hint, no_config
from sparsek_cli.model_folder.side_files import check_side_files, check_special
from sparsek_cli.model_folder.templates import told_apart
from sparsek_cli.model_folder.weights import check_no_adapters, check_weights, method_apart

_LOG = logging.getLogger("sparsek_cli")


def check(path: Path, name: str) -> dict[str, Any]:
    """config.json of a folder that holds a causal language model in plain safetensors.

    Weights and chat templates beside those that are read are named in a warning.

    Args:
        path: the folder.
        name: what to call it.

    Raises:
        UsageError: it is something else.
        SparsekError: it is one, and damaged.
    """
    check_special(path)
    if not (path / "config.json").is_file():
        raise no_config(path)
    config = read_config(path)
    check_config(config, name)
    check_side_files(path, config)
    if (path / "adapter_config.json").is_file():
        raise UsageError(
            f"'{name}' holds a PEFT adapter beside a base model; only one of them would count",
            hint=f"{merge_hint(path)}; or move adapter_config.json and adapter_model.* away",
        )
    check_weights(path, name)
    shards = read_shards(path)
    quantised.check(config, shards, name, method_apart(path))
    check_no_adapters(shards, name)
    check_layers(shards, config, name)
    check_rows(shards, config)
    for said in (left_out(path, (shard.path for shard in shards)), told_apart(path)):
        if said:
            _LOG.warning("%s", said)
    return config
