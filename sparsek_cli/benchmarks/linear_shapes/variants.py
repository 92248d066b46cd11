"""Launch shapes that are tried for a map of a number of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from sparsek_kernels.triton.linears import Shape, shapes

from sparsek_cli.benchmarks.linear_shapes.place import Place


def variants(rows: int, place: Place, quick: bool, toy: bool) -> Iterator[Shape]:
    """Launch shapes to try for a map."""
    columns = place.x.shape[1]
    if toy:
        yield from (Shape(4, 32, 4), Shape(8, 32, 1)) if rows <= 4 else ()
        yield Shape(16, 16, 4, 2, dot=True)
        yield Shape(16, 16, 4, 2, dot=True, held=True)
        yield Shape(8, 32, 2, dot=True, early=True)
        return
    if rows == 1:
        wide = [size for size in (512, 1024, 2048, 4096, 8192) if size <= columns]
        for pairs, step, warps in itertools.product((1, 2, 4, 8), wide, (2, 4, 8)):
            each = pairs * 2 * step // (32 * warps)  # weights a thread holds
            if 16 <= each <= (64 if quick else 128):
                yield Shape(pairs, step, warps)
    if 1 < rows <= 4:
        yield from few_rows_variants(quick)
    yield from early_variants(quick)
    if rows > 1:
        yield from held_variants(quick)
    if quick:
        yield shapes.shape_of(16, columns, place.key[2])
        return
    for pairs, step, warps, stages in itertools.product(
        (8, 16, 32), (128, 256, 512), (2, 4), (3, 5)
    ):
        if 2 * pairs * step * 2 * stages <= 200 << 10:
            yield Shape(pairs, step, warps, stages, dot=True)


def few_rows_variants(quick: bool) -> Iterator[Shape]:
    """Without tensor cores: two to eight rows of a weight for each warp, two of them in turn."""
    some = ((8, 256, 4), (16, 256, 4))
    more = ((4, 256, 4), (8, 256, 2), (8, 512, 4), (8, 512, 8), (16, 256, 8), (4, 1024, 8))
    for shape in some if quick else some + more:
        yield Shape(*shape)


def early_variants(quick: bool) -> Iterator[Shape]:
    """With tensor cores, weights through registers: 32 to 64 of them a thread and step."""
    some = ((4, 1024, 8), (8, 512, 4), (8, 512, 8), (8, 1024, 8), (16, 256, 4))
    more = (
        (4, 512, 2), (4, 512, 4), (4, 1024, 4), (8, 256, 2), (8, 256, 4), (16, 128, 2),
        (16, 256, 8), (16, 512, 8),
    )  # fmt: skip
    for pairs, step, warps in some if quick else some + more:
        yield Shape(pairs, step, warps, dot=True, early=True)


def held_variants(quick: bool) -> Iterator[Shape]:
    """With tensor cores, through shared memory, the first tiles in registers before the wait."""
    some = ((64, 128, 8, 4), (32, 256, 4, 3))
    more = ((32, 128, 4, 5), (32, 256, 8, 3), (16, 256, 4, 3), (8, 512, 4, 3))
    for pairs, step, warps, stages in some if quick else some + more:
        yield Shape(pairs, step, warps, stages, dot=True, held=True)


def overlapping(shape: Shape, columns: int) -> Iterator[Shape]:
    """A shape's launches begin early, without and with more weights on their way to the cache."""
    yield replace(shape, overlap=True)
    if columns > shape.columns:
        yield replace(shape, overlap=True, ahead=1024)


def text(shape: Shape) -> str:
    kind = "early dot" if shape.early else f"dot {shape.stages} stages" if shape.dot else "row"
    late = ", overlapping" if shape.overlap else ""
    late += ", held" if shape.held else ""
    late += f", {shape.ahead} ahead" if shape.ahead else ""
    return f"{kind}, {shape.pairs} pairs x {shape.columns}, {shape.warps} warps{late}"
