"""transformers' configs without the two functions in Python that each value is read through.

One asks whether the layers of a config differ, one whether a name stands for another, as GPT-2's
`hidden_size` does for `n_embd`: of millions of values that tests read, hardly any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Of classes that were looked at, those that have an attribute by a name that stands for another.
_known: dict[type, bool] = {}


@contextmanager
def quick_configs() -> Iterator[None]:
    """In force while the context lasts, where transformers is imported and as it is known here."""
    # Where nobody has imported it yet, as kernels' tests do not, there is little to read.
    theirs = sys.modules.get("transformers.integrations.heterogeneity.configuration_utils")
    try:
        mixin, apply = theirs.HeterogeneousConfigMixin, theirs._apply_heterogeneous_config
        ask = mixin.__dict__["__getattribute__"]
        base = sys.modules["transformers.configuration_utils"].PreTrainedConfig
        read, subclass = base.__dict__["__getattribute__"], base.__dict__["__init_subclass__"]
    except (AttributeError, KeyError):  # or another version of it
        yield
        return

    def apply_and_ask(*args, **kwargs):
        mixin.__getattribute__ = ask
        return apply(*args, **kwargs)

    def by_its_other_name(self, key):
        names = type(self).attribute_map
        return getattr(self, names[key]) if key in names else object.__getattribute__(self, key)

    with pytest.MonkeyPatch.context() as patch:

        def look_at(kind: type) -> None:
            if kind not in _known:
                _known[kind] = _has_one_of_both_names(kind)
            if _known[kind]:
                patch.setattr(kind, "__getattribute__", read)

        def init_subclass(cls, *args, **kwargs):
            subclass.__get__(None, cls)(*args, **kwargs)
            look_at(cls)

        patch.delattr(mixin, "__getattribute__")
        patch.setattr(theirs, "_apply_heterogeneous_config", apply_and_ask)
        patch.delattr(base, "__getattribute__")
        patch.setattr(base, "__getattr__", by_its_other_name, raising=False)
        patch.setattr(base, "__init_subclass__", classmethod(init_subclass))
        for kind in _below(base):
            look_at(kind)
        yield


def _below(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def _has_one_of_both_names(kind: Any) -> bool:
    """What stands by the first name is not what is read by it."""
    return any(name in vars(one) for one in kind.__mro__ for name in kind.attribute_map)
