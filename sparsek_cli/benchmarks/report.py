"""Benchmark rows as a table for people and a plot."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from sparsek_cli.disk import write_atomically


def _number(value: float | None, width: int, digits: int = 2) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def layer_header(names: list[str]) -> str:
    columns = "".join(f"{name:>12}" for name in names)
    return f"{'tokens':>8}{columns}   ratio  TFLOP/s  of ideal  peak MiB  us/token"


def layer_line(row: dict[str, Any], names: list[str]) -> str:
    times = "".join(_number(row["ms"].get(name), 12) for name in names)
    share = None if row["share_of_ideal"] is None else 100 * row["share_of_ideal"]
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
    return (
        f"{row['length']:>8}{times}{_number(row['ratio'], 8)}{_number(row['tflops'], 9, 1)}"
        f"{_number(share, 9, 0)}%{_number(peak, 10, 0)}{_number(row['us_per_token'], 10, 4)}"
    )


def decode_header(names: list[str]) -> str:
    columns = "".join(f"{name + ' us':>14}" for name in names)
    return f"{'context':>8}{columns}   ratio  state MiB    GB/s  of copy"


def decode_line(row: dict[str, Any], names: list[str]) -> str:
    times = "".join(
        _number(None if row["ms"].get(name) is None else 1e3 * row["ms"][name], 14, 1)
        for name in names
    )
    share = None if row["share_of_copy"] is None else 100 * row["share_of_copy"]
    return (
        f"{row['length']:>8}{times}{_number(row['ratio'], 8)}"
        f"{_number(row['state_bytes'] / 2**20, 11, 1)}"
        f"{_number(row['bytes_per_second'] / 1e9, 8, 0)}{_number(share, 8, 0)}%"
    )


def generate_header() -> str:
    return (
        f"{'prompt':>8}  {'':8}{'first token s':>14}{'peak MiB':>10}{'cache MiB':>11}"
        f"{'tokens/s':>10}{'bytes allow':>13}   ratio"
    )


def generate_line(row: dict[str, Any]) -> str:
    """Three lines: sparse, dense, and dense with split keys, which differs in its rate alone."""
    lines = []
    for name, place in (("sparsek", f"{row['length']:>8}"), ("dense", " " * 8)):
        of = {key: row.get(f"{name}_{key}") for key in _GENERATE}
        peak, cache = (
            None if of[key] is None else of[key] / 2**20 for key in ("peak_bytes", "cache_bytes")
        )
        line = (
            f"{place}  {name:<8}{_number(of['first_s'], 14, 3)}{_number(peak, 10, 0)}"
            f"{_number(cache, 11, 1)}{_number(of['tokens_per_s'], 10, 1)}"
            f"{_number(of['allowed_per_s'], 13, 0)}"
        )
        lines.append(line + (_number(row.get("ratio"), 8) if name == "dense" else ""))
    lines.append(
        f"{'':8}  {'  split':<8}{'':35}{_number(row.get('split_tokens_per_s'), 10, 1)}"
        f"{_number(row.get('dense_allowed_per_s'), 13, 0)}{_number(row.get('split_ratio'), 8)}"
    )
    return "\n".join(lines)


_GENERATE = ("first_s", "peak_bytes", "cache_bytes", "tokens_per_s", "allowed_per_s")


def plot(what: str, rows: list[dict[str, Any]], names: list[str], path: str) -> None:
    """Milliseconds over length, logarithmic both ways; the suffix of `path` names the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name in names:
        points = [(r["length"], r["ms"][name]) for r in rows if name in r.get("ms", {})]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if what == "generate":
        for name in ("sparsek", "dense"):
            key = f"{name}_tokens_per_s"
            points = [(r["length"], 1e3 * r["batch"] / r[key]) for r in rows if key in r]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=what)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    drawn = BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:].lower(), dpi=150)
    plt.close(figure)
    write_atomically(Path(path), drawn.getvalue())
