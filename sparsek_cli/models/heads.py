"""Whether an attention module has the heads that its config says.

A family whose config has no `num_key_value_heads` or `head_dim` keeps one that is set all the same,
and its attention may heed it or not; scorers and caches would be of another size than its keys.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsek_cli.errors import UsageError
from sparsek_cli.models.config import head_dim, kv_heads

# Maps of an attention module to its keys alone, or with queries and values.
_KEYS = "k_proj"
_FUSED = ("qkv_proj", "query_key_value", "c_attn")


def check_heads(attention: nn.Module, config: Any) -> None:
    """Raises UsageError where keys are of another number or width than a config says.

    Args:
        attention: of a layer, with the family's own projections.
        config: its model's.
    """
    heads, width = kv_heads(config), head_dim(config)
    named = ((name, getattr(attention, name, None)) for name in (_KEYS, *_FUSED))
    for name, projection in named:
        features = getattr(projection, "out_features", None) or getattr(projection, "nf", None)
        parts = heads if name == _KEYS else config.num_attention_heads + 2 * heads
        if features is None or features == parts * width:
            continue
        raise UsageError(
            f"the config says {heads} KV heads of {width} features, and {name} of a "
            f"{config.model_type.removeprefix('sparsek_')} model makes {features} features",
            hint="correct num_key_value_heads and head_dim in the config, or take them out: not "
            "every family has them",
        )
