"""Decoding steps on a CUDA device: one launch and two, rotary positions, the likeliest token."""

from contextlib import nullcontext

import pytest
import torch
from logits import cases
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.state import SparseKState
from sparsek_kernels.triton import linears
from sparsek_kernels.triton.decode import step
from sparsek_kernels.triton.decode.likeliest import likeliest
from sparsek_kernels.triton.launches.overlap import states_at_rest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8])
def test_one_launch_is_two_and_the_same_to_the_bit_before_it_waits(
    monkeypatch, relative_error, kept
):
    """600 steps: two launches, one that waits first, one that reads a state at rest before."""
    options = {"topk": (300, 40), "window": 70, "sinks": 4}
    new = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(3, 8, 600, 64, generator=new, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(3, 2, 600, 64, generator=new, device="cuda", dtype=torch.bfloat16)
    scores = torch.randn(3, 2, 600, generator=new, device="cuda")
    outs, states = [], []
    for rows, rest in ((0, nullcontext), (4, nullcontext), (4, states_at_rest)):
        monkeypatch.setattr(step, "ONE_LAUNCH_ROWS", rows)
        state = SparseKState.empty(3, 2, 64, dtype=kept, device="cuda", **options)
        with rest():
            for at in range(600):
                # A copy is launched by torch, and so waits for all before it.
                part = [x[:, :, at : at + 1].clone() for x in (q, k, k, scores)]
                out, state = sparsek_attention(*part, state=state, **options)
                outs.append(out)
        states.append(state)
    two, late, early = (torch.stack(outs[i : i + 600]) for i in (0, 600, 1200))
    assert torch.equal(late, early)
    assert relative_error(early, two) < 1e-2
    for name, tensor in states[0].slots.items():
        assert all(torch.equal(state.slots[name], tensor) for state in states[1:]), name


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_launch_of_any_head_is_pytorch(relative_error, dim, dtype):
    options = {"topk": (888, 60), "window": 128, "sinks": 4}
    new = torch.Generator("cuda").manual_seed(0)
    states = [
        SparseKState.empty(4, 2, dim, dtype=dtype, device="cuda", **options) for _ in range(2)
    ]
    for count in (1500, *[1] * 40):
        q, k, v = (
            torch.randn(4, heads, count, dim, generator=new, device="cuda").to(dtype)
            for heads in (8, 2, 2)
        )
        scores = torch.randint(0, 9, (4, 2, count), generator=new, device="cuda").float()
        outs = []
        for i, backend in enumerate(("triton", "pytorch")):
            out, states[i] = sparsek_attention(
                q, k, v, scores, state=states[i], backend=backend, **options
            )
            outs.append(out)
        assert relative_error(*outs) < (1e-5 if dtype == torch.float32 else 2e-2)
        assert torch.equal(states[0].seen, states[1].seen)
    held = [state.positions.sort(1).values for state in states]
    assert torch.equal(*held)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 2049, 50257, 128256])
def test_the_likeliest_is_argmax(count, dtype):
    for logits in cases(count, dtype):
        logits = logits.cuda()
        assert torch.equal(likeliest(logits), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rotary_positions(dtype):
    frequencies = (1.0 / 10000.0 ** (torch.arange(32) / 32)).cuda()
    places = torch.tensor([0, 1, 777, 65_536, 1_048_575, 16_000_000]).cuda()
    angles = (places[:, None].float() * frequencies).repeat(1, 2)
    found = linears.rotary(places, frequencies, 0.75, dtype)
    for part, wanted in zip(found, (angles.cos() * 0.75, angles.sin() * 0.75), strict=True):
        atol = 3e-7 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(part, wanted.to(dtype), atol=atol, rtol=0)
