"""Rotary positions: the longest text they were made for, and the part of a head that they turn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from sparsek_cli.errors import UsageError

_PARTS = ("partial_rotary_factor", "rotary_pct")
_BOTH = ("factor", "rope_theta")
_STRETCHED = (*_BOTH, "original_max_position_embeddings")
# The numbers above 0 that transformers reads of a block of each kind; what is left out, or null, it
# fills in or misses by name.
_POSITIVE = {
    "default": ("rope_theta",),
    "proportional": ("rope_theta",),
    "linear": _BOTH,
    "dynamic": _BOTH,
    "yarn": (*_STRETCHED, "attention_factor", "beta_fast", "beta_slow"),
    "longrope": (*_STRETCHED, "attention_factor"),
    "llama3": (*_STRETCHED, "low_freq_factor", "high_freq_factor"),
}
_BESIDE = ("rope_theta", "partial_rotary_factor")
_TABLES = ("wpe.weight", "embed_positions.weight")
_ZERO_IS_NONE = ("beta_fast", "beta_slow")
_OLD = ("su",)  # what longrope was called
_SEEING = "mrope"  # positions of images, in files of the text part of Qwen2-VL and its like
# What transformers says of a block whose factors are too many or too few.
_COUNTED = re.compile(r"(\w+) field must have length (\d+), got (\d+)")
_LACKING = re.compile(
    r"Missing required keys in `rope_parameters` for 'rope_type'='(\w+)': \{(.+)\}"
)
_ONE_OF = re.compile(r"type field must be one of \['(\w+)'\], got (\w+)")
_LISTED = re.compile(r"(\w+) field must be a list of numbers, got (.+)")


def context_length(own: int, rope: Any) -> int:
    """`max_position_embeddings`, or what YaRN makes of it.

    Model cards switch YaRN on by its block alone and leave `max_position_embeddings` at the length
    that the model was trained on; other configs name the stretched length there.

    Args:
        own: `max_position_embeddings`.
        rope: the config's `rope_parameters` or `rope_scaling`: one block, or one for each type of
            layer.
    """
    if not isinstance(rope, Mapping):
        return own
    blocks = [rope, *(block for block in rope.values() if isinstance(block, Mapping))]
    return max(own, *(_stretched(own, block) for block in blocks))


def learned_positions(model: Any) -> int | None:
    """How many positions a model has in a table (GPT-2's, OPT's); None: it has no such table.

    Beyond its end there is nothing to look up: an IndexError, and on a GPU the end of the process.
    """
    if not any(name.endswith(_TABLES) for name, _ in model.named_parameters()):
        return None
    return getattr(model.config, "max_position_embeddings", None)


def rope_type(rope: Any) -> str | None:
    """How rotary positions are scaled ("default": not at all); None without such positions."""
    if not isinstance(rope, Mapping):
        return None
    return rope.get("rope_type") or rope.get("type") or "default"


def rope_of(config: Mapping[str, Any]) -> Any:
    """What transformers reads of a config: where both are given, `rope_scaling`, the older one."""
    return config.get("rope_scaling") or config.get("rope_parameters")


def check_one_rope(config: Mapping[str, Any]) -> None:
    """`rope_scaling` beside `rope_parameters` takes nothing away.

    Cards of models say to add a `rope_scaling` to config.json. Beside the block that transformers
    5 writes it takes its place, and with it goes the base of the rotary positions.

    Raises:
        UsageError: what `rope_parameters` says would be lost.
    """
    within, read = config.get("rope_parameters"), config.get("rope_scaling")
    if not (within and read and isinstance(within, Mapping) and isinstance(read, Mapping)):
        return
    # What stands beside the blocks counts for both, and what nobody says is 10,000.
    taken = {"rope_theta": 10_000.0} | {k: v for k, v in config.items() if k in _BESIDE} | {**read}
    kinds = ("rope_type", "type")
    lost = [k for k, v in within.items() if k not in kinds and taken.get(k) != v]
    if rope_type(within) not in ("default", rope_type(read)):
        lost += [k for k in kinds if k in within]
    if lost:
        nested = isinstance(within[lost[0]], Mapping)
        raise UsageError(
            f"config.json has rope_scaling beside rope_parameters: it takes its place, and "
            f"{lost[0]} {str(within[lost[0]])[:60]} is lost",
            hint=f"write what rope_scaling says into rope_parameters{'.full_attention' * nested}, "
            "beside what is there, and take rope_scaling out",
        )


def rope_blocks(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The blocks of a config that scale rotary positions: one, or one for each type of layer."""
    rope = rope_of(config)
    if not isinstance(rope, Mapping):
        return []
    nested = [block for block in rope.values() if isinstance(block, Mapping)]
    flat = not nested or "rope_type" in rope or "type" in rope
    return [rope, *nested] if flat else nested


