"""Times one layer over a pool of states, as a server has it: steps in place, prompts packed.

    python -m sparsek_cli.benchmarks.pool                  # a GPU, a layer as `bench decode` has it
    python -m sparsek_cli.benchmarks.pool --layer 1b --rows 8,32,64      # as a model of 1B has it
    python -m sparsek_cli.benchmarks.pool --toy            # a smaller one, on a CPU; seconds

First, requests that decode, one token each: rows of a pool changed in place, or copied out and
back. Beside both stands the floor: a batch that is a state of its own, with no pool around it. All
must answer the same, and leave the same behind, to the bit, before any time is taken. On CUDA a
step is a replayed graph, over rows that no step before it had.

Then requests that read: new prompts of many lengths, and pieces of prompts whose rows are full.
Packed in one launch, in tensors of their own and in the pool's rows, beside one request after the
other and a batch padded to the longest. All must answer alike, packed ones leave the same states.
Padding is timed as it is, though what it leaves in shorter rows is of no use. Prompts are timed as
they are called, launches and all, and without them, on the device alone.

On a CPU what counts is the time of this process alone. Prints Markdown tables of median
milliseconds. Needs no vLLM.
"""

from __future__ import annotations

import argparse

import torch

from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.generate_shape import SLOTS
from sparsek_cli.benchmarks.pool import reading, rows

TOPK, WINDOW, SINKS = SLOTS[False]
LAYERS = {
    "toy": dict(heads=8, kv_heads=4, head_dim=64, topk=380, window=128, sinks=4),
    "bench": dict(heads=32, kv_heads=8, head_dim=128, topk=1024, window=1020, sinks=4),
    "1b": dict(heads=32, kv_heads=8, head_dim=64, topk=TOPK, window=WINDOW, sinks=SINKS),
}
PROMPTS = {"cpu": "50,100,700", "cuda": "100,250,500,1000,2000,4000,6000,8000"}
PIECES = {"cpu": "300,17,130,64", "cuda": "1500,17,467,64"}


def _shape(layer: str, batch: int, device: torch.device) -> Shape:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fixed = dict(gate="straight_through", dtype=dtype, device=device, seed=0)
    return Shape(**LAYERS[layer], **fixed, batch=batch)


def time_steps(
    layer: str, counts: list[int], device: torch.device, repeats: int, new: torch.Generator
) -> None:
    """Prints a table of decoding steps of so many rows each."""
    most = rows.SETS * max(counts) if device.type == "cuda" else max(counts)
    pool = rows.filled_pool(_shape(layer, most, device), new)
    print(
        f"A pool of {most} rows of {pool.nbytes // most:,} bytes:\n\n"
        "| step | a state of its own, ms | in place, ms | copied out and back, ms |\n"
        "|---|---|---|---|"
    )
    for count in counts:
        took = rows.measure(_shape(layer, count, device), pool, repeats, new)
        shown = " | ".join(f"{took[way]:.4f}" for way in rows.WAYS)
        print(f"| rows that decode: {count} | {shown} |", flush=True)


def time_reading(
    layer: str, prompts: list[int], pieces: list[int], device, repeats: int, new: torch.Generator
) -> None:
    """Prints a table of reading new prompts, and pieces that continue full rows."""
    print(
        "\n| tokens read | way | as called, ms | of the device alone, ms | memory, MiB |\n"
        "|---|---|---|---|---|"
    )
    for name, lengths in (("new", prompts), ("continued", pieces)):
        shape = _shape(layer, len(lengths), device)
        held = rows.filled_pool(shape, new) if name == "continued" else None
        took = reading.measure(reading.Reading(shape, lengths, held, new), device, repeats)
        for way, (ms, device_ms, peak) in took.items():
            alone = "" if device_ms is None else f"{device_ms:.3f}"
            memory = "" if peak is None else f"{peak / 2**20:.0f}"
            print(f"| {name}: {lengths} | {way} | {ms:.3f} | {alone} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="on a CPU")
    parser.add_argument("--layer", choices=list(LAYERS), help="default: bench on CUDA, else toy")
    parser.add_argument("--rows", default="1,8,32", help="requests that decode together")
    parser.add_argument("--prompts", help="lengths of new prompts that are read together")
    parser.add_argument("--pieces", help="lengths of pieces that continue prompts")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.toy
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(1)
    layer = args.layer or ("bench" if cuda else "toy")
    counts, prompts, pieces = (
        [int(word) for word in text.split(",")]
        for text in (
            args.rows, args.prompts or PROMPTS[device.type], args.pieces or PIECES[device.type]
        )
    )  # fmt: skip
    shape = _shape(layer, 1, device)
    print(
        f"{torch.cuda.get_device_name() if cuda else 'cpu'}, torch {torch.__version__}: "
        f"{shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, topk {shape.topk}, window "
        f"{shape.window}, {shape.sinks} sinks, {str(shape.dtype).removeprefix('torch.')}\n"
    )
    new = torch.Generator(device).manual_seed(shape.seed)
    time_steps(layer, counts, device, args.repeats, new)
    time_reading(layer, prompts, pieces, device, args.repeats, new)


if __name__ == "__main__":
    main()
