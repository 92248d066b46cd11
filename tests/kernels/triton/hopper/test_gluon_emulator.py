"""The emulator finds what it says it finds, in kernels of a few lines made to be wrong."""

import importlib

import pytest
import torch

import gluon_emulator
from gluon_emulator import Deadlock, OutOfBounds, Race

pytest.importorskip("triton")

STEPS, STAGES = 5, 2


@pytest.fixture(params=[(2, 0, 1), (0, 1, 2), (1, 2, 0)], ids=str)
def gluon(request):
    """Gluon's stand-ins, under three orders of running: what is wrong is wrong in each."""
    with gluon_emulator.emulated_modules(), gluon_emulator.run_first(*request.param):
        from triton.experimental import gluon
        from triton.experimental.gluon.language.nvidia import hopper

        yield gluon.jit, gluon.language, hopper


def summing(gluon, *, wait_free=True, wait_full=True, fence=True, readers=2, early=False):
    """A kernel: one partition copies blocks, the others multiply each by the identity and sum."""
    jit, gl, hopper = gluon
    barrier, copies = hopper.mbarrier, hopper.async_copy

    def copy(source, ring, full, free):
        at = gl.arange(0, 16)
        at = at[:, None] * 16 + at[None, :]
        for step in range(STEPS):
            slot = step % STAGES
            if wait_free:
                barrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
            copies.async_copy_global_to_shared(ring.index(slot), source + at + step * 256)
            copies.mbarrier_arrive(full.index(slot), increment_count=False)

    def compute(out, one, ring, full, free):
        acc = gl.zeros([16, 16], gl.float32)
        for step in range(STEPS):
            slot = step % STAGES
            if wait_full:
                barrier.wait(full.index(slot), step // STAGES & 1)
            if fence:
                hopper.fence_async_shared()
            acc = hopper.warpgroup_mma(one, ring.index(slot), acc, is_async=True)
            if early:
                barrier.arrive(free.index(slot), count=1)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            if not early:
                barrier.arrive(free.index(slot), count=1)
        at = gl.arange(0, 16)
        gl.store(out + at[:, None] * 16 + at[None, :], acc)

    def kernel(source, left, right, one_at):
        at = gl.arange(0, 16)
        one = gl.load(one_at + at[:, None] * 16 + at[None, :])
        ring = gl.allocate_shared_memory(gl.float32, [STAGES, 16, 16], None)
        full, free = (
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier.MBarrierLayout())
            for _ in range(2)
        )
        for slot in range(STAGES):
            barrier.init(full.index(slot), count=128)
            barrier.init(free.index(slot), count=readers)
        gl.warp_specialize(
            [
                (compute, (left, one, ring, full, free)),
                (compute, (right, one, ring, full, free)),
                (copy, (source, ring, full, free)),
            ],
            [4, 4],
            [128, 64],
        )

    def run(blocks=STEPS):
        source = torch.randn(blocks, 16, 16)
        left, right = torch.empty(16, 16), torch.empty(16, 16)
        jit(kernel)[(1,)](source, left, right, torch.eye(16), num_warps=4)
        return left, right, source.sum(0)

    return run


def test_a_right_kernel_passes(gluon):
    left, right, wanted = summing(gluon)()
    assert torch.allclose(left, wanted, atol=1e-5) and torch.equal(left, right)


@pytest.mark.parametrize(
    "fault, found",
    [
        ({"wait_free": False}, (Race, Deadlock)),
        ({"wait_full": False}, Race),
        ({"fence": False}, Race),
        ({"early": True}, Race),  # a buffer freed before the product that reads it is done
        ({"readers": 1}, (Race, Deadlock)),
        ({"readers": 3}, Deadlock),
    ],
    ids=str,
)
def test_a_wrong_kernel_fails(gluon, fault, found):
    with pytest.raises(found):
        summing(gluon, **fault)()


def test_addresses_outside_a_tensor_fail(gluon):
    with pytest.raises(OutOfBounds):
        summing(gluon)(blocks=STEPS - 1)


def test_integers_wrap_and_round_as_on_the_device(gluon):
    _, gl, _ = gluon
    one = gl.full([1], 2**31 - 1, gl.int32)
    assert int((one + 1).data) == -(2**31)  # what 64-bit addressing is there for
    assert int((gl.full([1], -7, gl.int32) // 2).data) == -3


def test_who_imports_an_emulated_package_next_gets_the_real_one(tmp_path, monkeypatch):
    (tmp_path / "holding_gluon").mkdir()
    (tmp_path / "holding_gluon" / "__init__.py").touch()
    text = "from triton.experimental import gluon"
    (tmp_path / "holding_gluon" / "kernels.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with gluon_emulator.emulated_modules() as import_anew:
        emulated = import_anew("holding_gluon.kernels")
    from holding_gluon import kernels
    from triton.experimental import gluon

    assert kernels.gluon is gluon and emulated.gluon is not gluon
    with gluon_emulator.emulated_modules() as import_anew:
        again = import_anew("holding_gluon.kernels")
    assert again.gluon is not gluon
    assert importlib.import_module("holding_gluon.kernels") is kernels
