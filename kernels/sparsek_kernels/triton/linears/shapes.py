"""How a linear map of a few rows is cut into programs."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """pairs: pairs of outputs of a program; columns: inputs per step; warps, stages: of Triton.

    dot: whether the tensor cores multiply (sixteen rows at the price of one), or one row is
        multiplied without them. overlap: whether a launch may begin, and ask for its weights,
        before the one before it has ended (sm_90 and later, elsewhere it is left out).
    """

    pairs: int
    columns: int
    warps: int
    stages: int = 1
    dot: bool = False
    overlap: bool = False


# By what reads most: 16 KiB of weights for each step of a program of 128 threads, so that several
# programs fit on a multiprocessor and it has some 64 KiB under way.
# `python -m sparsek_cli.benchmarks.linear_shapes` measures these and others.
ONE_ROW = Shape(pairs=2, columns=2048, warps=4, overlap=True)
FEW_ROWS = Shape(pairs=16, columns=256, warps=4, stages=4, dot=True)


# What was measured to be faster, by (whether rows are several, inputs, outputs): maps of a 1B Llama
# on an H200 (docs/results).
TUNED: dict[tuple[bool, int, int], Shape] = {
    (False, 2048, 16384): Shape(pairs=1, columns=2048, warps=4, overlap=True),
    (False, 8192, 2048): Shape(pairs=1, columns=2048, warps=4, overlap=True),
    (True, 2048, 16384): Shape(pairs=32, columns=256, warps=4, stages=3, dot=True),
    (True, 2048, 3072): Shape(pairs=16, columns=256, warps=4, stages=3, dot=True),
}

# Where torch's own product, with what is added to it in a second launch, was faster than any shape:
# few outputs of many inputs leave too few programs.
FASTER_IN_TORCH: set[tuple[bool, int, int]] = {(True, 8192, 2048)}


def shape_of(rows: int, columns: int, outputs: int) -> Shape:
    """The shape for maps of `rows` rows from `columns` inputs to `outputs` outputs in all."""
    tuned = TUNED.get((rows > 1, columns, outputs))
    if tuned is not None:
        return tuned
    shape = ONE_ROW if rows == 1 else FEW_ROWS
    if columns >= shape.columns:
        return shape
    whole = 1 << max(4, (columns - 1).bit_length())
    # As many weights per step from a narrow input: more outputs of each program.
    pairs = shape.pairs if shape.dot else shape.pairs * (shape.columns // whole)
    return replace(shape, columns=min(whole, shape.columns), pairs=min(pairs, 16))
