"""`launch` is `kernel[grid]`: what its table returns is what Triton would have found."""

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from sparsek_kernels.triton.launches import launch as module
from sparsek_kernels.triton.launches.launch import launch
from triton.runtime.jit import JITFunction


def _copy(x, y, step, size, BLOCK: tl.constexpr, KIND: tl.constexpr):
    pass


class Driver:
    """Of a machine with devices of one kind."""

    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 7 + device


class Compiled:
    """What Triton's lookup returns; it keeps what it is launched with."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args, stream: self.launched.append((self, grid, args, stream))


@pytest.fixture
def machine(monkeypatch):
    """(kernel, driver, launches by the table, calls of Triton's lookup)."""
    driver, launched, looked_up = Driver(), [], []

    def run(kernel, *args, grid, warmup, **options):
        looked_up.append((grid, args, options))
        return Compiled(launched)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.driver, "_active", driver)
    monkeypatch.setattr(module, "_kernels", {})
    monkeypatch.setattr(module, "VERSIONS", (module.triton.__version__,))
    return JITFunction(_copy), driver, launched, looked_up


X, Y = torch.zeros(64), torch.zeros(64)
CALL = ((2, 3), X, Y, 5, 0.5), dict(BLOCK=16, KIND="a", num_warps=4)


def test_a_second_launch_asks_triton_for_nothing(machine):
    kernel, _, launched, looked_up = machine
    for _ in range(3):
        launch(kernel, *CALL[0], **CALL[1])
    assert looked_up == [((2, 3), CALL[0][1:], CALL[1])]
    first, second = launched
    assert first[1:] == ((2, 3, 1), (X, Y, 5, 0.5, 16, "a"), 7)
    assert first[0] is second[0]


@pytest.mark.parametrize(
    "other, options",
    [
        ((X.double(), Y, 5, 0.5), {}),
        ((X, Y.half(), 5, 0.5), {}),
        ((X[1:], Y, 5, 0.5), {}),
        ((X, None, 5, 0.5), {}),
        ((X, Y, 6, 0.5), {}),
        ((X, Y, 5, 0.25), {}),
        ((X, Y, 5, 0.5), {"BLOCK": 32}),
        ((X, Y, 5, 0.5), {"KIND": "b"}),
        ((X, Y, 5, 0.5), {"num_warps": 8}),
        ((X, Y, 5, 0.5), {"launch_pdl": True}),
    ],
)
def test_what_triton_compiles_for_is_looked_up_anew(machine, other, options):
    kernel, _, launched, looked_up = machine
    launch(kernel, *CALL[0], **CALL[1])
    launch(kernel, CALL[0][0], *other, **CALL[1] | options)
    assert len(looked_up) == 2 and not launched


def test_each_device_has_its_own(machine):
    kernel, driver, launched, looked_up = machine
    launch(kernel, *CALL[0], **CALL[1])
    driver.device = 1
    for _ in range(2):
        launch(kernel, *CALL[0], **CALL[1])
    assert len(looked_up) == 2 and launched[0][-1] == 8


def test_grid_and_memory_may_change(machine):
    kernel, _, launched, looked_up = machine
    launch(kernel, *CALL[0], **CALL[1])
    launch(kernel, (9,), Y, X, 5, 0.5, **CALL[1])
    assert len(looked_up) == 1
    assert launched[0][1:3] == ((9, 1, 1), (Y, X, 5, 0.5, 16, "a"))


def test_pointers_off_their_lines_go_to_triton_each_time(machine):
    kernel, _, launched, looked_up = machine
    for _ in range(3):
        launch(kernel, (1,), X[1:], Y, 5, 0.5, **CALL[1])
    assert len(looked_up) == 3 and not launched


def test_the_table_is_bounded(machine, monkeypatch):
    kernel, _, _, looked_up = machine
    monkeypatch.setattr(module, "MOST_KNOWN", 4)
    for number in range(20):
        launch(kernel, (1,), X, Y, number, 0.5, **CALL[1])
    assert len(looked_up) == 20
    assert len(module._kernels[id(kernel)].compiled) <= 4


def test_tensors_go_before_numbers(machine):
    with pytest.raises(TypeError, match="before numbers"):
        launch(machine[0], (1,), X, 5, Y, 0.5, **CALL[1])
