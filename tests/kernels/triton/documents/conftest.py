"""What a call asks the device to do."""

from collections import Counter
from contextlib import contextmanager

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# What only looks at a tensor in another way, or reserves memory (and poisons it, in tests).
FREE = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "fill_",
    "flatten", "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.done, self.within_kernel = Counter(), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE and not self.within_kernel:
            self.done[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operations(monkeypatch):
    """A context that counts, by name, operations of PyTorch and launches of Triton's kernels."""

    @contextmanager
    def counted():
        mode = _Counting()
        launch = interpreter.GridExecutor.__call__

        def call(grid, *args, **options):
            mode.done[grid.fn.__name__] += 1
            mode.within_kernel = True
            try:
                return launch(grid, *args, **options)
            finally:
                mode.within_kernel = False

        with monkeypatch.context() as patch, mode:
            patch.setattr(interpreter.GridExecutor, "__call__", call)
            yield mode.done

    return counted
