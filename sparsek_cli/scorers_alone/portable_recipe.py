"""Recipes that leave this machine: what they name by its whole path goes by its last part."""

import os
from typing import Any

import yaml


def without_places(text: str) -> str:
    """A recipe's YAML with absolute paths cut to their last part; its comments at the top stay."""
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    plain = yaml.safe_dump(_cut(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    return head + plain


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner) for inner in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")):
        return os.path.basename(value.rstrip("/"))
    return value
