"""SparseK attention as transformers models. Importing this registers everything.

After `import sparsek_cli.models`, `AutoModelForCausalLM.from_pretrained` loads converted
checkpoints like any other.
"""

from sparsek_cli.families.remote_code import REMOTE_CODE_FILE, remote_code_text
from sparsek_cli.models.attention.modules import sparsek_attentions
from sparsek_cli.models.attention.registration import register_attention
from sparsek_cli.models.cache.batches import DecodingBatch, fork, join, rows
from sparsek_cli.models.cache.bytes import dense_cache_bytes, sparsek_cache_bytes
from sparsek_cli.models.cache.layers import SparseKCacheLayer
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.cache.state_file import load_state, save_state
from sparsek_cli.models.config import (
    ATTENTION,
    DEFAULTS,
    DENSE_ATTENTION,
    GATES,
    check_settings,
    head_dim,
    kv_heads,
    layer_budget,
    sparse_layers,
)
from sparsek_cli.models.proof import counted_calls, proven
from sparsek_cli.models.registration.classes import (
    FAMILIES,
    Family,
    derived_class,
    family_of,
    sparsek_config_from,
)
from sparsek_cli.models.registration.tables import register
from sparsek_cli.models.runtime import (
    budget,
    dense_attention,
    random_scores,
    replaced_scorers,
    set_budget,
)
from sparsek_cli.models.scorer import RandomScorer, SparseKMlpScorer, SparseKScorer

register_attention()
register()


def __getattr__(name: str) -> type:
    """Derived classes by their own names: what a checkpoint's auto_map and pickle refer to."""
    found = derived_class(name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


__all__ = [
    "ATTENTION",
    "DEFAULTS",
    "DENSE_ATTENTION",
    "DecodingBatch",
    "FAMILIES",
    "Family",
    "GATES",
    "REMOTE_CODE_FILE",
    "RandomScorer",
    "SparseKCache",
    "SparseKCacheLayer",
    "SparseKMlpScorer",
    "SparseKScorer",
    "budget",
    "check_settings",
    "counted_calls",
    "dense_attention",
    "dense_cache_bytes",
    "family_of",
    "fork",
    "head_dim",
    "join",
    "kv_heads",
    "layer_budget",
    "load_state",
    "proven",
    "random_scores",
    "register_attention",
    "remote_code_text",
    "replaced_scorers",
    "rows",
    "save_state",
    "set_budget",
    "sparse_layers",
    "sparsek_attentions",
    "sparsek_cache_bytes",
    "sparsek_config_from",
]
