"""A name becomes a checkpoint on this machine: a folder, a short name, or a fetched hub id."""

from sparsek_cli.hub.checkpoint import Checkpoint, bundled, resolve, tokenizer_of
from sparsek_cli.hub.download import fetch, is_reachable
from sparsek_cli.hub.names import is_hub_id, is_missed_here, is_short_name
from sparsek_cli.hub.offline import no_way, offline, switch
from sparsek_cli.hub.other_spellings import instead

__all__ = [
    "Checkpoint",
    "bundled",
    "fetch",
    "instead",
    "is_hub_id",
    "is_missed_here",
    "is_reachable",
    "is_short_name",
    "no_way",
    "offline",
    "resolve",
    "switch",
    "tokenizer_of",
]
