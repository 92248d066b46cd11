"""A family's own config class, asked for what a config.json leaves open."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import SparsekError, reason
from sparsek_cli.families.row import Row


def own_config(row: Row, config: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json dictionary. Imports transformers, which takes seconds.

    Asked only where the file does not say it, so that most conversions do without.

    Raises:
        SparsekError: it is no config of this family.
    """
    name = f"transformers.models.{row.module}.configuration_{row.module}"
    kind = getattr(importlib.import_module(name), row.config)
    try:
        return kind.from_dict(kind._decode_special_floats(dict(config)))
    except Exception as error:  # each field's own
        raise SparsekError(
            f"config.json is none of a {row.model_type} model: {reason(error)}",
            hint="fetch or convert the model again",
        ) from error
