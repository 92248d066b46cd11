"""What families hand to their attention function beside queries, keys and values."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsek_cli.errors import SparsekError

# What models hand on to attention functions and what does not change attention.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "is_causal", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "token_type_ids", "tokenizer", "use_cache",
}  # fmt: skip


def check_arguments(module: nn.Module, arguments: dict[str, Any]) -> None:
    """What a family hands to its attention function counts; nothing of it is dropped unseen."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _HARMLESS:
            raise SparsekError(
                f"{type(module).__name__} calls attention with {name}, which SparseK does not know",
                hint="the model's attention is of another kind and would be computed wrongly",
            )
