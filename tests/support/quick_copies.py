"""copy.deepcopy without a call for each value of a dict or list that is its own copy.

Configs and settings are dicts of numbers and words, and are copied for each model that is loaded:
a million calls. Later versions of Python do the same.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest


def copy_quickly(patch: pytest.MonkeyPatch) -> None:
    """Copies are what they are without it."""
    kinds, atomic = getattr(copy, "_deepcopy_dispatch", {}), getattr(copy, "_deepcopy_atomic", None)
    own = frozenset(kind for kind, copier in kinds.items() if copier is atomic)
    if not {dict, list} <= kinds.keys() or not {int, str} <= own:
        return
    deepcopy = copy.deepcopy

    def of_dict(given: dict, memo: dict) -> dict:
        made: dict[Any, Any] = {}
        memo[id(given)] = made
        for key, value in given.items():
            key = key if type(key) in own else deepcopy(key, memo)
            made[key] = value if type(value) in own else deepcopy(value, memo)
        return made

    def of_list(given: list, memo: dict) -> list:
        made: list[Any] = []
        memo[id(given)] = made
        for value in given:
            made.append(value if type(value) in own else deepcopy(value, memo))
        return made

    patch.setitem(kinds, dict, of_dict)
    patch.setitem(kinds, list, of_list)
