"""Shared memory: buffers that know who may touch them, copies into them, products from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gluon_emulator.errors import Race
from gluon_emulator.partitions import Barrier, program, warps
from gluon_emulator.values import Pointer, Value, load, poison, value


@dataclass
class Slot:
    """One buffer of a ring. Events are (partition, its time); see `partitions.Warps`."""

    data: torch.Tensor
    written: tuple[int, int] | None = None
    tick: int = 0  # of the last write, to hold fences against
    reads: dict[int, int] = field(default_factory=dict)
    is_landing: bool = False
    products: int = 0  # under way that read it

    def check_write(self) -> None:
        me = warps()
        if self.products or self.is_landing:
            raise Race("written while a product reads it or a copy is on its way to it")
        if self.written is not None and not me.knows(self.written):
            raise Race("written twice, in no order")
        if not all(me.knows(read) for read in self.reads.items()):
            raise Race("written before all have read it")

    def finish_write(self, data: torch.Tensor) -> None:
        self.data.copy_(data)
        self.written = warps().event()
        self.tick = program().next_tick()
        self.reads.clear()
        self.is_landing = False

    def check_read(self) -> None:
        if self.is_landing:
            raise Race("read while a copy is on its way to it")
        if self.written is None:
            raise Race("read before anybody wrote it")
        if not warps().knows(self.written):
            raise Race("read in no order with its last write")

    def finish_read(self) -> None:
        number, time = warps().event()
        self.reads[number] = time


class Buffers:
    """What allocate_shared_memory gives: slots along the first axis, or one slot."""

    def __init__(self, slots: list[Slot], is_ring: bool, is_transposed: bool = False):
        self.slots, self.is_ring, self.is_transposed = slots, is_ring, is_transposed

    @classmethod
    def allocate(cls, dtype: torch.dtype, shape: list[int], layout) -> Buffers | BarrierRing:
        if layout == "barriers":
            return BarrierRing([Barrier() for _ in range(shape[0])])
        is_flat = len(shape) == 1
        rest, count = (shape, 1) if is_flat else (shape[1:], shape[0])
        slots = [Slot(torch.full(rest, poison(dtype), dtype=dtype)) for _ in range(count)]
        return cls(slots, not is_flat)

    @property
    def dtype(self) -> torch.dtype:
        return self.slots[0].data.dtype

    def index(self, place) -> Buffers:
        return Buffers([self.slots[int(place)]], False)

    def permute(self, axes) -> Buffers:
        if tuple(axes) != (1, 0):
            raise NotImplementedError(axes)
        return Buffers(self.slots, False, not self.is_transposed)

    @property
    def slot(self) -> Slot:
        if self.is_ring:
            raise TypeError("a ring of buffers is no buffer: use index()")
        return self.slots[0]

    def content(self) -> torch.Tensor:
        return self.slot.data.T if self.is_transposed else self.slot.data

    def store(self, values: Value) -> None:
        self.slot.check_write()
        self.slot.finish_write(value(values).data)

    def load(self, layout=None) -> Value:
        self.slot.check_read()
        self.slot.finish_read()
        return Value(self.content().clone())


class BarrierRing:
    def __init__(self, barriers: list[Barrier]):
        self.barriers = barriers

    def index(self, place) -> Barrier:
        return self.barriers[int(place)]


def copy_to_shared(to: Buffers, source: Pointer, mask=None) -> None:
    """cp.async: it lands when it must at the latest; what is masked out becomes zero."""
    to.slot.check_write()
    data = load(source, mask=mask, other=None if mask is None else 0).data
    to.slot.data.fill_(poison(to.dtype))
    to.slot.is_landing = True
    warps().copies.append((to.slot, data))


def land_copies() -> None:
    for slot, data in warps().copies:
        slot.finish_write(data)
    warps().copies.clear()


def arrive_after_copies(barrier: Barrier, increment_count: bool) -> None:
    """All 128 threads arrive when the copies issued so far have landed."""
    if increment_count:
        raise NotImplementedError("increment_count")
    land_copies()
    barrier.arrive(128)


class Product:
    """A product under way: its operands in shared memory are read until it is waited for."""

    def __init__(self, a, b: Buffers, acc: Value, use_acc: bool):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.result: Value | None = None
        for slot in self.slots:
            slot.check_read()
            if slot.tick > warps().fence:
                raise Race("a product reads what was written after the last fence")
            slot.products += 1
        warps().products.append(self)

    @property
    def slots(self) -> list[Slot]:
        return [x.slot for x in (self.a, self.b) if isinstance(x, Buffers)]

    def finish(self) -> None:
        a, b = (
            (x.content() if isinstance(x, Buffers) else x.data).float() for x in (self.a, self.b)
        )
        self.result = Value(a @ b + self.acc.data if self.use_acc else a @ b)
        for slot in self.slots:
            slot.products -= 1
            slot.finish_read()


def multiply(a, b: Buffers, acc: Value, use_acc=True, *, is_async: bool) -> Product:
    if not isinstance(acc, Value):
        raise AssertionError("a product adds to one that is still under way")
    if not is_async:
        raise NotImplementedError("products that are waited for at once")
    return Product(a, b, acc, use_acc)


def wait_products(left: int, deps: list):
    """All but the last `left` products are done; gives the values of `deps`."""
    under_way = warps().products
    while len(under_way) > left:
        under_way.pop(0).finish()
    found = [x.result if isinstance(x, Product) else x for x in deps]
    if any(x is None for x in found):
        raise AssertionError("the wait leaves a product under way that is used")
    return found[0] if len(found) == 1 else tuple(found)


def fence() -> None:
    warps().fence = program().next_tick()
