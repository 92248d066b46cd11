"""The small file beside a converted checkpoint that leads transformers to this package."""

from __future__ import annotations

# Its name, through which transformers finds this package.
REMOTE_CODE_FILE = "modeling_sparsek.py"
_TEXT = '''\
"""Loads this checkpoint through the sparsek package, which must be installed.

With the package installed, either of these works:

    import sparsek_cli.models
    AutoModelForCausalLM.from_pretrained(folder)

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import importlib

try:
    _models = importlib.import_module("sparsek_cli.models")
except ImportError as error:
    raise ImportError(
        "this checkpoint uses SparseK attention and needs the sparsek package, which could not be "
        f"imported ({error}). Install it in this environment (see README.md beside the "
        "checkpoint), then load again."
    ) from error


def __getattr__(name):
    return getattr(_models, name)
'''


def remote_code_text() -> str:
    """Python source of `REMOTE_CODE_FILE`: the same for every family, holds no model code.

    transformers reads it only with `trust_remote_code=True` and when `sparsek_cli.models` is not
    imported yet. Without the package it raises an ImportError that says what to install.
    """
    return _TEXT
