"""What a run reads, in short: an unfinished one goes on with the same text and the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli.checkpoint_files.samples import sample_of
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.data.corpus import Corpus
from sparsek_cli.errors import UsageError
from sparsek_cli.output.contents import RUN_INPUTS

# Beside the hashes: where the run computed, and in which format. A continuation may be elsewhere.
_DEVICE, _FORMAT = "device", "number format"
_TOKENS = 1 << 22  # of a text that are looked at; of a longer one they lie evenly apart


def computed(device: str, *, bf16: bool) -> dict[str, str]:
    """What stands beside the hashes; `device`: cpu or cuda."""
    return {_DEVICE: device, _FORMAT: _name(bf16)}


def as_it_began(
    part: Path, device: str, *, bf16: bool, auto: bool, say: Callable[[str], None]
) -> bool:
    """Whether the unfinished run in `part` goes on in bfloat16.

    Args:
        device: where it goes on. bf16: what its recipe's dtype means there.
        auto: that is another format on another device, and half a run in each would be neither.
        say: hears what is not as it was.
    """
    before = _read(part)
    where, how = before.get(_DEVICE), before.get(_FORMAT)
    kept = how if auto and how in (_name(True), _name(False)) else _name(bf16)
    if where not in (None, device):
        say(
            f"the run began on {where} and goes on on {device}, in {kept}: sums are taken in "
            "another order there, and random numbers are others"
        )
    elif kept != _name(bf16):
        say(f"the run goes on in {kept}, as it began")
    return kept == _name(True)


def _name(bf16: bool) -> str:
    return "bfloat16" if bf16 else "float32"


def inputs_of(
    model: Path | None, texts: Mapping[str, Corpus], held_out: Corpus | None
) -> dict[str, str]:
    """A hash of each thing that a run reads, by what it is called in messages.

    Args:
        model: folder of the weights that it starts from; None: random ones.
        texts, held_out: of `datasets.load_texts`.
    """
    found = {f"the text of data.{name}": _of_text(corpus) for name, corpus in texts.items()}
    if held_out is not None:
        found["the held-out text"] = _of_text(held_out)
    if model is not None:
        found["the model"] = _of_model(model)
    return found


def check_inputs(part: Path, now: Mapping[str, str]) -> None:
    """Checkpoints hold what is trained alone: on another base, or other text, it means nothing.

    Raises:
        UsageError: something is not what the unfinished run in `part` began with.
    """
    before = _read(part)
    for what, digest in now.items():
        if what not in (_DEVICE, _FORMAT) and before.get(what) not in (None, digest):
            raise UsageError(
                f"{what} has changed since the unfinished run began",
                hint=f"put {what} back as it was, or --overwrite to start over",
            )


def _read(part: Path) -> dict[str, Any]:
    """What was written; nothing, of an earlier version, which did not."""
    try:
        before = json.loads((part / RUN_INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return before if isinstance(before, dict) else {}


def _of_text(corpus: Corpus) -> str:
    step = max(1, len(corpus.tokens) // _TOKENS)
    parts = (corpus.starts, corpus.ends, corpus.tokens[::step])
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _of_model(folder: Path) -> str:
    """Of its config and of some bytes of every tensor."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in read_shards(folder):
        digest.update(f"{shard.path.name} {sample_of(shard.path)}".encode())
    return digest.hexdigest()
