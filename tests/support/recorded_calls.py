"""Functions of Triton's language as the interpreter's operations that they come to.

What `a + b` casts, broadcasts and adds depends on the types of both, and on the values of Python's
numbers alone: the first call with them is recorded, and those that follow repeat its operations on
NumPy's arrays. Whatever cannot be recorded so is called as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MOST = 50_000  # recordings, which hold few bytes each
_PLAIN = (int, float, bool, str, type(None))
# They make nothing but their result of what they are given, so constants come to a constant.
_PURE = ("create_splat", "create_broadcast", "create_expand_dims", "create_int_cast",
         "create_make_range", "create_fp_ext", "create_fp_trunc", "create_si_to_fp")  # fmt: skip


class _Unknown(Exception):
    """An argument or a result that no recording can hold."""


class RecordedCalls:
    """`RecordedCalls(interpreter).of(function)` is a `tl.*` function, or a method of its tensors.

    Args:
        interpreter: the module triton.runtime.interpreter.
    """

    def __init__(self, interpreter: Any) -> None:
        core = interpreter.tl.core
        self._core, self._semantic = core, interpreter.interpreter_semantic
        self._tensor, self._constexpr, self._handle = (
            core.tensor, core.constexpr, interpreter.TensorHandle
        )  # fmt: skip
        self._builder = _recording_builder(interpreter)
        self._recording = type(self._semantic)(self._builder)
        self._types: dict[Any, object] = {}  # what stands for a type in a key
        self._found: dict[Any, Callable[[list[Any]], Any] | None] = {}
        self._busy = False

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls are recorded and repeated."""
        found, semantic, recording = self._found, self._semantic, self._recording
        add_key, tensor_class = self._add_key, self._tensor

        def call(*args, **kwargs):
            if kwargs and kwargs.pop("_semantic", None) is recording:
                return function(*args, _semantic=recording, **kwargs)
            key, tensors = [function], []
            try:
                for arg in args:
                    if type(arg) is tensor_class and "as_key" in (kind := arg.type.__dict__):
                        key.append(kind["as_key"])
                        tensors.append(arg)
                    else:
                        add_key(arg, key, tensors)
                for name, arg in kwargs.items():
                    key.append(name)
                    add_key(arg, key, tensors)
                key = tuple(key)
                repeat = found[key]
            except _Unknown:
                repeat = None
            except KeyError:
                return self._record(key, tensors, function, args, kwargs)
            if repeat is None:
                return function(*args, _semantic=semantic, **kwargs)
            return repeat(tensors)

        return call

    def _add_key(self, arg: Any, key: list[Any], tensors: list[Any]) -> None:
        """Everything about `arg` that operations depend on; tensors by their types alone."""
        kind = type(arg)
        if kind is self._tensor:
            try:
                key.append(arg.type.__dict__["as_key"])
            except KeyError:
                key.append(self._type_key(arg.type))
            tensors.append(arg)
        elif kind in _PLAIN:
            key.append(kind)
            key.append(repr(arg) if kind is float else arg)  # -0.0 is 0.0, and no NaN is another
        elif kind is self._constexpr:
            key.append(kind)
            self._add_key(arg.value, key, tensors)
        elif isinstance(arg, self._core.dtype):
            key.append(kind)
            key.append(self._type_key(arg))
        elif kind in (list, tuple, self._core.tuple):
            values = arg.values if kind is self._core.tuple else arg
            key += (kind, len(values))
            for value in values:
                self._add_key(value, key, tensors)
        elif kind is slice and arg == slice(None):
            key.append(kind)
        else:
            raise _Unknown

    def _type_key(self, kind: Any) -> object:
        core = self._core
        if type(kind) is core.block_type:
            name = self._type_key(kind.element_ty), *kind.shape
        elif type(kind) is core.pointer_type:
            name = self._type_key(kind.element_ty), "*", kind.address_space, kind.const
        elif type(kind) is core.dtype:
            name = kind.name
        else:
            raise _Unknown
        kind.as_key = self._types.setdefault(name, object())
        return kind.as_key

    def _record(self, key, tensors, function, args, kwargs) -> Any:
        handles = [tensor.handle for tensor in tensors]
        # Which of two is one and the same? And one recording at a time.
        if len({id(handle) for handle in handles}) < len(handles) or self._busy:
            return function(*args, _semantic=self._semantic, **kwargs)
        if len(self._found) >= _MOST:
            self._found.clear()
        self._builder.start(handles)
        self._busy = True
        try:
            result = function(*args, _semantic=self._recording, **kwargs)
        finally:
            self._busy = False
        try:
            self._found[key] = self._repeat(self._builder, tensors, result)
        except _Unknown:
            self._found[key] = None
        return result

    def _repeat(self, recorded: Any, tensors: list[Any], result: Any) -> Callable[[list], Any]:
        if recorded.unknown:
            raise _Unknown
        first, steps = recorded.values[:], recorded.steps[:]
        handle_class, tensor_class = self._handle, self._tensor

        def single(made: Any) -> Callable[[list, list], Any]:
            if made is None:
                return lambda tensors, values: None
            if type(made) is not tensor_class:
                raise _Unknown
            for number, tensor in enumerate(tensors):
                if tensor is made:
                    return lambda tensors, values: tensors[number]
            attributes = dict(made.__dict__, handle=None)
            if made.handle is None:  # of a store
                return lambda tensors, values: tensor_class(None, made.type)
            place = recorded.place(made.handle)
            constant = first[place] is not None  # whose arrays are shared, and nothing else

            def tensor(tensors, values):
                handle = values[place]
                if constant:
                    handle = handle_class(handle.data, handle.dtype)
                new = object.__new__(tensor_class)
                new.__dict__.update(attributes)
                new.handle = handle
                return new

            return tensor

        if type(result) in (tuple, list):
            parts, kind = [single(made) for made in result], type(result)

            def give(tensors, values):
                return kind([part(tensors, values) for part in parts])
        else:
            give = single(result)

        def repeat(tensors):
            values = first[:]
            for number, tensor in enumerate(tensors):
                values[number] = tensor.handle
            for step in steps:
                step(values)
            return give(tensors, values)

        return repeat


