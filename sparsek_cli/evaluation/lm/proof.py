"""Evidence that an evaluation measured what it says: what ran, and what the cache held."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from sparsek_cli.errors import SparsekError
from sparsek_cli.families.by_layer import kv_heads_of


@dataclass
class Proof:
    """What was seen while one task ran under one policy; goes into the result as it is.

    Attributes:
        attention: name of the attention function the model was set to.
        sparse_calls: calls into SparseK attention.
        sparse_queries: query positions that went through it, summed over layers.
        backends: kernels that ran it, with their calls.
        kv_tokens: longest sequence read, with its answer but for the last token, which nothing
            reads; kv_pairs and kv_bytes are the cache's content after it.
        kv_pairs: key-value pairs held, summed over layers and KV heads.
        kv_bytes: size of the cache's tensors.
        kept_share: kv_pairs over what a dense cache would hold for kv_tokens.
        prompts, longest_prompt: how many, and the longest in tokens with room for its answer.
        truncated_prompts, truncated_tokens: prompts cut because the user said so, tokens lost.
    """

    attention: str = ""
    sparse_calls: int = 0
    sparse_queries: int = 0
    backends: dict[str, int] = field(default_factory=dict)
    kv_tokens: int = 0
    kv_pairs: int = 0
    kv_bytes: int = 0
    kept_share: float = 0.0
    prompts: int = 0
    longest_prompt: int = 0
    truncated_prompts: int = 0
    truncated_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def saw_cache(
        self, cache: Any, tokens: int, config: Any, row: int = 0, padding: int = 0
    ) -> None:
        """Notes what a row of `cache` holds after `tokens` tokens, if no longer one was seen."""
        if tokens <= self.kv_tokens:
            return
        pairs, size = held(cache, row, padding)
        self.kv_tokens, self.kv_pairs, self.kv_bytes = tokens, pairs, size
        heads = sum(_heads(layer, config, n) for n, layer in enumerate(cache.layers))
        self.kept_share = round(pairs / (heads * tokens), 6)


def _heads(layer: Any, config: Any, number: int) -> int:
    """KV heads of a layer's keys, as it has them.

    Slots of all heads are one row. Elsewhere the config is not asked: with latent attention
    (DeepSeek) one head is stored, and sliding layers may have another number (MiMo).
    """
    if not _holds_pairs(layer):
        return 0
    one_row = getattr(layer, "state", None) is not None
    return kv_heads_of(config, number) if one_row else layer.keys.shape[1]


def _holds_pairs(layer: Any) -> bool:
    """Others keep a state, or nothing: experts alone, or keys that are another layer's."""
    return getattr(layer, "keys", None) is not None


def held(cache: Any, row: int = 0, padding: int = 0) -> tuple[int, int]:
    """(key-value pairs, bytes of their tensors) of one row of a transformers cache.

    Bytes are those of keys and values, and of states in layers that keep one, for every policy;
    what SparseK keeps beside them (positions and scores of the slots, in `SparseKCache.nbytes`) is
    bookkeeping of a fixed size.

    Args:
        padding: pairs per KV head that only fill the row up to the length of others.
    """
    from sparsek_cli.models.cache.bytes import pair_bytes, state_bytes

    pairs = size = 0
    for layer in cache.layers:
        state, places = getattr(layer, "state", None), getattr(layer, "places", None)
        if state is not None:  # slots, of which -1 marks the empty ones
            pairs += int((state.positions[row] >= 0).sum())
            size += (pair_bytes(layer) + state_bytes(layer)) // state.batch
        elif places is not None:  # heads that hold fewer pairs than others have slots to spare
            kept = int((places[row] >= 0).sum())
            pairs += kept
            size += kept * (layer.keys.nbytes + layer.values.nbytes) // places.numel()
        elif isinstance(layer, LinearAttentionLayer) and not _holds_pairs(layer):
            size += state_bytes(layer) // layer.conv_states[0].shape[0]
        elif _holds_pairs(layer):
            rows, heads, columns, _ = layer.keys.shape
            pairs += heads * (columns - padding)
            column = (layer.keys.nbytes + layer.values.nbytes) // (rows * columns)
            size += column * (columns - padding)
    return pairs, size


def row_bytes(cache: Any, more: int = 0) -> int:
    """Memory that one row of a cache takes once `more` tokens have been added.

    With what `held` leaves out: positions and scores of slots, and what rivals rank pairs by. In
    bfloat16 that is 2 % for heads of 128 numbers, 38 % for heads of 8.
    """
    from sparsek_cli.models.cache.bytes import state_bytes

    size = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        if state is not None:  # all its slots are there from the start
            size += layer.nbytes // state.batch
            continue
        if not _holds_pairs(layer):
            if isinstance(layer, LinearAttentionLayer):
                size += state_bytes(layer) // layer.conv_states[0].shape[0]
            continue
        rows, _, columns, _ = layer.keys.shape
        whole = sum(t.nbytes for t in vars(layer).values() if isinstance(t, torch.Tensor)) // rows
        grows = not getattr(layer, "bounded", False)
        size += whole * (columns + more) // columns if grows else whole
    return size


@contextmanager
def watch_attention(proof: Proof) -> Iterator[None]:
    """Counts what passes through SparseK attention while the block runs.

    Steps that a CUDA graph replays are not counted: the step it was captured from is.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if "sparsek" not in ALL_ATTENTION_FUNCTIONS:
        yield
        return
    from sparsek_kernels import dispatch

    from sparsek_cli.models.proof import counted_calls

    choose = dispatch.backend
    backends: Counter = Counter()

    def noted(*args: Any, **kwargs: Any) -> Any:
        run = choose(*args, **kwargs)
        # sparsek_kernels.<backend>...; the dense shortcut is a function of the dispatcher itself.
        name = run.__module__.split(".")[1]
        backends["sdpa" if name == "dispatch" else name] += 1
        return run

    dispatch.backend = noted
    try:
        with counted_calls() as calls:
            yield
    finally:
        dispatch.backend = choose
        proof.sparse_calls += calls.count
        proof.sparse_queries += calls.queries
        for name, count in backends.items():
            proof.backends[name] = proof.backends.get(name, 0) + count


def check(proof: Proof, *, sparse: bool, most_pairs: int | None, task: str, policy: str) -> None:
    """Fails an evaluation that was not what its label says.

    Args:
        sparse: whether SparseK attention had to run.
        most_pairs: what the cache may hold, over all layers and heads; None: anything.

    Raises:
        SparsekError: the sparse path did not run, the dense one did not stay dense, or the cache
            held more than its budget or than there were tokens.
    """
    if sparse and proof.sparse_calls == 0:
        raise SparsekError(
            f"{task} under '{policy}': SparseK attention was never called",
            hint="the model was loaded with another attention; convert it again, or report this",
        )
    if not sparse and proof.sparse_calls:
        raise SparsekError(
            f"{task} under '{policy}': SparseK attention ran in what should be a dense pass",
            hint="report this with the command",
        )
    if proof.kept_share > 1:
        raise SparsekError(
            f"{task} under '{policy}': the cache held {proof.kept_share:.1%} of the pairs of "
            f"{proof.kv_tokens:,} tokens: some stand in it twice",
            hint="report this with the model and the command",
        )
    if most_pairs is not None and proof.kv_pairs > most_pairs:
        raise SparsekError(
            f"{task} under '{policy}': the cache grew to {proof.kv_pairs:,} pairs, "
            f"{most_pairs:,} are its budget",
            hint="report this with the command",
        )
