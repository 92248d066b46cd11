"""Whether config.json still says what was written beside the weights.

A rotary base, a window of the base or a gate that was changed by hand loads without a word, and the
model computes something else. What was written stands in the index, or in the header of weights
that were written whole, and what changed since is told: not refused, since who changes a config
mostly means it.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.shards import INDEX, read_metadata
from sparsek_cli.converted import dense_config, is_converted
from sparsek_cli.errors import SparsekError
from sparsek_cli.families import TABLE
from sparsek_cli.families.own_config import has_key, own_config
from sparsek_cli.families.positions import rope_blocks, rope_type
from sparsek_cli.families.varying_positions import LONGROPE

KEY = "sparsek_config"  # of the metadata: config.json as it was written
_LOG = logging.getLogger("sparsek_cli")
# What a user may choose anew: less or more is kept, by the same scores.
_BUDGET = ("topk", "window", "sinks", "cache_dtype")
_ROPE = "rope_parameters"
_SCALED = ("linear", "dynamic", "yarn")
# Names, and what counts in training or for the length of texts alone.
_FREE = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "max_position_embeddings",
    "initializer_range", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "pretraining_tp",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One value that differs.

    Attributes:
        key: in config.json, parts joined by dots. before, now: as transformers reads them.
        chosen: a budget or a stretch of rotary positions, which are a user's to choose.
    """

    key: str
    before: Any
    now: Any
    chosen: bool

    def text(self) -> str:
        return f"{self.key} {_shown(self.now)} (was {_shown(self.before)})"


def changes(folder: Path) -> list[Change] | None:
    """What differs in config.json from what was written; None: nothing says what that was.

    Both are compared as transformers reads them, since programs spell one config in several ways.
    """
    _, before = _written(folder)
    now = _read(folder / "config.json")
    if not all(isinstance(one, dict) and is_converted(one) for one in (before, now)):
        return None
    return [] if before == now else [*_changes(before, now)]


def say_changes(folder: Path) -> None:
    """Warns where config.json asks for another model than its weights were written for."""
    told = [change.text() for change in changes(folder) or () if not change.chosen]
    if told:
        what = ", ".join(told)
        _warn(f"{folder}: config.json was changed since the model was made: {what}", remedy(folder))


@cache
def _warn(text: str, hint: str) -> None:
    """Once: a verb looks at a folder more than once."""
    _LOG.warning("%s; %s", text, hint)


def remedy(folder: Path) -> str:
    """What to do about a change."""
    place = _written(folder)[0]
    return f"put it back; if it is meant, take '{KEY}' out of the metadata of {place}"


def record(folder: Path, config: Mapping[str, Any]) -> None:
    """Puts config.json into the index of a folder that has one."""
    content = _read(folder / INDEX)
    if isinstance(content, dict) and isinstance(content.get("metadata", {}), dict):
        content["metadata"] = {**content.get("metadata", {}), KEY: config}
        json_text.write(folder / INDEX, content)


def _written(folder: Path) -> tuple[str, Any]:
    """Where it stands what was written, and that; None: nowhere."""
    index = _read(folder / INDEX)
    metadata = index.get("metadata") if isinstance(index, dict) else None
    if isinstance(metadata, dict) and KEY in metadata:
        return INDEX, metadata[KEY]
    for file in sorted(folder.glob("model*.safetensors")):
        if (said := read_metadata(file).get(KEY)) is not None:
            return file.name, _parsed(said)
    return "", None


def _read(file: Path) -> Any:
    """What a JSON file says; None where there is none that can be read."""
    try:
        return _parsed(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _parsed(text: str) -> Any:
    try:
        return json_text.parse(text)
    except (ValueError, RecursionError):
        return None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    kind = str(before["model_type"])
    if now.get("model_type") != kind:
        yield Change("model_type", kind, now.get("model_type"), False)
        return
    row = TABLE.get(kind.removeprefix("sparsek_"))
    if row is None:
        return
    blocks = [one.get("sparsek") or {} for one in (before, now)]
    for key, *values in _differing(*blocks):
        yield Change(f"sparsek.{key}", *values, key in _BUDGET)
    try:
        own = [own_config(row, dense_config(one)).to_dict() for one in (before, now)]
    except SparsekError:  # whoever loads it says what is wrong
        return
    free = _free()
    blocks = [block for one in own for block in rope_blocks(one)]
    if any(rope_type(block) == LONGROPE for block in blocks):
        free -= {"max_position_embeddings"}  # it says which factors are taken
    for key, *values in _differing(*own):
        if key in free or "drop" in key or not has_key(row, key):
            continue
        if key == _ROPE and all(isinstance(value, dict) for value in values):
            yield from _turned(*values)
        else:
            yield Change(key, *values, False)


def _turned(before: dict[str, Any], now: dict[str, Any], at: str = _ROPE) -> Iterator[Change]:
    """Of rotary positions: one block, or one for each type of layer."""
    chosen = _stretches(before, now)
    for key, *values in _differing(before, now):
        if all(isinstance(value, dict) for value in values):
            yield from _turned(*values, f"{at}.{key}")
        else:
            yield Change(f"{at}.{key}", *values, chosen)


def _stretches(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether positions are only scaled to longer texts, as YaRN's are."""
    was, is_now = rope_type(before), rope_type(now)
    same = all(before.get(k) == now.get(k) for k in ("rope_theta", "partial_rotary_factor"))
    return same and is_now in _SCALED and was in ("default", is_now)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


@cache
def _free() -> frozenset[str]:
    """Keys that change no logits; settings of `generate` stood in config.json once."""
    from transformers import GenerationConfig

    return frozenset((*_FREE, *GenerationConfig().to_dict()))


def _shown(value: Any) -> str:
    """A value, but no hundred numbers."""
    text = "none" if value is None else str(value)
    return text if len(text) < 60 else f"{text[:50]}..."
