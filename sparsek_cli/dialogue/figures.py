"""Token counts, bytes and seconds of a conversation, as text."""

from sparsek_cli.dialogue.session import Stats


def size(count: int) -> str:
    """Bytes in binary units, three digits: 1536 -> "1.50 KiB"."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1000 or unit == "TiB":
            break
        amount /= 1024
    digits = 0 if unit == "B" or amount >= 100 else 1 if amount >= 10 else 2
    return f"{amount:.{digits}f} {unit}"


def status_line(stats: Stats, *, sparse: bool, limit: int | None = None) -> str:
    """One line: context used, KV bytes now, what dense would hold, tokens per second."""
    context = f"{stats.context_tokens:,} tokens"
    if limit and stats.context_tokens > limit:
        context += f" (made for {limit:,})"
    parts = [context, f"KV {size(stats.kv_bytes)}"]
    if sparse and stats.context_tokens:
        parts.append(f"dense {size(stats.dense_kv_bytes)}")
        # Before the slots are full dense holds less: no gain to show yet.
        if 0 < stats.kv_bytes < stats.dense_kv_bytes:
            parts[-1] += f" ({stats.dense_kv_bytes / stats.kv_bytes:.1f}x)"
    elif not sparse:
        parts[-1] += " (dense, grows)"
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if stats.first_token_seconds:
        parts.append(f"first token {stats.first_token_seconds:.2f} s")
    return "  |  ".join(parts)
