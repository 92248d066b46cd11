"""A family's own config class, asked for what a config.json leaves open."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import SparsekError, reason
from sparsek_cli.families.positions import rotary_error
from sparsek_cli.families.row import Row


def own_config(row: Row, config: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json dictionary. Imports transformers, which takes seconds.

    Asked only where the file does not say it, so that most conversions do without.

    Raises:
        SparsekError: it is no config of this family.
        UsageError: only its rotary positions are wrong.
    """
    kind = _class(row)
    try:
        # It fills in what blocks within leave out, and the file's own stay as they are.
        return kind.from_dict(kind._decode_special_floats(copy.deepcopy(dict(config))))
    except Exception as error:  # each field's own
        if told := rotary_error(str(error)):
            raise told from error
        raise SparsekError(
            f"config.json is none of a {row.model_type} model: {reason(error)}",
            hint="fetch or convert the model again",
        ) from error


def has_key(row: Row, key: str) -> bool:
    """Whether a key is the family's own, and not one that only some file has. Imports as above."""
    return _has(_class(row), key)


def own_value(config: Any, key: str) -> Any:
    """A config's value of a key that its class has; None of one that its file alone holds.

    transformers keeps what it does not know as an attribute, and no model looks at it.
    """
    return getattr(config, key, None) if _has(type(config), key) else None


def _has(kind: Any, key: str) -> bool:
    """Whether a config class has a field of this name, or another name for one."""
    return key in kind.__dataclass_fields__ or key in kind.attribute_map


def _class(row: Row) -> Any:
    name = f"transformers.models.{row.module}.configuration_{row.module}"
    return getattr(importlib.import_module(name), row.config)
