"""A cache as a file: what a model has read, saved once and continued any number of times.

One safetensors file: the slots of every layer, and in its metadata what they belong to. A state
says nothing to another model, so the file carries a fingerprint of the weights and is refused
anywhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from sparsek_cli import disk
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families.positions import rope_blocks, rope_type
from sparsek_cli.families.varying_positions import DYNAMIC, LONGROPE, chosen, varying
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.cache.state_checks import (
    SCALES,
    SLOTS,
    SUPPORT,
    Damaged,
    check_counts,
    check_tensors,
    empty_state,
    metadata_of,
    names_of,
)
from sparsek_cli.plain_files import check_plain

FORMAT = "sparsek-state-1"


def save_state(cache: SparseKCache, path: str | Path, model: Any, *, notes: Any = None) -> None:
    """Writes what `model` has read into `cache`.

    Args:
        notes: anything JSON can hold, handed back by `load_state`.

    Raises:
        SparsekError: the cache is empty, or the file cannot be written.
    """
    from safetensors.torch import save_file

    if cache.batch_size < 0:
        raise SparsekError("nothing was read yet", hint="save a state after reading something")
    if not cache.all_slots:
        raise SparsekError(
            "the model has other layers beside SparseK's, whose caches are not saved",
            hint="read the text again",
        )
    tensors = {}
    for index, layer in enumerate(cache.layers):
        for name in (*SLOTS, *SUPPORT, *SCALES):
            value = getattr(layer.state, name)
            if value is not None:
                tensors[f"layers.{index}.{name}"] = value.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "model": fingerprint(model),
        "budgets": json.dumps([_budget(layer) for layer in cache.layers]),
        "tokens": json.dumps([layer.tokens_seen for layer in cache.layers]),
        "heads": json.dumps([layer.state.layout.heads for layer in cache.layers]),
        "notes": json.dumps(notes),
        "positions": _positions(model),
    }
    path = Path(path)
    try:
        with disk.part_of(path) as part, disk.os_errors():
            save_file(tensors, part, metadata)
            part.replace(path)
    except OSError as error:
        raise SparsekError(
            f"cannot write '{path}': {error.strerror}", hint="choose another file"
        ) from error


def load_state(path: str | Path, model: Any) -> tuple[SparseKCache, Any]:
    """(the cache, on the model's device; the notes) of a file that `save_state` wrote.

    Raises:
        UsageError: no such file, not a state, or one of another model, budget or dtype.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_plain(path, hint="name a file that /save-state wrote")
    if not path.is_file():
        raise UsageError(f"no such file: '{path}'", hint="check the path; /save-state writes one")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata.get("format", ""))
            cache = SparseKCache(model.config)
            found = metadata_of(metadata)
            _check(path, found, cache, model)
            _check_positions(path, metadata.get("positions"), model)
            check_counts(found, model.config, len(cache.layers))
            names = names_of(len(cache.layers), set(file.keys()))
            _check_dtype(path, file.get_slice("layers.0.keys").get_dtype(), model)
            batches = {file.get_slice(f"layers.{i}.seen").get_shape()[0] for i in range(len(names))}
            for index, layer in enumerate(cache.layers):
                tensors = {name: file.get_tensor(f"layers.{index}.{name}") for name in names[index]}
                state = empty_state(
                    layer, model, max(batches)
                )  # where they differ, one will not fit
                check_tensors(tensors, state, found["tokens"][index])
                layer.state = dataclasses.replace(state, **tensors)
                layer.tokens_seen = found["tokens"][index]
    except Damaged as error:
        raise UsageError(f"'{path}' is damaged: {error}", hint="name another file") from error
    except (SafetensorError, OSError, IndexError) as error:
        raise UsageError(
            f"'{path}' is damaged or no saved state: {error}", hint="name another file"
        ) from error
    return cache, found["notes"]


def _check_format(path: Path, saved: str) -> None:
    if saved == FORMAT:
        return
    kind, _, version = saved.rpartition("-")
    if kind == FORMAT.rpartition("-")[0] and version.isdecimal() and len(version) < 9:
        raise UsageError(
            f"'{path}' is a saved state of format {version}, and this version of sparsek reads "
            f"format {FORMAT.rpartition('-')[2]}",
            hint="read the text again, or load it with the version that wrote it",
        )
    raise UsageError(f"'{path}' is no saved state", hint="name a file that /save-state wrote")


