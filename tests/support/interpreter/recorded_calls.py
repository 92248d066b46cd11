"""Functions of Triton's language as the interpreter's operations that they come to.

What `a + b` casts, broadcasts and adds depends on the types of both, and on the values of Python's
numbers alone: the first call with them is recorded, and those that follow repeat its operations on
NumPy's arrays. Whatever cannot be recorded so is called as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from recorded_steps import PLAIN, Unknown, recording_builder

_MOST = 50_000  # recordings, which hold few bytes each
_HELD = {"handle", "type", "shape", "numel", "dtype"}  # by a tensor


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
        self._builder = recording_builder(interpreter)
        self._recording = type(self._semantic)(self._builder)
        self._types: dict[Any, object] = {}  # what stands for a type in a key
        self._found: dict[Any, Callable[[list[Any]], Any] | None] = {}
        # By function: those of `_found` that are one step of two arguments, as functions of them.
        self._of_two: dict[Any, dict[Any, Callable[[Any, Any], Any]]] = {}
        self._busy = False

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls are recorded and repeated."""
        found, own = self._found, (None, self._semantic)
        semantic = self._semantic
        add_key, tensor_class = self._add_key, self._tensor

        def call(*args, **kwargs):
            if kwargs and (asked := kwargs.pop("_semantic", None)) not in own:
                return function(*args, _semantic=asked, **kwargs)  # somebody's recording
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
            except Unknown:
                repeat = None
            except KeyError:
                return self._record(key, tensors, function, args, kwargs)
            if repeat is None:
                return function(*args, _semantic=semantic, **kwargs)
            return repeat(tensors)

        if [*inspect.signature(function).parameters] != ["self", "other", "_semantic"]:
            return call
        known = self._of_two.setdefault(function, {})

        def operator(a, b, _semantic=None):
            """Most calls there are; keys are those of `call`, without the function."""
            once = None
            if _semantic in own:
                try:
                    if type(b) is tensor_class:
                        once = known[a.type.as_key, b.type.as_key]
                    elif type(b) is int:
                        once = known[a.type.as_key, int, b]
                except (AttributeError, KeyError):  # a new type, or no recording
                    pass
            return call(a, b, _semantic=_semantic) if once is None else once(a, b)

        return operator

    def _add_key(self, arg: Any, key: list[Any], tensors: list[Any]) -> None:
        """Everything about `arg` that operations depend on; tensors by their types alone."""
        kind = type(arg)
        if kind is self._tensor:
            try:
                key.append(arg.type.__dict__["as_key"])
            except KeyError:
                key.append(self._type_key(arg.type))
            tensors.append(arg)
        elif kind in PLAIN:
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
            raise Unknown

    def _type_key(self, kind: Any) -> object:
        core = self._core
        if type(kind) is core.block_type:
            name = self._type_key(kind.element_ty), *kind.shape
        elif type(kind) is core.pointer_type:
            name = self._type_key(kind.element_ty), "*", kind.address_space, kind.const
        elif type(kind) is core.dtype:
            name = kind.name
        else:
            raise Unknown
        kind.as_key = self._types.setdefault(name, object())
        return kind.as_key

    def _record(self, key, tensors, function, args, kwargs) -> Any:
        handles = [tensor.handle for tensor in tensors]
        # Which of two is one and the same? And one recording at a time.
        if len({id(handle) for handle in handles}) < len(handles) or self._busy:
            return function(*args, _semantic=self._semantic, **kwargs)
        if len(self._found) >= _MOST:
            self._found.clear()
            for known in self._of_two.values():
                known.clear()
        self._builder.start(handles)
        self._busy = True
        try:
            result = function(*args, _semantic=self._recording, **kwargs)
        finally:
            self._busy = False
        try:
            repeat = self._found[key] = self._repeat(self._builder, tensors, result)
            if len(args) == 2 and not kwargs and hasattr(repeat, "of_two"):
                self._of_two.get(function, {})[key[1:]] = repeat.of_two
        except Unknown:
            self._found[key] = None
        return result

    def _repeat(self, recorded: Any, tensors: list[Any], result: Any) -> Callable[[list], Any]:
        if recorded.unknown:
            raise Unknown
        first, places = recorded.values[:], []
        handle_class, tensor_class = self._handle, self._tensor

        def single(made: Any) -> Callable[[list, list], Any]:
            if made is None:
                return lambda tensors, values: None
            if type(made) is not tensor_class:
                raise Unknown
            for number, tensor in enumerate(tensors):
                if tensor is made:
                    return lambda tensors, values: tensors[number]
            attributes = dict(made.__dict__, handle=None)
            if made.handle is None:  # of a store
                return lambda tensors, values: tensor_class(None, made.type)
            place = recorded.place(made.handle)
            places.append(place)
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
        steps = recorded.steps_for(places)

        def repeat(tensors):
            values = first[:]
            for number, tensor in enumerate(tensors):
                values[number] = tensor.handle
            for step in steps:
                step(values)
            return give(tensors, values)

        if len(steps) == 1 and type(result) is tensor_class:
            (step,) = steps
            if places == [getattr(step, "made", None)] and result.__dict__.keys() == _HELD:
                return _one_step(step, first, len(tensors), result, repeat)
        return repeat


