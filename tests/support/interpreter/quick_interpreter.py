"""Triton's interpreter without what it does again and again: most of the time of its tests.

Every launch, and within it every call of a device function, looks through all of triton.language
for what to replace, and puts it back; every operation builds a table of NumPy's types, and the type
and shape of its result piece by piece; and every sum is computed a second time in int64, for an
assertion that is off. What is replaced, and by what, stays as it is. `recorded_calls` spares the
rest.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from recorded_calls import RecordedCalls


@contextmanager
def quick_interpreter() -> Iterator[Callable[[], None]]:
    """In force while the context lasts; for triton 3.6 and 3.7, and nothing elsewhere.

    Gives what puts Triton's language back, which the first launch since has replaced.
    """
    from triton.runtime import interpreter

    names = ("_patch_lang", "_patch_builtin", "_LangPatchScope", "_get_np_dtype", "GridExecutor",
             "interpreter_builder")  # fmt: skip
    if not all(hasattr(interpreter, name) for name in names):
        yield lambda: None
        return
    with pytest.MonkeyPatch.context() as patch:
        put_back = _replace_once(interpreter, patch)
        _remember_signatures(interpreter, patch)
        _remember_types(interpreter, patch)
        _remember_shapes(interpreter.tl.core, patch)
        builder = interpreter.interpreter_builder
        if not builder.options.debug:
            options = dataclasses.replace(builder.options, sanitize_overflow=False)
            patch.setattr(builder, "options", options)
        yield put_back
        put_back()


def _replace_once(interpreter: Any, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    replace, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    languages = (interpreter.tl, interpreter.tl.core)
    # Since the language was put back: what was replaced, and for which functions.
    scopes: list[Any] = []
    replaced: set[int] = set()
    ready: set[Any] = set()
    builtins: dict[Any, list[tuple[str, Any]]] = {}
    calls = RecordedCalls(interpreter)

    def replace_if_new(fn):
        if fn not in ready:
            names = fn.__globals__
            seen = {id(value) for value in names.values() if any(value is x for x in languages)}
            if not seen or not seen <= replaced:
                scopes.append(replace(fn))
                replaced.update(seen)
            ready.add(fn)
        return nothing

    def put_back():
        while scopes:
            scopes.pop().restore()
        replaced.clear()
        ready.clear()

    def replace_builtins(package, builder, scope):
        if package not in builtins:
            members = inspect.getmembers(package)
            members = [m for m in members if interpreter.tl.core.is_builtin(m[1])]
            builtins[package] = [(name, calls.of(member)) for name, member in members]
        for name, call in builtins[package]:
            scope.set_attr(package, name, call)

    patch.setattr(interpreter, "_patch_lang", replace_if_new)
    patch.setattr(interpreter, "_patch_builtin", replace_builtins)
    return put_back


def _remember_signatures(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Those of kernels, which each launch asks for twice."""
    signature = functools.cache(inspect.signature)

    def arguments(fn, *args, **kwargs):
        bound = signature(fn).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    quick = types.SimpleNamespace(**vars(inspect))
    quick.getfullargspec, quick.getcallargs = functools.cache(inspect.getfullargspec), arguments
    patch.setattr(interpreter, "inspect", quick)


def _remember_types(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    look_up = interpreter._get_np_dtype
    found: dict[tuple[type, str], Any] = {}

    def remembered(kind):
        key = type(kind), kind.name
        if key not in found:
            found[key] = look_up(kind)
        return found[key]

    patch.setattr(interpreter, "_get_np_dtype", remembered)

    handle_class = interpreter.TensorHandle

    def handle(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        fitting = dtype.__dict__.setdefault("fitting", set())
        if data.itemsize not in fitting:
            self.__post_init__()  # refuses what is too large
            fitting.add(data.itemsize)

    patch.setattr(handle_class, "__init__", handle)

    semantic = interpreter.interpreter_semantic
    tensor_class, to_tensor = semantic.tensor, semantic.to_tensor

    def tensor(x, check_type=True):
        return x if type(x) is tensor_class else to_tensor(x, check_type)

    patch.setattr(semantic, "to_tensor", tensor)


def _remember_shapes(core: Any, patch: pytest.MonkeyPatch) -> None:
    """Of block types by element and shape, of tensors by their type: neither changes once made."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    with_element, equal = core.block_type.with_element_ty, core.tuple.__eq__
    # What is remembered keeps alive what it is found by.
    types: dict[tuple[int, ...], dict[str, Any]] = {}
    others: dict[tuple[int, int], tuple[Any, Any]] = {}

    def block_type(self, element_ty, shape):
        sizes = [x.value if type(x) is core.constexpr else x for x in shape]
        if not _integers(sizes):
            make_type(self, element_ty, shape)
            return
        key = id(element_ty), *sizes
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {**self.__dict__, "of_tensors": []}
        self.__dict__.update(types[key])

    def with_element_ty(self, scalar_ty):
        key = id(scalar_ty), id(self.shape)
        if key not in others:
            others[key] = self.shape, with_element(self, scalar_ty)
        return others[key][1]

    def tensor(self, handle, type):
        known = type.__dict__.setdefault("of_tensors", [])
        if known:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known
        else:
            make_tensor(self, handle, type)
            known += [self.shape, self.numel, self.dtype]

    def is_equal(self, other):
        if type(other) is list and _integers(other):
            return core.constexpr(self.values == other)
        return equal(self, other)

    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.block_type, "with_element_ty", with_element_ty)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(core.tuple, "__eq__", is_equal)


def _integers(sizes: list[Any]) -> bool:
    return all([type(size) is int for size in sizes])