def _check(path: Path, found: dict[str, Any], cache: SparseKCache, model: Any) -> None:
    if found["model"] != fingerprint(model):
        raise UsageError(
            f"'{path}' was saved with another model", hint="load the model that wrote it"
        )
    now = [_budget(layer) for layer in cache.layers]
    if found["budgets"] != now:
        raise UsageError(
            f"'{path}' was saved under another budget", hint=_remedy(path, found["budgets"], now)
        )


def _positions(model: Any) -> str:
    """How the model turns its keys, as text."""
    rope = getattr(model.config, "rope_parameters", None)
    if varying(rope):
        own = model.config.max_position_embeddings
        rope = [chosen(rope, own), own]  # keys of earlier versions were turned by each text's
    return json.dumps(rope, sort_keys=True)


def _check_positions(path: Path, saved: str | None, model: Any) -> None:
    """Keys are kept as they were turned.

    Files of earlier versions say nothing of it: then stretched positions, which may be `--yarn`'s,
    and those that changed with a text's length may be others.
    """
    blocks = rope_blocks({"rope_parameters": getattr(model.config, "rope_parameters", None)})
    if saved is None and any(rope_type(block) in ("yarn", LONGROPE, DYNAMIC) for block in blocks):
        raise UsageError(
            f"'{path}' was saved by an earlier version of sparsek, which did not say how it turned "
            "the keys of this model",
            hint="read the text again",
        )
    if saved not in (None, _positions(model)):
        raise UsageError(
            f"'{path}' was saved with rotary positions stretched otherwise",
            hint="load the model with the same --yarn FACTOR, or without where there was none; "
            "else read the text again",
        )


def _remedy(path: Path, saved: Any, now: list[list[Any]]) -> str:
    """How a model gets the budget that a state was saved under.

    Args:
        saved: what the file says, which may be anything. now: as of `_budget`, by layer.
    """
    entries = saved if isinstance(saved, list) else []
    parts = [budget if isinstance(budget, list) else [] for budget in entries]
    if [budget[:4] for budget in parts] == [budget[:4] for budget in now]:
        stored = "int8" if len(parts[0]) > 4 else "auto"
        return f"load the model with cache_dtype {stored}: --cache-dtype {stored}"
    topk = parts[0][0] if parts and parts[0] else None
    if type(topk) is int and parts == [[topk, *budget[1:]] for budget in now]:
        _, window, sinks, *_ = now[0]
        return (
            f"in chat, /budget {sinks + topk + window} and then /load-state {path}; in Python, "
            f"set_budget(model, topk={topk})"
        )
    return "load the model as it was converted when the state was saved"


def _check_dtype(path: Path, dtype: str, model: Any) -> None:
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    saved, now = names.get(dtype, dtype), str(model.dtype).removeprefix("torch.")
    if dtype != "I8" and saved != now:
        raise UsageError(
            f"'{path}' was saved in {saved}, the model runs in {now}", hint=f"use --dtype {saved}"
        )


def _budget(layer: Any) -> list[Any]:
    budget = layer.budget
    topk = budget.topk if isinstance(budget.topk, int) else list(budget.topk)
    described = [topk, budget.window, budget.sinks, budget.gate]
    return described if budget.cache_dtype == "auto" else [*described, budget.cache_dtype]


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """A short hash of a model's kind and weights: 64 numbers of every tensor, rounded to bf16.

    Rounded, so that one checkpoint gives one fingerprint in float32 and bfloat16.
    """
    seen = hashlib.sha256(str(model.config.model_type).encode())
    for name, weight in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        flat = weight.detach().flatten()
        # In whole numbers: linspace's float32 goes beyond the end of more than 2^24.
        picks = torch.arange(64, device=flat.device) * max(flat.numel() - 1, 0) // 63
        sample = flat[picks] if flat.numel() else flat
        seen.update(f"{name}{tuple(weight.shape)}".encode())
        seen.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return seen.hexdigest()[:32]
