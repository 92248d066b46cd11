"""Tensors and pointers of a kernel: PyTorch tensors with Triton's arithmetic."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import torch

from gluon_emulator.errors import OutOfBounds

# What a masked load leaves where it reads nothing, and what nobody has written.
POISON = {torch.int32: 1 << 28, torch.int64: 1 << 28}


def poison(dtype: torch.dtype):
    return float("nan") if dtype.is_floating_point else POISON[dtype]


def _result_type(a: Value, b: Value) -> torch.dtype:
    """Triton widens by dtype alone; PyTorch would ignore the dtype of a 0-d tensor."""
    return torch.promote_types(a.data.dtype, b.data.dtype)


def _binary(function, is_reversed=False):
    def apply(self: Value, other):
        if isinstance(other, Value):
            dtype = _result_type(self, other)
            a, b = self.data.to(dtype), other.data.to(dtype)
        elif isinstance(other, bool | int | float):
            a, b = self.data, other
            if isinstance(other, float) and not a.dtype.is_floating_point:
                a = a.float()
            if is_reversed:
                b = torch.tensor(other, dtype=a.dtype)
        else:
            return NotImplemented
        return Value(function(b, a) if is_reversed else function(a, b))

    return apply


def _truncating(a, b):
    return torch.div(a, b, rounding_mode="trunc")


_NO_LAYOUT = SimpleNamespace(layout=None)


class Value:
    """A tensor in registers, or a number known only while the kernel runs (0-d)."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    type = _NO_LAYOUT

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

    def __getitem__(self, index) -> Value:
        return Value(self.data[index])

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    __hash__ = None
    __add__, __radd__ = _binary(operator.add), _binary(operator.add, True)
    __sub__, __rsub__ = _binary(operator.sub), _binary(operator.sub, True)
    __mul__, __rmul__ = _binary(operator.mul), _binary(operator.mul, True)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _binary(operator.truediv, True)
    # Integers round towards zero, as in C.
    __floordiv__, __rfloordiv__ = _binary(_truncating), _binary(_truncating, True)
    __mod__, __rmod__ = _binary(torch.fmod), _binary(torch.fmod, True)
    __and__, __rand__ = _binary(operator.and_), _binary(operator.and_, True)
    __or__, __ror__ = _binary(operator.or_), _binary(operator.or_, True)
    __xor__ = _binary(operator.xor)
    __rshift__ = _binary(operator.rshift)
    __lt__, __le__ = _binary(operator.lt), _binary(operator.le)
    __gt__, __ge__ = _binary(operator.gt), _binary(operator.ge)
    __eq__, __ne__ = _binary(operator.eq), _binary(operator.ne)


def value(x) -> Value:
    if isinstance(x, Value):
        return x
    if isinstance(x, float):
        return Value(torch.tensor(x, dtype=torch.float32))
    return Value(torch.tensor(x, dtype=torch.int32 if abs(x) < 2**31 else torch.int64))


class Pointer:
    """Addresses in one tensor's storage."""

    type = _NO_LAYOUT

    def __init__(self, storage: torch.Tensor, offset: Value):
        self.storage, self.offset = storage, offset

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor) -> Pointer:
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(storage, Value(torch.tensor(tensor.storage_offset())))

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.storage.dtype)

    def __add__(self, offset) -> Pointer:
        return Pointer(self.storage, self.offset + value(offset).to(torch.int64))

    def __getitem__(self, index) -> Pointer:
        return Pointer(self.storage, self.offset[index])

    def places(self, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets and which of them are meant, in their common shape; all of those exist."""
        meant = torch.tensor(True) if mask is None else value(mask).data.bool()
        at, meant = torch.broadcast_tensors(self.offset.data, meant)
        size = self.storage.numel()
        if bool((meant & ((at < 0) | (at >= size))).any()):
            raise OutOfBounds(f"an address outside a tensor of {size} elements")
        return at, meant


def load(pointer: Pointer, mask=None, other=None) -> Value:
    at, meant = pointer.places(mask)
    dtype = pointer.storage.dtype
    found = pointer.storage[torch.where(meant, at, 0)]
    rest = poison(dtype) if other is None else value(other).data.to(dtype)
    return Value(torch.where(meant, found, rest))


def store(pointer: Pointer, values, mask=None) -> None:
    at, meant = pointer.places(mask)
    values = value(values).data.to(pointer.storage.dtype).broadcast_to(at.shape)
    pointer.storage[at[meant]] = values[meant]


def atomic_add(pointer: Pointer, values, mask=None, sem=None) -> None:
    at, meant = pointer.places(mask)
    values = value(values).data.to(pointer.storage.dtype).broadcast_to(at.shape)
    pointer.storage.index_put_((at[meant],), values[meant], accumulate=True)


def where(condition, a, b) -> Value:
    dtypes = [x.dtype for x in (a, b) if isinstance(x, Value)] or [value(x).dtype for x in (a, b)]
    dtype = torch.promote_types(dtypes[0], dtypes[-1])
    a, b = (value(x).data.to(dtype) for x in (a, b))
    return Value(torch.where(value(condition).data, a, b))


def maximum(a, b) -> Value:
    return where(value(a) > b, a, b)


def minimum(a, b) -> Value:
    return where(value(a) < b, a, b)