def _recording_builder(interpreter: Any) -> Any:
    """An interpreter's builder that notes what is asked of it, in `steps` over `values`."""
    base, handle_class = interpreter.InterpreterBuilder, interpreter.TensorHandle
    core, real = interpreter.tl.core, interpreter.interpreter_builder
    noted: list[Any] = []

    class InterpreterBuilder(base):
        """The interpreter's own, with a note of the NumPy function that an operation is."""

        def binary_op(self, lhs, rhs, op):
            noted.append((lhs, rhs, op))
            return super().binary_op(lhs, rhs, op)

    does = InterpreterBuilder()
    does.__dict__ = real.__dict__  # options, and the program that runs

    def is_constant(arg: Any) -> bool:
        if isinstance(arg, (list, tuple, core.tuple)):
            return all(type(x) in (int, core.constexpr) for x in arg)
        return (
            isinstance(arg, (core.dtype, *_PLAIN)) or type(arg).__module__.startswith("triton._C")
        )  # fmt: skip

    class Recording:
        def start(self, handles: list[Any]) -> None:
            """`values` holds what `handles` will be, constants, and what steps make."""
            self.values: list[Any] = [None] * len(handles)
            self.handles, self.steps, self.unknown = list(handles), [], False

        def place(self, handle: Any) -> int:
            for number, known in enumerate(self.handles):
                if known is handle:
                    return number
            raise _Unknown

        def __getattr__(self, name: str) -> Any:
            value = getattr(does, name)
            if not name.startswith(("create_", "get_")):
                return value

            def operation(*args, **kwargs):
                noted.clear()
                made = value(*args, **kwargs)
                if name.startswith("create_"):
                    try:
                        self._add(name, args, kwargs, made)
                    except _Unknown:
                        self.unknown = True
                elif type(made) is handle_class:
                    self.handles.append(made)
                    self.values.append(made)
                return made

            return operation

        def _add(self, name: str, args: tuple, kwargs: dict, made: Any) -> None:
            given = [type(arg) is handle_class for arg in args]
            places = {i: self.place(arg) for i, arg in enumerate(args) if given[i]}
            others = [arg for i, arg in enumerate(args) if not given[i]]
            new = made if type(made) is tuple else () if made is None else (made,)
            if (
                kwargs
                or not all(is_constant(arg) for arg in others)
                or not all(type(handle) is handle_class for handle in new)
            ):
                raise _Unknown
            constant = name in _PURE and all(self.values[p] is not None for p in places.values())
            first = len(self.handles)
            self.handles += new
            self.values += new if constant else [None] * len(new)
            if constant:
                return
            operation = getattr(real, name)
            whole = getattr(base, name).__name__ == "<lambda>" and len(args) == 2 and bool(noted)
            if whole and noted[0][0] is args[0] and noted[0][1] is args[1]:
                step = _numpy_step(operation, noted[0][2], *places.values(), first, made)
            else:
                step = _step(operation, args, places, first, made)
            self.steps.append(step)

    return Recording()


def _step(operation, args, places, first, made) -> Callable[[list[Any]], None]:
    """`values[first:] = operation(*args)`, where arguments that are handles are in `values`."""
    if made is None or type(made) is tuple:

        def step(values):
            given = list(args)
            for number, place in places.items():
                given[number] = values[place]
            now = operation(*given)
            if now is not None:
                values[first : first + len(now)] = now

        return step
    if len(args) == len(places) == 1:
        (place,) = places.values()

        def step(values):
            values[first] = operation(values[place])

        return step

    def step(values):
        given = list(args)
        for number, place in places.items():
            given[number] = values[place]
        values[first] = operation(*given)

    return step


def _numpy_step(operation, function, left, right, first, made) -> Callable[[list[Any]], None]:
    """`_step` of an operation that is a NumPy function of two arrays, whose result is not cast."""
    handle_class, kind, data_kind = type(made), made.dtype, made.data.dtype

    def step(values):
        a, b = values[left], values[right]
        data = function(a.data, b.data)
        if data.dtype is not data_kind or a.dtype is not kind:
            values[first] = operation(a, b)
            return
        handle = values[first] = object.__new__(handle_class)
        handle.data, handle.dtype, handle.attr = data, kind, {}

    return step
