"""`sparsek bench`: time one attention layer here, sparse beside dense."""

from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import UsageError


def bench(
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,...", help="Context lengths.")
    ] = "1024,2048,4096,8192",
    topk: Annotated[int, typer.Option("--topk", metavar="N", min=0, help="Selected keys.")] = 512,
    window: Annotated[int, typer.Option("--window", metavar="N", min=1, help="Newest.")] = 512,
    sinks: Annotated[int, typer.Option("--sinks", metavar="N", min=0, help="First tokens.")] = 4,
    heads: Annotated[int, typer.Option("--heads", metavar="N", min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option("--kv-heads", metavar="N", min=1, help="KV heads.")] = 2,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", min=1, help="Size.")] = 64,
    backward: Annotated[bool, typer.Option("--backward", help="Time training, too.")] = False,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Time dense, too.")] = True,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Median of.")] = 3,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time one attention layer on this machine, sparse beside dense (batch 1)."""
    from dataclasses import asdict

    from sparsek_cli.speed import Shape, measure

    console = Console(as_json=json, quiet=quiet)
    tokens = _lengths(lengths)
    if heads % kv_heads:
        raise UsageError(
            f"{heads} query heads cannot share {kv_heads} KV heads",
            hint="--heads must be a multiple of --kv-heads",
        )

    from sparsek_cli.devices import choose_device, choose_dtype
    from sparsek_cli.diagnosis import chosen_backend

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    shape = Shape(heads, kv_heads, head_dim, topk, window, sinks)
    name, why = chosen_backend(where, kind)
    console.say(
        f"{name} on {where} ({why}), {str(kind).removeprefix('torch.')}, {heads} heads, "
        f"{kv_heads} KV heads of {head_dim}, k {topk}, window {window}, sinks {sinks}"
    )
    rows = []
    if not json:
        train = "  train ms  dense train" if backward else ""
        console.result(f"{'tokens':>8}  sparse ms  dense ms  ratio  decode ms{train}", None)
    for row in measure(
        tokens,
        shape,
        device=where,
        dtype=kind,
        dense=dense,
        backward=backward,
        repeats=repeats,
        seed=seed or 0,
    ):
        rows.append(asdict(row))
        if not json:
            ratio = f"{row.dense_ms / row.sparse_ms:5.2f}" if row.dense_ms else "    -"
            train = f"  {_ms(row.sparse_train_ms, 8)}  {_ms(row.dense_train_ms, 11)}"
            console.result(
                f"{row.length:>8}  {_ms(row.sparse_ms, 9)}  {_ms(row.dense_ms, 8)}  {ratio}  "
                f"{_ms(row.decode_ms, 9)}{train if backward else ''}",
                None,
            )
    if json:
        backend = {"backend": name, "device": str(where), "dtype": str(kind)}
        console.result("", {**backend, "shape": asdict(shape), "rows": rows})


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(word) for word in text.replace("_", "").split(",") if word.strip()]
    except ValueError as error:
        raise UsageError(
            f"--lengths {text} is no list of numbers", hint="for instance --lengths 4096,8192"
        ) from error
    if not lengths or min(lengths) < 1:
        raise UsageError(f"--lengths {text}: a length is at least 1", hint="--lengths 4096,8192")
    return lengths


def _ms(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>{width}}"
