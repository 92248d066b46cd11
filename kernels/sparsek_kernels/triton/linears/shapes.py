"""How a linear map of a few rows is cut into programs."""

from dataclasses import dataclass, replace

_NORM_TILE = 8192  # numbers of a step of a norm's pass: all of four rows of 2048


@dataclass(frozen=True)
class Shape:
    """pairs: pairs of outputs of a program; columns: inputs per step; warps, stages: of Triton.

    dot: whether the tensor cores multiply up to sixteen rows, or up to four are multiplied without
        them.
    overlap: whether a launch may begin, and ask for its weights, before the one before it has ended
        (sm_90 and later, elsewhere it is left out).
    early: with `dot`, weights pass through registers, one step ahead, and each warp multiplies its
        own columns (16 or more); else they pass through shared memory, `stages` ahead, and none is
        asked for before the launch before this one has ended.
    ahead: how many columns of its weights (a power of two) a program asks the L2 cache for before
        it waits for anything, and then stays ahead by; 0: none.
    held: with `dot`, through shared memory: the first tiles are asked for before the wait, and stay
        in registers until the rest has been multiplied.
    """

    pairs: int
    columns: int
    warps: int
    stages: int = 1
    dot: bool = False
    overlap: bool = False
    early: bool = False
    ahead: int = 0
    held: bool = False

    @property
    def most_rows(self) -> int:
        return 16 if self.dot else 4

    @property
    def beside(self) -> int:
        """Warps that work beside each other on other columns (`early`), or on other outputs."""
        if self.dot:
            return self.warps
        return min(self.pairs, max(1, 256 * self.warps // self.columns))

    def within(self, size: int, shared: int) -> "Shape":
        """With as many stages as fit in `shared` bytes, of weights of `size` bytes a number.

        Triton takes tiles of both weights, of rows and of a norm for each stage but one.
        """
        if not self.dot or self.early:
            return self
        line = self.columns * size
        fit = 1 + (shared - 16 * line) // (line * (2 * self.pairs + 16 + 1))
        return replace(self, stages=max(1, min(self.stages, fit)))

    def padded(self, rows: int) -> int:
        """Rows of a tile: a power of two, and through shared memory what tensor cores take."""
        return 16 if self.dot and not self.early else 1 << (rows - 1).bit_length()

    def norm_columns(self, rows: int, columns: int) -> int:
        """Inputs per step of the pass that finds a norm's scale."""
        if self.dot and not self.early:
            return self.columns
        return min(1 << (columns - 1).bit_length(), _NORM_TILE // self.padded(rows))


def rows_class(rows: int) -> int:
    """The most rows of those for which maps are cut alike: 1, 4 or 16."""
    return 1 if rows == 1 else 4 if rows <= 4 else 16


# By what reads most: 16 KiB of weights for each step of a program of 128 threads, so that several
# programs fit on a multiprocessor and it has some 64 KiB under way.
# `python -m sparsek_cli.benchmarks.linear_shapes` measures these and others.
_FEW_ROWS = Shape(pairs=16, columns=256, warps=4, stages=4, dot=True)
USUAL: dict[int, Shape] = {
    1: Shape(pairs=2, columns=2048, warps=4, overlap=True),
    4: _FEW_ROWS,
    16: _FEW_ROWS,
}


# What was measured to be faster, by (class of rows, inputs, outputs): maps of a 1B Llama on an H200
# (docs/results).
TUNED: dict[tuple[int, int, int], Shape] = {
    (1, 2048, 16384): Shape(pairs=1, columns=2048, warps=4, overlap=True),
    (1, 8192, 2048): Shape(pairs=1, columns=2048, warps=4, overlap=True),
    (4, 2048, 16384): Shape(64, 128, 8, stages=4, dot=True, overlap=True, held=True),
    (4, 8192, 2048): Shape(8, 1024, 8, dot=True, overlap=True, early=True),
    (4, 2048, 3072): Shape(8, 512, 4, dot=True, overlap=True, early=True),
    (4, 2048, 2048): Shape(8, 1024, 8, dot=True, overlap=True, early=True),
    (16, 2048, 16384): Shape(pairs=32, columns=256, warps=4, stages=3, dot=True),
    (16, 2048, 3072): Shape(pairs=16, columns=256, warps=4, stages=3, dot=True),
}

# Where torch's own product, with what is added to it in a second launch, was faster than any shape.
FASTER_IN_TORCH: set[tuple[int, int, int]] = {(4, 2048, 128256), (16, 8192, 2048)}


def shape_of(rows: int, columns: int, outputs: int) -> Shape:
    """The shape for maps of `rows` rows from `columns` inputs to `outputs` outputs in all."""
    kind = rows_class(rows)
    tuned = TUNED.get((kind, columns, outputs))
    if tuned is not None:
        return tuned
    shape = USUAL[kind]
    if columns >= shape.columns:
        return shape
    whole = 1 << max(4, (columns - 1).bit_length())
    if shape.early:
        return replace(shape, columns=whole, warps=min(shape.warps, whole // 16))
    if shape.dot:
        return replace(shape, columns=whole)
    # As many weights per step from a narrow input: more outputs of each program.
    pairs = shape.pairs * (shape.columns // whole)
    return replace(shape, columns=whole, pairs=min(pairs, 16))
