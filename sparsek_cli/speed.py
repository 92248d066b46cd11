"""How fast SparseK attention is on this machine, beside PyTorch's dense attention."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """One attention layer: query heads, KV heads, head size, and the budget per KV head."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    topk: int = 512
    window: int = 512
    sinks: int = 4


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one layer at one length, median of the repeats; None was not measured."""

    length: int
    sparse_ms: float
    dense_ms: float | None
    sparse_train_ms: float | None
    dense_train_ms: float | None
    decode_ms: float


def measure(
    lengths: list[int],
    shape: Shape,
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    dense: bool = True,
    backward: bool = False,
    repeats: int = 3,
    seed: int = 0,
) -> Iterator[Timing]:
    """One row per length: forward, forward and backward, and one decoded token.

    Raises:
        ValueError: a shape that no attention has; torch's own error when memory runs out.
    """
    import torch
    from sparsek_kernels import SparseKState, sparsek_attention

    generator = torch.Generator(device="cpu").manual_seed(seed)
    budget = {"topk": shape.topk, "window": shape.window, "sinks": shape.sinks}

    def random(heads: int, *size: int) -> "torch.Tensor":
        return torch.randn(1, heads, *size, generator=generator).to(device=device, dtype=dtype)

    for length in lengths:
        q = random(shape.heads, length, shape.head_dim)
        k, v = (random(shape.kv_heads, length, shape.head_dim) for _ in range(2))
        # A spread of one to three keeps the gates alive (method.md, trap 9).
        scores = 2 * torch.randn(1, shape.kv_heads, length, generator=generator).to(device)

        def sparse(q=q, k=k, v=v, scores=scores) -> "torch.Tensor":
            return sparsek_attention(q, k, v, scores, **budget)

        def full(q=q, k=k, v=v) -> "torch.Tensor":
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

        with torch.no_grad():
            sparse_ms = _median(sparse, device, repeats)
            dense_ms = _median(full, device, repeats) if dense else None
            state = SparseKState.empty(
                1, shape.kv_heads, shape.head_dim, **budget, dtype=dtype, device=device
            )
            _, state = sparsek_attention(q, k, v, scores, **budget, state=state)
            last = (q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], scores[:, :, -1:])

            def decode(state=state, last=last) -> None:
                # Each call appends a token to the same state: its size, and so its cost, is fixed.
                sparsek_attention(*last, **budget, state=state)

            decode_ms = _median(decode, device, 10 * repeats)
        train = [None, None]
        if backward:
            leaves = [x.requires_grad_() for x in (q, k, v, scores)]
            for index, call in enumerate([sparse, full] if dense else [sparse]):

                def step(call=call, leaves=leaves) -> None:
                    call().sum().backward()
                    for leaf in leaves:
                        leaf.grad = None

                train[index] = _median(step, device, repeats)
        yield Timing(length, sparse_ms, dense_ms, *train, decode_ms)


def _median(call: Callable[[], object], device: "torch.device", repeats: int) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()  # compiles, allocates, warms the caches
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
