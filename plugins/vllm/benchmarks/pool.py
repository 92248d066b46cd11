"""Times one layer over a pool of states: rows updated in place, or copied out and back.

    python plugins/vllm/benchmarks/pool.py

A server's step has requests that decode, one token each, and requests that read, pieces of any
length packed into one row. Both ways run on the same pool and take turns; what they answer and what
the pool then holds must be equal to the bit. Prints a Markdown table of medians, in milliseconds of
one core's time, which other processes hardly change. Needs no vLLM.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention


class Layer:
    """One layer's shape, and random input of it."""

    def __init__(self, args: argparse.Namespace):
        self.heads, self.kv_heads, self.head_dim = args.heads, args.kv_heads, args.head_dim
        self.settings = {"topk": args.topk, "window": args.window, "sinks": args.sinks}
        self.new = torch.Generator().manual_seed(0)

    def pool(self, rows: int) -> SparseKState:
        return SparseKState.empty(rows, self.kv_heads, self.head_dim, **self.settings)

    def inputs(self, batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
        """q, k, v and scores."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        drawn = [
            torch.randn(batch, n, tokens, self.head_dim, generator=self.new) for n in heads
        ]  # fmt: skip
        return (*drawn, torch.randn(batch, self.kv_heads, tokens, generator=self.new))

    def in_place(self, pool, rows, inputs, ends) -> torch.Tensor:
        held = StateRows(pool, rows)
        return sparsek_attention(*inputs, state=held, cu_seqlens=ends, **self.settings)[0]

    def copied(self, pool, rows, inputs, ends) -> torch.Tensor:
        held = StateRows(pool, rows)
        out, state = sparsek_attention(
            *inputs, state=held.take(), cu_seqlens=ends, **self.settings
        )  # fmt: skip
        held.put(state)
        return out


def compare(layer: Layer, pool: SparseKState, rows, tokens: list[int] | None, repeats: int):
    """Median milliseconds of both ways; `tokens` of each row that reads, None where all decode."""
    took: dict[str, list[float]] = {"in_place": [], "copied": []}
    ends = None
    if tokens is not None:
        ends = torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()])
    for _ in range(repeats):
        inputs = layer.inputs(len(rows), 1) if tokens is None else layer.inputs(1, sum(tokens))
        pools = {way: pool.clone() for way in took}
        outs = {}
        for way, held in pools.items():
            begin = time.process_time()
            outs[way] = getattr(layer, way)(held, rows, inputs, ends)
            took[way].append(1000 * (time.process_time() - begin))
        if not torch.equal(outs["in_place"], outs["copied"]):
            raise RuntimeError("the two ways answer differently")
        for name, tensor in pools["in_place"].slots.items():
            if not torch.equal(tensor, pools["copied"].slots[name]):
                raise RuntimeError(f"the two ways leave other {name}")
        pool.copy_(pools["in_place"])
    return {way: statistics.median(times[1:]) for way, times in took.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"heads": 8, "kv-heads": 4, "head-dim": 64, "topk": 380, "window": 128, "sinks": 4}
    for name, default in {**sizes, "pool": 32, "repeats": 21}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    layer = Layer(args)
    pool = layer.pool(args.pool)
    for row in range(args.pool):  # all are full from here on
        text = layer.inputs(1, 2 * (args.topk + args.window))
        ends = torch.tensor([0, text[0].shape[2]])
        layer.in_place(pool, torch.tensor([row]), text, ends)
    print("| step | in place, ms | copied, ms |\n|---|---|---|")
    for rows in args.rows:
        some = torch.randperm(args.pool, generator=layer.new)[:rows]
        it = compare(layer, pool, some, None, args.repeats)
        print(f"| {rows} rows decode | {it['in_place']:.2f} | {it['copied']:.2f} |", flush=True)
    some = torch.randperm(args.pool, generator=layer.new)[:4]
    pieces = [500, 17, 130, 64]
    it = compare(layer, pool, some, pieces, args.repeats)
    print(f"| 4 rows read {pieces} | {it['in_place']:.2f} | {it['copied']:.2f} |")


if __name__ == "__main__":
    main()