def _one_step(
    step: Any, first: list[Any], count: int, result: Any, repeat: Callable[[list], Any]
) -> Callable[[list], Any]:
    """`repeat` of a single step that makes all there is: most calls are those of an operator.

    Args:
        first: the constants among what the step is given. count: of the tensors.
    """
    tensor_class, new = type(result), object.__new__
    kind, shape, numel, dtype = result.type, result.shape, result.numel, result.dtype
    places, compute = step.places, step.compute
    # What each place holds: a tensor, by its number, or a constant.
    held = [(place, None if place < count else first[place]) for place in places]
    (left, a), (right, b) = (*held, (0, None), (0, None))[:2]

    def once(tensors):
        if len(held) == 2:
            handle = compute(
                tensors[left].handle if a is None else a, tensors[right].handle if b is None else b
            )
        else:
            handle = compute(*[tensors[n].handle if one is None else one for n, one in held])
        if handle is None:
            return repeat(tensors)
        made = new(tensor_class)
        made.handle, made.type, made.shape, made.numel, made.dtype = (
            handle, kind, shape, numel, dtype
        )  # fmt: skip
        return made

    if len(held) == 2:
        of_one = a is not None or b is not None
        once.of_two = lambda one, other: once((one,) if of_one else (one, other))
        if step.arrays and left == 0 and a is None and (b is not None or right == 1):
            once.of_two = _of_two_arrays(step.arrays, b, result, repeat)
    return once


def _of_two_arrays(
    arrays: tuple, constant: Any, result: Any, repeat: Callable[[tuple], Any]
) -> Callable[[Any, Any], Any]:
    """A step's `compute` of a tensor and another, or a constant, all in one: of most calls."""
    function, (left_data, left_kind), (right_data, right_kind), data_kind, handle_class = arrays
    element = getattr(left_kind, "element_ty", None)
    tensor_class, new = type(result), object.__new__
    type_, shape, numel, dtype = result.type, result.shape, result.numel, result.dtype

    def of_two(one, other):
        a, b = one.handle, other.handle if constant is None else constant
        x, y, kind = a.data, b.data, a.dtype
        if x.dtype is left_data and y.dtype is right_data and b.dtype is right_kind and (
            kind is left_kind or element is not None and getattr(kind, "element_ty", 0) is element
        ):  # fmt: skip
            data = function(x, y)
            if data.dtype is data_kind:
                handle, made = new(handle_class), new(tensor_class)
                handle.data, handle.dtype, handle.attr = data, kind, {}
                made.handle, made.type, made.shape = handle, type_, shape
                made.numel, made.dtype = numel, dtype
                return made
        return repeat((one,) if constant is not None else (one, other))

    return of_two
