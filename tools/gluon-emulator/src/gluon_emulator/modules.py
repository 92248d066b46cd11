"""Stand-ins for triton.experimental.gluon, and a package imported against them."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from gluon_emulator import shared, values
from gluon_emulator.partitions import program, run_program
from gluon_emulator.values import Pointer, Value, value

GLUON = "triton.experimental.gluon"


class Kernel:
    """What gluon.jit makes of a function: called by kernels, or launched over a grid."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(*arguments, num_warps: int, **constants):
            passed = tuple(_argument(x) for x in arguments)
            for place in itertools.product(*(range(n) for n in grid)):
                run_program(place, grid, self.function, passed, constants)

        return launch


def _jit(function: Callable | None = None, **options: Any) -> Callable:
    """gluon.jit, with or without options: they are the compiler's, and nothing is compiled."""
    return Kernel if function is None else Kernel(function)


def _argument(x):
    if isinstance(x, torch.Tensor):
        return Pointer.to_tensor(x)
    return x if isinstance(x, float) else value(x)


def _reduce(function: Callable) -> Callable:
    def apply(x: Value, axis: int) -> Value:
        return Value(function(x.data, dim=axis).to(x.dtype))

    return apply


def _language() -> ModuleType:
    """triton.experimental.gluon.language: layouts mean nothing here."""
    gl = ModuleType(f"{GLUON}.language")
    gl.constexpr = lambda x: x
    gl.int32, gl.int64, gl.float32 = torch.int32, torch.int64, torch.float32
    gl.BlockedLayout = gl.SliceLayout = gl.SwizzledSharedLayout = lambda *_: None
    gl.NVMMADistributedLayout = gl.DotOperandLayout = lambda *_: None
    gl.NVMMASharedLayout = type("Layout", (), {"get_default_for": staticmethod(lambda *_: None)})
    gl.program_id = lambda axis: value(program().place[axis])
    gl.num_programs = lambda axis: value(program().grid[axis])
    gl.static_range = range
    gl.arange = lambda a, b, layout=None: Value(torch.arange(a, b, dtype=torch.int32))
    gl.zeros = lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype))
    gl.full = lambda shape, x, dtype, layout=None: Value(torch.full(shape, x, dtype=dtype))
    gl.load, gl.store, gl.atomic_add = values.load, values.store, values.atomic_add
    gl.where, gl.maximum, gl.minimum = values.where, values.maximum, values.minimum
    gl.max, gl.min, gl.sum = _reduce(torch.amax), _reduce(torch.amin), _reduce(torch.sum)
    gl.exp2 = lambda x: Value(torch.exp2(x.data))
    gl.log2 = lambda x: Value(torch.log2(x.data))
    gl.reshape = lambda x, shape: Value(x.data.reshape(shape))
    gl.expand_dims = lambda x, axis: Value(x.data.unsqueeze(axis))
    gl.convert_layout = lambda x, layout: x
    gl.allocate_shared_memory = shared.Buffers.allocate
    gl.warp_specialize = lambda functions, warps, registers: program().specialise(functions)
    return gl


def _hopper() -> ModuleType:
    hopper = ModuleType(f"{GLUON}.language.nvidia.hopper")
    barrier = ModuleType("mbarrier")
    barrier.MBarrierLayout = lambda: "barriers"
    barrier.init = lambda barrier, count: barrier.start(count)
    barrier.wait = lambda barrier, phase: barrier.wait(phase)
    barrier.arrive = lambda barrier, count: barrier.arrive(count)
    copies = ModuleType("async_copy")
    copies.async_copy_global_to_shared = shared.copy_to_shared
    copies.mbarrier_arrive = shared.arrive_after_copies
    copies.commit_group = lambda: None
    copies.wait_group = lambda left: shared.land_copies()
    hopper.mbarrier, hopper.async_copy = barrier, copies
    hopper.fence_async_shared = shared.fence
    hopper.warpgroup_mma = shared.multiply
    hopper.warpgroup_mma_wait = shared.wait_products
    return hopper


@contextmanager
def emulated_modules():
    """Inside, `import` of Gluon gives the stand-ins: yields a function that imports a package
    against them, as new modules that nobody else sees."""
    gluon, gl, hopper = ModuleType(GLUON), _language(), _hopper()
    gluon.jit, gluon.language = _jit, gl
    nvidia = ModuleType(f"{GLUON}.language.nvidia")
    gl.nvidia, nvidia.hopper = nvidia, hopper
    stand_ins = {m.__name__: m for m in (gluon, gl, nvidia, hopper)}
    experimental = importlib.import_module("triton.experimental")
    real_gluon = getattr(experimental, "gluon", None)
    before = {name: m for name, m in sys.modules.items() if name.startswith(GLUON)}
    sys.modules.update(stand_ins)
    experimental.gluon = gluon
    try:
        yield _import_anew
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        if real_gluon is not None:
            experimental.gluon = real_gluon


def _import_anew(package: str) -> ModuleType:
    parent, _, name = package.rpartition(".")
    holder = importlib.import_module(parent)

    def imported() -> dict[str, ModuleType]:
        own = (n for n in sys.modules if n == package or n.startswith(f"{package}."))
        return {n: sys.modules[n] for n in own}

    before = imported()
    for name_before in before:
        del sys.modules[name_before]
    try:
        return importlib.import_module(package)
    finally:
        for name_anew in imported():
            del sys.modules[name_anew]
        sys.modules.update(before)
        if package in before:
            setattr(holder, name, before[package])
        elif hasattr(holder, name):  # whoever imports it next gets the real one
            delattr(holder, name)
