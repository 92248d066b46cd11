"""Bytes as people read them, in the same units wherever they are printed."""


def size(count: float) -> str:
    """Bytes in binary units, three digits: 1536 -> "1.50 KiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1000 or unit == "TiB":
            break
        amount /= 1024
    digits = 0 if unit == "B" or amount >= 100 else 1 if amount >= 10 else 2
    return f"{amount:.{digits}f} {unit}"