def check_rotary(config: Mapping[str, Any], head_dim: int) -> None:
    """Rotary positions turn features in pairs.

    Of an odd number of features some families make one more, whose queries and keys are then wider
    than their values; others do not run at all, or leave half a pair behind.

    Args:
        config: a config as a dictionary; what it leaves out is taken for even.
        head_dim: features of a head.

    Raises:
        UsageError: the part of a head that is turned is an odd number of features; or as
            `check_scaling`.
    """
    check_scaling(config, head_dim)
    shared = _shared_parts(config, head_dim)
    widths = list(shared)
    for block in rope_blocks(config):
        own = _parts(block, head_dim)
        # Each block says it for its own layers, and the config for all that do not.
        turned = [*own, *shared, head_dim][0]
        if rope_type(block) != "proportional":
            widths += [turned] if config.get("rope_parameters") else own
    odd = next((width for width in widths if width % 2), None)
    if odd is not None:
        raise UsageError(
            f"config.json: rotary positions turn {odd} of the {head_dim} features of a head, and "
            "an odd number makes no pairs",
            hint="correct partial_rotary_factor (rotary_pct, rotary_dim) or head_dim: the weights "
            "were not made with these",
        )


def check_scaling(config: Mapping[str, Any], head_dim: int, *, read: bool = False) -> None:
    """How positions are scaled is known, and by numbers that scale them.

    Args:
        config: a config as a dictionary. head_dim: features of a head.
        read: the config is as its class reads it, which gives old names their new ones.

    Raises:
        UsageError: transformers has no such way, or computes nonsense with such numbers, of which
            it only warns.
    """
    theta = config.get("rope_theta")
    if theta is not None and not _is_positive(theta):
        raise _wrong_theta(theta)
    shared = _shared_parts(config, head_dim)
    for block in rope_blocks(config):
        kind = block.get("rope_type", "default") if read else rope_type(block)
        if not isinstance(kind, str) or kind not in _POSITIVE:
            _check_known(kind, () if read else _OLD)
            continue
        _check_scaling(block, [*_parts(block, head_dim), *shared, head_dim][0])


