"""SparseK attention as transformers models. Importing this registers everything.

After `import sparsek_cli.models`, `AutoModelForCausalLM.from_pretrained` loads converted
checkpoints like any other.
"""

from sparsek_cli.models.attention import register_attention
from sparsek_cli.models.cache import (
    SparseKCache,
    SparseKCacheLayer,
    dense_cache_bytes,
    sparsek_cache_bytes,
)
from sparsek_cli.models.config import (
    ATTENTION,
    DEFAULTS,
    DENSE_ATTENTION,
    GATES,
    REMOTE_CODE_FILE,
    check_settings,
    head_dim,
    kv_heads,
    layer_budget,
)
from sparsek_cli.models.families import (
    FAMILIES,
    Family,
    family_of,
    sparsek_config_from,
)
from sparsek_cli.models.modeling import sparsek_attentions
from sparsek_cli.models.registration import register
from sparsek_cli.models.remote_code import remote_code_text
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

# The derived classes under their own names: what a checkpoint's auto_map and pickle refer to.
for _family in FAMILIES.values():
    for _class in _family.derived:
        globals()[_class.__name__] = _class
del _family, _class

__all__ = [
    "ATTENTION",
    "DEFAULTS",
    "DENSE_ATTENTION",
    "FAMILIES",
    "GATES",
    "REMOTE_CODE_FILE",
    "Family",
    "RandomScorer",
    "SparseKCache",
    "SparseKCacheLayer",
    "SparseKMlpScorer",
    "SparseKScorer",
    "budget",
    "check_settings",
    "dense_attention",
    "dense_cache_bytes",
    "family_of",
    "head_dim",
    "kv_heads",
    "layer_budget",
    "random_scores",
    "register_attention",
    "remote_code_text",
    "replaced_scorers",
    "set_budget",
    "sparsek_attentions",
    "sparsek_cache_bytes",
    "sparsek_config_from",
]
