"""Launches that find their compiled kernel by one look into a table.

Triton looks at every argument of a launch to find it, and for a short call that is what a GPU waits
for: 26 us for the 36 arguments of the forward kernel, here 11 (one x86 core, what the driver takes
not counted). What a compiled kernel hangs on is in a key: dtypes, that all pointers are multiples
of 16, all numbers and options as they are.
"""

from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

VERSIONS = ("3.6.", "3.7.")  # of Triton, whose compiled kernels take all arguments in their order
MOST_KNOWN = 1024  # of a kernel: lengths of packed documents differ from call to call
ALIGNMENT = 16  # bytes; for pointers that are no multiples of it Triton compiles another kernel


class _Launches:
    """What is known of one kernel.

    Attributes:
        kernel: from triton.jit or gluon.jit, which must not go away, as it is known by its id.
        tensors: how many arguments are tensors.
        compiled: key -> compiled kernel and the constants behind its arguments; None where Triton
            finds them by itself.
    """

    def __init__(self, kernel: Any, args: tuple) -> None:
        are_tensors = [arg is None or torch.is_tensor(arg) for arg in args]
        self.kernel, self.tensors = kernel, sum(are_tensors)
        if not all(are_tensors[: self.tensors]):
            raise TypeError(f"{kernel}: tensors go before numbers")
        tried = triton.__version__.startswith(VERSIONS) and torch.cuda.is_available()
        tried = tried and isinstance(kernel, JITFunction)  # else it is interpreted
        self.compiled: dict[tuple, tuple[Any, tuple]] | None = {} if tried else None

    def remember(self, key: tuple, compiled: Any, args: tuple, options: dict[str, Any]) -> None:
        if compiled is None:
            return  # whoever stands in for Triton has compiled nothing
        if len(self.compiled) >= MOST_KNOWN:
            self.compiled.clear()
        constants = tuple(options[name] for name in self.kernel.arg_names[len(args) :])
        self.compiled[key] = compiled, constants


_kernels: dict[int, _Launches] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`.

    Args:
        args: tensors (or None), then numbers; always so many of each, and of the same types.
        options: the kernel's constants, all of them, and what it is compiled and launched with.
    """
    known = _kernels.get(id(kernel))
    if known is None:
        known = _kernels[id(kernel)] = _Launches(kernel, args)
    if known.compiled is None:
        kernel[grid](*args, **options)
        return
    address, dtypes = 0, []
    for tensor in args[: known.tensors]:
        if tensor is None:
            dtypes.append(None)
        else:
            address |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
    if address % ALIGNMENT:
        kernel[grid](*args, **options)
        return
    device = driver.active.get_current_device()
    key = device, args[known.tensors :], *dtypes, *options.items()
    found = known.compiled.get(key)
    if found is None:
        known.remember(key, kernel[grid](*args, **options), args, options)
        return
    compiled, constants = found
    stream = driver.active.get_current_stream(device)
    whole = (*grid, 1, 1)[:3]
    compiled[whole](*args, *constants, stream=stream)
