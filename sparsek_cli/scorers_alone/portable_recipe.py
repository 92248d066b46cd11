"""Recipes that leave this machine: what they name by its whole path goes by its last part."""

import os
from pathlib import Path
from typing import Any

import yaml

from sparsek_cli.recipes.yaml_lines import Spelled, read_text, read_yaml


def portable(file: Path) -> str:
    """A recipe's YAML with absolute paths cut to their last part; its comments at the top stay.

    Raises:
        UsageError: the file is damaged.
    """
    tree, _ = read_yaml(file)
    text = read_text(file)
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return head + yaml.safe_dump(_cut(tree), sort_keys=False, allow_unicode=True)


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner) for inner in value]
    if isinstance(value, Spelled):
        return value.text  # 1e-4 is written as it was, without quotes
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return os.path.basename(value.rstrip("/"))
    return value
