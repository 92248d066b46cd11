"""Attention of one layer, forward (`attention`) or a whole step with the scorer (`train`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sparsek_kernels import sparsek_attention

from sparsek_cli.benchmarks.case import Data, Shape, draw
from sparsek_cli.benchmarks.rivals import DENSE, RIVALS, Missing
from sparsek_cli.benchmarks.timing import interleaved_ms, peak_bytes
from sparsek_cli.errors import SparsekError

CHECK_LENGTH = 1500
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def check(shape: Shape, *, backward: bool) -> dict[str, float]:
    """Relative errors of the chosen backend against the PyTorch one in float64.

    Raises:
        SparsekError: an error beyond the dtype's tolerance; there is nothing to time then.
    """
    small = min(shape.topk, 300), min(shape.window, 200)
    options = {**shape.budget, "topk": small[0], "window": small[1]}
    data = draw(shape, CHECK_LENGTH, grad=True)
    out = sparsek_attention(*data.leaves(), **options)
    exact = [x.detach().double().requires_grad_() for x in data.leaves()]
    wanted = sparsek_attention(*exact, backend="pytorch", **options)
    pairs = {"out": (out, wanted)}
    if backward:
        grad = torch.randn_like(out)
        mine = torch.autograd.grad(out, data.leaves(), grad)
        theirs = torch.autograd.grad(wanted, exact, grad.double())
        pairs |= dict(zip(("dq", "dk", "dv", "dscores"), zip(mine, theirs, strict=True),
                          strict=True))  # fmt: skip
    with torch.no_grad():
        errors = {n: float((a.double() - b).norm() / b.norm()) for n, (a, b) in pairs.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] < TOLERANCE[shape.dtype]:
        raise SparsekError(
            f"{worst} is off by {errors[worst]:.1e}: not timing a wrong kernel",
            hint="run the kernel tests (`pytest -m gpu tests/kernels`) and report the result",
        )
    return errors


def _with_scorer(data: Data, shape: Shape) -> tuple[Callable[[], torch.Tensor], list]:
    """Scores from a hidden state, as a converted layer computes them, then attention."""
    from sparsek_cli.models.scorer import SparseKScorer

    width = shape.heads * shape.head_dim
    scorer = SparseKScorer(width, shape.kv_heads).to(shape.device)
    with torch.no_grad():
        scorer.weight.normal_(0, 2 / math.sqrt(width))
        scorer.bias.zero_()
        scorer.slopes.fill_(1e-4)
    hidden = torch.randn(
        shape.batch, data.q.shape[2], width, device=shape.device, dtype=shape.dtype
    ).requires_grad_()

    def call() -> torch.Tensor:
        scores, slopes = scorer(hidden)
        return sparsek_attention(data.q, data.k, data.v, scores, slopes=slopes, **shape.budget)

    return call, [data.q, data.k, data.v, hidden, *scorer.parameters()]


def _step(call: Callable[[], torch.Tensor], leaves: list, grad: torch.Tensor) -> Callable:
    def run() -> None:
        torch.autograd.grad(call(), leaves, grad)

    return run


def measure(
    lengths: Iterable[int],
    shape: Shape,
    against: list[str],
    *,
    train: bool,
    repeats: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row per length: milliseconds, ratio, TFLOP/s, share of ideal, peak memory."""
    for length in lengths:
        data = draw(shape, length, grad=train)
        missing: dict[str, str] = {}
        calls: dict[str, Callable[[], object]] = {}
        grad = torch.randn_like(data.q) if train else None
        if train:
            call, leaves = _with_scorer(data, shape)
            calls["sparsek"] = _step(call, leaves, grad)
        else:
            calls["sparsek"] = lambda data=data: sparsek_attention(*data.leaves(), **shape.budget)
        for name in against:
            try:
                call = RIVALS[name](data, shape)
                calls[name] = _step(call, [data.q, data.k, data.v], grad) if train else call
                calls[name]()
            except Missing as error:
                missing[name] = str(error)
            except (RuntimeError, ImportError, TypeError) as error:
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            if name in missing:
                calls.pop(name, None)
                say(f"{name} at {length}: {missing[name]}")
        ms = interleaved_ms(calls, shape.device, repeats)
        peak = peak_bytes(calls["sparsek"], shape.device)
        dense = [ms[name] for name in DENSE if name in ms]
        ratio = min(dense) / ms["sparsek"] if dense else None
        ideal = shape.ideal(length)
        yield {
            "length": length,
            "ms": ms,
            "missing": missing,
            "ratio": ratio,
            "tflops": shape.operations(length, backward=train) / ms["sparsek"] / 1e9,
            "ideal_ratio": ideal,
            "share_of_ideal": None if ratio is None else ratio / ideal,
            "peak_bytes": peak,
            "us_per_token": 1e3 * ms["sparsek"] / length / shape.batch,
        }
        del data, calls, grad


def break_even(rows: list[dict[str, Any]]) -> float | None:
    """Length from which sparse stays ahead of dense, interpolated in log length; None if never."""
    known = [(row["length"], row["ratio"]) for row in rows if row["ratio"]]
    for (a, low), (b, high) in zip(reversed(known[:-1]), reversed(known[1:]), strict=True):
        if low < 1 <= high:
            share = math.log(1 / low) / math.log(high / low)
            return a * (b / a) ** share
    return float(known[0][0]) if known and known[0][1] >= 1 else None
