"""CUDA graphs acted out on a CPU: what is captured is recorded, undone, and replayed on the same
tensors, so that a step which depends on Python, waits for a value or moves a tensor shows."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] in _WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and id(value) not in self.before:
                self.before[id(value)] = (value, value.clone())
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, out))
        return out


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for returned, old, fresh in zip(
                func._schema.returns, tree_leaves(out), tree_leaves(new), strict=False
            ):
                if returned.alias_info is None and torch.is_tensor(old):
                    old.copy_(fresh)


@contextmanager
def recording(graph, **_):
    """In place of torch.cuda.graph: afterwards tensors are as if nothing had run."""
    recorder, random = _Recorder(graph), torch.get_rng_state()
    try:
        with recorder:
            yield
    finally:
        torch.set_rng_state(random)
        for value, before in reversed(recorder.before.values()):
            value.copy_(before)
        for *_, out in graph.calls:  # what a capture returns holds nothing yet
            for tensor in tree_leaves(out):
                if _is_new(tensor) and id(tensor) not in recorder.before:
                    tensor.fill_(float("nan"))


def _is_new(value):
    return torch.is_tensor(value) and value.is_floating_point() and not value._is_view()
