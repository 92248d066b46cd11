"""A checkpoint on disk becomes a model and its tokenizer: one way for all verbs.

No weight is ever random, no pickle is read, no code of a checkpoint runs, nothing is asked.

weights         the model, every weight of which is there
configs         config.json as transformers reads it, and what it may not say
positions       rotary positions beyond the model's own length
reads_on        whether a model of an unknown family can be read in pieces
tokenizers      the tokenizer, whose ids fit the model
generation      generation_config.json as transformers reads it
library_errors  what libraries raise meanwhile, in one line
"""

from sparsek_cli.loading.configs import load_config
from sparsek_cli.loading.library_errors import readable_errors, tokenizer_reason
from sparsek_cli.loading.reads_on import check_reads_on, stands_where_told
from sparsek_cli.loading.tokenizers import (
    check_tokenizer,
    closing_tokens,
    leave_open,
    load_open_tokenizer,
    load_tokenizer,
)
from sparsek_cli.loading.weights import (
    check_loaded,
    check_whole,
    embedding_rows,
    load_model,
    load_weights,
    say_untied,
)

__all__ = [
    "check_loaded",
    "check_reads_on",
    "check_tokenizer",
    "check_whole",
    "closing_tokens",
    "embedding_rows",
    "leave_open",
    "load_config",
    "load_model",
    "load_open_tokenizer",
    "load_tokenizer",
    "load_weights",
    "readable_errors",
    "say_untied",
    "stands_where_told",
    "tokenizer_reason",
]
