"""The table of families. A family is one row here, and one parameter of the tests.

Rows name what transformers calls things; code per family there is none. tests/families holds
every row to the same behaviour: dense where nothing is dropped, decoding as prefill, padding,
saving, gradients, calibration and conversion.
"""

from __future__ import annotations

from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.row import Row

_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

TABLE: dict[str, Row] = {
    row.model_type: row
    for row in (
        Row("llama", "Llama"),
        Row("mistral", "Mistral", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
        Row("qwen2", "Qwen2", defaults={"num_key_value_heads": 32}),
        Row("qwen3", "Qwen3", defaults={"num_key_value_heads": 32, "head_dim": 128}),
        Row(
            "gpt_neox",
            "GPTNeoX",
            base="gpt_neox",
            attention="attention",
            projections=("query_key_value", "dense"),
            norm="final_layer_norm",
            lora_targets=("query_key_value", "attention.dense"),
        ),
        Row(
            "gpt2",
            "GPT2",
            head="LMHeadModel",
            base="transformer",
            layers="h",
            attention="attn",
            projections=("c_attn", "c_proj"),
            norm="ln_f",
            lora_targets=("attn.c_attn", "attn.c_proj"),
            dropout="attn_pdrop",
            keys=_GPT2_KEYS,
        ),
    )
}


def row_of(config: Any) -> Row:
    """The row of a dense or converted config, or of a `model_type`.

    Raises:
        UsageError: the family is not supported; names those that are.
    """
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    row = TABLE.get(str(model_type).removeprefix("sparsek_"))
    if row is None:
        raise UsageError(
            f"models of type {model_type!r} are not supported",
            hint=f"supported families: {', '.join(TABLE)}",
        )
    return row