def _check_known(kind: Any, old: tuple[str, ...]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # takes seconds

    if kind in ROPE_INIT_FUNCTIONS or kind in old:
        return
    if kind == _SEEING:
        raise UsageError(
            "config.json scales rotary positions by 'mrope', which places images, and transformers "
            "has it in models that see only",
            hint='write "default" in its place: text alone has the same positions',
        )
    known = [*ROPE_INIT_FUNCTIONS]
    near = ["longrope"] if kind in _OLD else get_close_matches(str(kind), known, n=1)
    raise UsageError(
        f"config.json scales rotary positions in a way ({kind!r}) that transformers does not have",
        hint=f"did you mean {near[0]!r}?"
        if near
        else f'the ways are {", ".join(known)}; without one it is "rope_type": "default"',
    )


def rotary_error(text: str) -> UsageError | None:
    """What to raise for what a config class of transformers says; None: nothing of positions."""
    if found := _COUNTED.search(text):
        key, takes, has = found.groups()
        return _wrong_scaling("longrope", f"{has} numbers in {key}", f"it takes {takes}")
    if found := _LACKING.search(text):
        kind, keys = found.groups()
        lacking = ", ".join(sorted(key.strip("' ") for key in keys.split(",")))
        return UsageError(
            f"config.json scales rotary positions ({kind}) without {lacking}",
            hint="write it into rope_parameters (rope_scaling), as the config.json that came with "
            "the weights has it; if that one has no such block, take it out",
        )
    if found := _ONE_OF.search(text):
        return UsageError(
            f"config.json scales rotary positions in a way ({found[2]}) that the family does not "
            "have",
            hint=f"its one way is {found[1]}: put back the block that came with the weights; if "
            "none came, take it out",
        )
    if found := _LISTED.search(text):
        key, has = found.groups()
        return _wrong_scaling("longrope", f"{key} {has[:60]}", "it is a list of numbers")
    return None


def _is_positive(value: Any) -> bool:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and 0 < value < math.inf


def _wrong_theta(value: Any) -> UsageError:
    return UsageError(
        f"config.json: rope_theta is {value!r}, and it is a number above 0",
        hint="correct it, and write it without quotes: the weights were made with one",
    )


def _check_scaling(block: Mapping[str, Any], turned: int) -> None:
    """Raises UsageError for numbers that scale no positions.

    Args:
        turned: features of a head; each pair of them has a factor of its own in longrope.
    """
    kind = rope_type(block)
    for key in _POSITIVE[kind]:
        value = block.get(key)
        if key in _ZERO_IS_NONE and not value:
            continue
        if value is None or _is_positive(value):
            continue
        if key == "rope_theta":
            raise _wrong_theta(value)
        raise _wrong_scaling(kind, f"{key} {value!r}", "it is a number above 0")
    for key in ("short_factor", "long_factor"):
        each = block.get(key)
        if kind == "longrope" and isinstance(each, list | tuple) and len(each) != turned // 2:
            raise _wrong_scaling(kind, f"{len(each)} numbers in {key}", f"it takes {turned // 2}")
    ends = {
        "yarn": ("beta_slow", block.get("beta_slow") or 1,
                 "beta_fast", block.get("beta_fast") or 32),
        "llama3": ("low_freq_factor", block.get("low_freq_factor"),
                   "high_freq_factor", block.get("high_freq_factor")),
    }.get(kind)  # fmt: skip
    if ends is None or None in ends:
        return
    low, least, high, most = ends
    if least > most or (least == most and kind == "llama3"):
        raise _wrong_scaling(kind, f"{low} {least} and {high} {most}", f"{low} is the smaller one")


def _wrong_scaling(kind: str | None, what: str, rule: str) -> UsageError:
    return UsageError(
        f"config.json scales rotary positions ({kind}) with {what}, and {rule}",
        hint="correct it in rope_parameters (rope_scaling): the weights were made with another",
    )


def _shared_parts(config: Mapping[str, Any], head_dim: int) -> list[int]:
    """Features that are turned, by what a config says of all its blocks; the first one counts."""
    shared = [*_parts(config, head_dim), config.get("rotary_dim")]
    return [width for width in shared if isinstance(width, int)]


def _parts(block: Mapping[str, Any], head_dim: int) -> list[int]:
    """Features that the shares of a head have which a block names."""
    shares = [block.get(key) for key in _PARTS]
    numeric = [s for s in shares if isinstance(s, int | float) and not isinstance(s, bool)]
    return [int(head_dim * share) for share in numeric if 0 < share <= 1]


def _stretched(own: int, block: Mapping[str, Any]) -> int:
    if rope_type(block) != "yarn":
        return own
    original = block.get("original_max_position_embeddings") or own
    factor = block.get("factor") or 1.0
    numbers = all(isinstance(number, int | float) for number in (original, factor))
    return int(original * factor) if numbers else own
