"""Operations of Triton's interpreter, noted while a function of its language runs, and repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from computed_operations import Compute, operation_of, quick_operation

PLAIN = (int, float, bool, str, type(None))
# They make nothing but their result of what they are given, so constants come to a constant.
_PURE = ("create_splat", "create_broadcast", "create_expand_dims", "create_int_cast",
         "create_make_range", "create_fp_ext", "create_fp_trunc", "create_si_to_fp")  # fmt: skip
_SPREADS = ("create_splat", "create_broadcast")


class Unknown(Exception):
    """An argument or a result that no recording can hold."""


def recording_builder(interpreter: Any) -> Any:
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
            isinstance(arg, (core.dtype, *PLAIN)) or type(arg).__module__.startswith("triton._C")
        )  # fmt: skip

    class Recording:
        def start(self, handles: list[Any]) -> None:
            """`values` holds what `handles` will be, constants, and what steps make."""
            self.values: list[Any] = [None] * len(handles)
            self.handles, self.steps, self.unknown = list(handles), [], False
            self.spread: dict[int, tuple[int, Any]] = {}  # from where, and the step

        def steps_for(self, places: list[int]) -> list[Callable[[list[Any]], None]]:
            """Those that make these, and those that write; NumPy spreads arrays out itself."""
            wanted, kept = set(places), []
            for step, made, needs in reversed(self.steps):
                if made not in self.spread or made in wanted:
                    kept.append(step)
                    wanted |= needs
            return kept[::-1]

        def place(self, handle: Any) -> int:
            for number, known in enumerate(self.handles):
                if known is handle:
                    return number
            raise Unknown

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
                    except Unknown:
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
                raise Unknown
            constant = name in _PURE and all(self.values[p] is not None for p in places.values())
            first = len(self.handles)
            self.handles += new
            self.values += new if constant else [None] * len(new)
            if constant:
                return
            operation, needs = getattr(real, name), {*places.values()}
            if type(made) is not handle_class:
                self.steps.append((_writing(operation, args, places, first), first, needs))
                return
            compute = operation_of(operation, args, [*places])
            step = Step(compute, [*places.values()], first)
            if name in _SPREADS:
                (source,) = places.values()
                if self.handles[source].data.dtype is made.data.dtype:
                    self.spread[first] = source, step
            else:
                quick = quick_operation(interpreter, name, args, made)
                function = None if quick else numpy_function(name, args)
                if quick:
                    step = Step(quick, step.places, first, [step])
                elif function:
                    step, needs = self._by_numpy(function, step.places, first, made, step)
            self.steps.append((step, first, needs))

        def _by_numpy(self, function, places, first, made, step) -> tuple[Any, set[int]]:
            """`step` as `function` of arrays, which spreads them out itself where it can."""
            narrow = [self.spread.get(place, (place,))[0] for place in places]
            sizes = [self.handles[place].data.shape for place in narrow]
            before = []
            if narrow != places and np.broadcast_shapes(*sizes) == made.data.shape:
                before = [self.spread[place][1] for place in places if place in self.spread]
                places = narrow
            kinds = [(self.handles[p].data.dtype, self.handles[p].dtype) for p in places]
            arrays = function, *kinds, made.data.dtype, type(made)
            return Step(_of_two_arrays(*arrays), places, first, [*before, step], arrays), {*places}

    def numpy_function(name: str, args: tuple) -> Callable[..., Any] | None:
        """What the operation that was just recorded computes of two arrays, if that is all."""
        if name == "create_addptr":
            width = max(1, args[0].get_element_ty().primitive_bitwidth // 8)
            return lambda pointers, offsets: pointers + width * offsets.astype(np.uint64)
        if getattr(base, name).__name__ != "<lambda>" or len(args) != 2 or not noted:
            return None
        left, right, function = noted[0]
        return function if left is args[0] and right is args[1] else None

    return Recording()


class Step:
    """`compute` of the handles in `places` makes the one in `made`; where it gives None, others do.

    Called with a list of values, it does so there. `arrays`: see `_of_two_arrays`, whose it is.
    """

    __slots__ = ("compute", "places", "made", "arrays", "_otherwise")

    def __init__(
        self, compute: Compute, places: list[int], made: int, otherwise: Sequence = (),
        arrays: tuple | None = None,
    ):  # fmt: skip
        self.compute, self.places, self.made = compute, places, made
        self.arrays, self._otherwise = arrays, otherwise

    def __call__(self, values: list[Any]) -> None:
        places = self.places
        if len(places) == 2:
            handle = self.compute(values[places[0]], values[places[1]])
        elif len(places) == 1:
            handle = self.compute(values[places[0]])
        else:
            handle = self.compute(*[values[place] for place in places])
        if handle is None:
            for other in self._otherwise:
                other(values)
        else:
            values[self.made] = handle


def _writing(operation, args, places, first) -> Callable[[list[Any]], None]:
    """A step that makes several handles from `first` on, or none."""

    def step(values):
        given = list(args)
        for number, place in places.items():
            given[number] = values[place]
        now = operation(*given)
        if now is not None:
            values[first : first + len(now)] = now

    return step


def _of_two_arrays(function, left, right, data_kind, handle_class) -> Compute:
    """`function` of two handles' arrays, whose result is not cast.

    Args:
        left, right: the kinds of array and of handle that they are; a handle's may be another than
            its tensor's: that of what was compared.
        data_kind: of the result.
    """
    (left_data, left_kind), (right_data, right_kind) = left, right
    element = getattr(left_kind, "element_ty", None)  # a pointer's type is made for each launch
    new = object.__new__

    def compute(a, b):
        x, y, kind = a.data, b.data, a.dtype
        if x.dtype is left_data and y.dtype is right_data and b.dtype is right_kind and (
            kind is left_kind or element is not None and getattr(kind, "element_ty", 0) is element
        ):  # fmt: skip
            data = function(x, y)
            if data.dtype is data_kind:
                handle = new(handle_class)
                handle.data, handle.dtype, handle.attr = data, kind, {}
                return handle
        return None

    return compute
