"""Numbers and columns as text."""

from collections.abc import Sequence
from typing import Any


def beside_dense(cell: dict[str, Any]) -> str:
    """How a score compares with dense's: the difference, and the share of it where that is said."""
    share = "" if cell["share"] is None else f", {cell['share']:.0%}"
    return f"{cell['delta']:+.3g}{share}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where people expect none."""
    if value != value:
        return "nan"
    if value == 0 or 0.001 <= abs(value) < 100_000:
        digits = max(0, 3 - _magnitude(value))
        return f"{value:.{min(digits, 4)}f}"
    return f"{value:.3g}"


def _magnitude(value: float) -> int:
    return len(str(int(abs(value)))) - 1 if abs(value) >= 1 else 0


def ratio(share: float) -> str:
    """1/8 for an eighth; 4x where slots outnumber the tokens."""
    return f"1/{1 / share:.3g}" if share <= 1 else f"{share:.3g}x"


def layout(grid: Sequence[Sequence[str]], words: Sequence[int] = (0, 3)) -> list[str]:
    """Lines of aligned columns, a rule below the first; columns in `words` go to the left."""
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = []
    for row in grid:
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
