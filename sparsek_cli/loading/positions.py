"""Rotary positions beyond the length that a model was made for."""

import logging
from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.layers import FULL
from sparsek_cli.families.positions import rope_type

_LOG = logging.getLogger("sparsek_cli")
_MOST = 1 << 24
_ORIGINAL = "original_max_position_embeddings"
# What `stretch` changes of a config.
CHANGED = ("rope_parameters", "max_position_embeddings", _ORIGINAL)


def stretch(config: Any, factor: float) -> None:
    """Sets `config` to YaRN, so that the model takes `factor` times its own length.

    Of a family with positions by type of layer those of full attention alone: the others never
    look further than their window.

    Source: Peng et al. 2023, arXiv 2309.00071.

    Raises:
        UsageError: the model has no rotary positions, or scales them already; or the factor
            stretches nothing.
    """
    if not 1 < factor <= _MOST:
        raise UsageError(
            f"--yarn {factor:g} is out of range", hint="name a factor above 1, or drop --yarn"
        )
    kind = _kind(config)
    if not can_stretch(config):
        why = "has no rotary positions" if kind is None else f"scales them already ({kind})"
        if kind == "default":
            why = "says no length of its own (max_position_embeddings)"
        raise UsageError(
            f"--yarn stretches rotary positions, and {config.model_type} {why}", hint="drop --yarn"
        )
    rope, own = config.rope_parameters, config.max_position_embeddings
    scaling = {
        "rope_type": "yarn", "factor": float(factor), _ORIGINAL: own,
    }  # fmt: skip
    full = _of_full(rope)
    config.rope_parameters = rope | (scaling if full is None else {full: rope[full] | scaling})
    config.max_position_embeddings = int(own * factor)
    if hasattr(config, _ORIGINAL):  # Phi-3's own, which comes before that of the block
        config.original_max_position_embeddings = own


def can_stretch(config: Any) -> bool:
    """Whether `stretch` takes the config."""
    return _kind(config) == "default" and hasattr(config, "max_position_embeddings")


def say_unsaved(config: Any, name: str) -> None:
    """Warns of a stretched config that transformers refuses to write: Phi-3's knows no YaRN."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        config.validate()
    except StrictDataclassError:
        _LOG.warning(
            "'%s' with yarn can be used, and not saved: transformers takes no YaRN in configs of "
            "%s; load it without yarn to save it", name, config.model_type,
        )  # fmt: skip


def _kind(config: Any) -> str | None:
    """`rope_type` of the positions of full attention."""
    rope = getattr(config, "rope_parameters", None)
    full = _of_full(rope)
    return rope_type(rope if full is None else rope[full])


def _of_full(rope: Any) -> str | None:
    """Where each type of layer has a block of its own, the name of full attention's."""
    blocks = rope if isinstance(rope, Mapping) else {}
    return next((name for name in FULL if isinstance(blocks.get(name), Mapping)), None)
