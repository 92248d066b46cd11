"""Operations of Triton's interpreter as functions of handles, without what they do each time.

They look at types, fill arrays of ones and zeros, and call NumPy through its slower functions,
though a recording's types are known: a function here makes the handle that its operation would,
or gives None where it is given another kind of handle than the one that it was made for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Compute = Callable[..., Any]
_CASTS = ("create_int_cast", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si",
          "create_fp_to_ui", "create_fp_ext", "create_fp_trunc")  # fmt: skip
_new = object.__new__


def operation_of(operation: Compute, args: tuple, numbers: list[int]) -> Compute:
    """`operation(*args)` as a function of the arguments of these numbers, in their order."""
    if numbers == [*range(len(args))]:
        return operation
    if numbers == [0]:
        others = args[1:]
        return lambda handle: operation(handle, *others)

    def compute(*handles):
        given = list(args)
        for number, handle in zip(numbers, handles, strict=True):
            given[number] = handle
        return operation(*given)

    return compute


def quick_operation(interpreter: Any, name: str, args: tuple, made: Any) -> Compute | None:
    """A function of the handles among `args`, if there is one for the operation of this name.

    Args:
        interpreter: the module triton.runtime.interpreter.
        made: the handle that the operation made of `args`.
    """
    if name == "create_expand_dims":
        return _expanded(args, made)
    if name in _CASTS:
        return _cast(interpreter.tl, args, made)
    if name == "create_select":
        return _selected(args, made)
    if name in ("create_load", "create_masked_load"):
        return _loaded(interpreter._interpreter.load, name, args, made)
    return None


def _like(kind: Any) -> Callable[[Any], bool]:
    """Whether a kind is that one; a pointer's type is made for each launch."""
    element = getattr(kind, "element_ty", None)
    if element is None:
        return lambda other: other is kind
    return lambda other: getattr(other, "element_ty", None) is element


def _expanded(args: tuple, made: Any) -> Compute | None:
    handle_class, (given, axis) = type(made), args
    if type(axis) is not int or axis < 0 or made.dtype is not given.dtype:
        return None
    index, is_like = (slice(None),) * axis + (None,), _like(given.dtype)

    def compute(a):
        if not is_like(a.dtype):
            return None
        handle = _new(handle_class)
        handle.data, handle.dtype, handle.attr = a.data[index], a.dtype, {}
        return handle

    return compute


def _cast(tl: Any, args: tuple, made: Any) -> Compute | None:
    """NumPy has no bfloat16."""
    handle_class, given, kind, data_kind = type(made), args[0].dtype, made.dtype, made.data.dtype
    if tl.bfloat16 in (given, kind):
        return None

    def compute(a):
        if a.dtype is not given:
            return None
        handle = _new(handle_class)
        handle.data, handle.dtype, handle.attr = a.data.astype(data_kind), kind, {}
        return handle

    return compute


def _selected(args: tuple, made: Any) -> Compute | None:
    handle_class, data_kind = type(made), made.data.dtype
    if made.dtype is not args[2].dtype:
        return None
    where, is_like = np.where, _like(made.dtype)

    def compute(condition, a, b):
        data = where(condition.data, a.data, b.data)
        if data.dtype is not data_kind or not is_like(b.dtype):
            return None
        handle = _new(handle_class)
        handle.data, handle.dtype, handle.attr = data, b.dtype, {}
        return handle

    return compute


def _loaded(load: Any, name: str, args: tuple, made: Any) -> Compute | None:
    """Of pointers alone, or with a mask and what stands in for what it leaves out."""
    handle_class, element, data_kind = type(made), made.dtype, made.data.dtype
    if getattr(args[0].dtype, "element_ty", None) is not element:
        return None
    whole: dict[tuple[int, ...], tuple[Any, Any]] = {}  # by shape, which only `load` reads

    def compute(pointers, mask=None, other=None):
        if getattr(pointers.dtype, "element_ty", None) is not element:
            return None
        places = pointers.data
        if mask is None or other is None:
            shape = places.shape
            if shape not in whole:
                whole[shape] = np.ones(shape, bool), np.zeros(shape, data_kind)
            ones, zeros = whole[shape]
        handle = _new(handle_class)
        handle.data = load(
            places, ones if mask is None else mask.data, zeros if other is None else other.data,
            data_kind,
        )  # fmt: skip
        handle.dtype, handle.attr = element, {}
        return handle

    return compute
