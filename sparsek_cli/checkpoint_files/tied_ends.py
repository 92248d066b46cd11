"""Input and output embeddings that config.json calls one matrix, and files hold as two."""

from collections.abc import Iterable
from itertools import zip_longest

from sparsek_cli.checkpoint_files.shards import Shard, TensorEntry, blocks

# As they are called in the files of all families, whatever stands before.
_INPUT = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_OUTPUT = ("lm_head.weight", "embed_out.weight")


def ends_differ(shards: Iterable[Shard]) -> bool:
    """Whether both are there, of one number format, and hold other bytes.

    They are read until the first that differs.
    """
    shards = list(shards)
    first, last = _found(shards, _INPUT), _found(shards, _OUTPUT)
    if first is None or last is None:
        return False
    (shard, entry), (other, same) = first, last
    if (entry.dtype, entry.shape) != (same.dtype, same.shape):
        return False  # compared where they are loaded
    with shard.path.open("rb") as a, other.path.open("rb") as b:
        return any(x != y for x, y in zip_longest(blocks(a, entry), blocks(b, same)))


def _found(shards: list[Shard], names: tuple[str, ...]) -> tuple[Shard, TensorEntry] | None:
    """The tensor of the shortest such name: layers beside the model have one of their own."""
    found = [(n, s) for s in shards for n in s.tensors if f".{n}".endswith(_dotted(names))]
    if not found:
        return None
    name, shard = min(found, key=lambda item: len(item[0]))
    return shard, shard.tensors[name]


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)
