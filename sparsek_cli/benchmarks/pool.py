"""Times one layer over a pool of states: rows changed in place, or copied out and back.

    python -m sparsek_cli.benchmarks.pool          # on a GPU, a layer as `bench decode` has it
    python -m sparsek_cli.benchmarks.pool --toy    # a smaller one, on a CPU; seconds

A server's step has requests that decode, one token each, and requests that read, pieces of any
length packed into one row. Beside both ways over a pool stands the floor: a batch that is a state
of its own, with no pool around it. Before any time is taken, the ways must answer the same, and
leave the same behind, to the bit. On CUDA a decoding step is a replayed graph, over rows that no
step before it had; on a CPU what counts is the time of this process alone. Prints a Markdown table
of median milliseconds. Needs no vLLM.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention

from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.decode import filled_state
from sparsek_cli.benchmarks.timing import graphed, interleaved_ms

WAYS = ("alone", "in place", "copied")
SETS = 8  # of rows, in turn: on CUDA no step finds its slots in the L2 cache
# By device: the layer, how many rows the pool has, and what four requests read in one step.
SIZES = {
    "cpu": (dict(heads=8, kv_heads=4, head_dim=64, topk=380, window=128), 32, (500, 17, 130, 64)),
    "cuda": (
        dict(heads=32, kv_heads=8, head_dim=128, topk=1024, window=1020), 256, (1500, 17, 467, 64)
    ),
}  # fmt: skip


class Step:
    """One step of a server: some requests' new tokens, and a way to compute it over a pool.

    Args:
        shape: `batch` is the number of requests.
        pieces: how many tokens each of them reads; None where every one decodes.
    """

    def __init__(self, shape: Shape, pieces: tuple[int, ...] | None, new: torch.Generator):
        self.budget, self.ends = shape.budget, None
        batch, tokens = (shape.batch, 1) if pieces is None else (1, sum(pieces))
        if pieces is not None:
            ends = torch.tensor([0, *pieces], device=shape.device)
            self.ends = ends.cumsum(0).to(torch.int32)

        def draw(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(*size, generator=new, device=shape.device, dtype=dtype)

        self.inputs = [
            draw(batch, heads, tokens, shape.head_dim, dtype=shape.dtype)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        ]
        self.inputs.append(draw(batch, shape.kv_heads, tokens, dtype=torch.float32))

    def _attend(self, state):
        return sparsek_attention(
            *self.inputs, state=state, cu_seqlens=self.ends, **self.budget
        )  # fmt: skip

    @torch.no_grad()
    def run(self, way: str, pool: SparseKState, rows: torch.Tensor) -> torch.Tensor:
        """The step's answer; `pool`, or with "alone" a state of only these rows, changes."""
        if way == "in place":
            return self._attend(StateRows(pool, rows))[0]
        if way == "copied":
            out, state = self._attend(pool.index_select(rows))
            StateRows(pool, rows).put(state)
            return out
        out, state = self._attend(pool)
        if state is not pool:
            pool.copy_(state)
        return out


def check(step: Step, pool: SparseKState, rows: torch.Tensor) -> None:
    """Raises RuntimeError unless all ways answer the same and leave the same in these rows."""
    pools = {way: pool.clone() for way in WAYS}
    pools["alone"] = pool.index_select(rows)
    outs = {way: step.run(way, held, rows) for way, held in pools.items()}
    for way in WAYS[1:]:
        if not torch.equal(outs[way], outs["alone"]):
            raise RuntimeError(f"{way} answers otherwise than a state of its own")
        for name, tensor in pools[way].slots.items():
            expected = pool.slots[name].index_copy(0, rows, pools["alone"].slots[name])
            if not torch.equal(tensor, expected):
                raise RuntimeError(f"{way} leaves other {name} than a state of its own")


def measure(
    shape: Shape,
    pool: SparseKState,
    pieces: tuple[int, ...] | None,
    repeats: int,
    new: torch.Generator,
) -> dict[str, float]:
    """Median milliseconds of each way for `shape.batch` rows of the pool; they are used up."""
    cuda = shape.device.type == "cuda"
    step = Step(shape, pieces, new)
    sets = torch.randperm(pool.batch, generator=new, device=shape.device).split(shape.batch)
    sets = [rows for rows in sets if len(rows) == shape.batch][: SETS if cuda else 1]
    check(step, pool, sets[0])
    alone = [pool.index_select(rows) for rows in sets]

    def over(way: str) -> Callable[[], object]:
        def call() -> None:
            for rows, own in zip(sets, alone, strict=True):
                step.run(way, own if way == "alone" else pool, rows)

        return graphed(call) if cuda and pieces is None else call

    calls = {way: over(way) for way in WAYS}
    took = interleaved_ms(calls, shape.device, repeats) if cuda else process_ms(calls, repeats)
    return {way: ms / len(sets) for way, ms in took.items()}


def process_ms(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """As `interleaved_ms`, but the time of this process, which others hardly change."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(1 + repeats):
        for way, call in calls.items():
            begin = time.process_time()
            call()
            times[way].append(1e3 * (time.process_time() - begin))
    return {way: statistics.median(took[1:]) for way, took in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="on a CPU")
    parser.add_argument("--rows", default="1,8,32", help="requests that decode together")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.toy
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    if not cuda:
        torch.set_num_threads(1)
    size, held, pieces = SIZES[device.type]
    fixed = dict(sinks=4, gate="straight_through", dtype=dtype, device=device, seed=0)
    slots = size["topk"] + size["window"] + fixed["sinks"]
    new = torch.Generator(device).manual_seed(fixed["seed"])
    pool = filled_state(Shape(**size, **fixed, batch=held), 4 * slots, new)
    print(
        f"{torch.cuda.get_device_name() if cuda else 'cpu'}, torch {torch.__version__}: "
        f"{size['heads']}/{size['kv_heads']} heads of {size['head_dim']}, {slots} slots, {dtype}, "
        f"a pool of {held} rows of {pool.nbytes // held:,} bytes\n\n"
        "| step | a state of its own, ms | in place, ms | copied out and back, ms |\n"
        "|---|---|---|---|"
    )
    steps = [(int(rows), None) for rows in args.rows.split(",")] + [(len(pieces), pieces)]
    for batch, read in steps:
        shape = Shape(**size, **fixed, batch=batch)
        took = measure(shape, pool, read, args.repeats, new)
        name = f"{batch} rows " + ("decode" if read is None else f"read {list(read)}")
        print(f"| {name} | " + " | ".join(f"{took[way]:.4f}" for way in WAYS) + " |", flush=True)


if __name__ == "__main__":
    main()
