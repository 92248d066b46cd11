"""The scorers of a converted model, taken out: a file or a small folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli import disk, hub
from sparsek_cli.checkpoint_files.file_hashes import check_as_written
from sparsek_cli.checkpoint_files.seal import check_seal
from sparsek_cli.checkpoint_files.shards import read_shards, without_scorers
from sparsek_cli.converted import dense_config, is_converted
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families import Row, row_of
from sparsek_cli.families.by_layer import shared_layers
from sparsek_cli.families.layers import full_layers, layer_types
from sparsek_cli.families.own_config import own_config
from sparsek_cli.loading import check_whole
from sparsek_cli.output import leftovers, scorers_file
from sparsek_cli.output.contents import SCORERS, SCORERS_ALONE
from sparsek_cli.output.place import absolute, check_file, check_folder, check_not_inside
from sparsek_cli.output.staging import staged
from sparsek_cli.output.written_config import say_changes
from sparsek_cli.plain_files import utf8_text
from sparsek_cli.reporter import Reporter, Silent
from sparsek_cli.scorers_alone.base_identity import comparable, weights_digest
from sparsek_cli.scorers_alone.portable_recipe import portable


@dataclass(frozen=True)
class Plan:
    """What will be taken out of which model.

    Attributes:
        source: the converted checkpoint. row: its family. config: its config.json.
        out: file (ends in .safetensors) or folder to appear.
        names: by name in the new file, the source's file and tensor.
        bytes: of the scorers. base_bytes: of the weights that are read for the hash.
    """

    source: hub.Checkpoint
    row: Row
    config: dict[str, Any]
    out: Path
    names: dict[str, tuple[Path, str]]
    bytes: int
    base_bytes: int
    overwrite: bool

    @property
    def single(self) -> bool:
        """Whether one file is written, not a folder."""
        return self.out.suffix.lower() == ".safetensors"

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {
            "model": str(self.source.path),
            "out": str(self.out),
            "model_type": self.row.model_type,
            "sparsek": self.config["sparsek"],
            "tensors": len(self.names),
            "bytes": self.bytes,
        }

    def text(self) -> str:
        """For a person."""
        what = "file" if self.single else "folder"
        return (
            f"model       {self.source.path} ({self.row.sparsek_type})\n"
            f"out         {self.out} (a {what} of scorers alone)\n"
            f"scorers     {len(self.names)} tensors, {self.bytes:,} bytes"
        )


@dataclass(frozen=True)
class Taken:
    """What was written: the plan, and the hash of the base's weights."""

    plan: Plan
    weights: str

    @property
    def out(self) -> str:
        """The file or folder that appeared."""
        return str(self.plan.out)

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {**self.plan.data(), "base_weights": self.weights}

    def text(self) -> str:
        """For a person."""
        return f"{self.plan.text()}\nbase        weights {self.weights[:16]}"


def plan(
    model: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> Plan:
    """Checks the request; reads config.json and headers only.

    A config.json that was changed since the model was made is told.

    Raises:
        UsageError: no converted model, no scorers that are worth keeping, settings out of range,
            or OUT stands.
        SparsekError: weights are missing, left over or of another shape.
    """
    source = hub.resolve(model, revision)
    if not is_converted(source.config()):
        raise UsageError(
            f"'{source.name}' is a dense model: it has no scorers",
            hint="`sparsek convert MODEL OUT --scorers-only` makes some for it",
        )
    place = absolute(f"{source.name}-scorers" if out is None else out)
    if place.suffix.lower() == ".safetensors":
        check_not_inside(place, source.path)
        check_file(place, overwrite=overwrite, suffixes=(".safetensors",))
        if place.exists() and scorers_file.header(place) is None:
            raise UsageError(
                f"'{place}' is not a file of scorers and is not replaced",
                hint="name a file that does not exist yet",
            )
    else:
        check_folder(place, SCORERS_ALONE, overwrite=overwrite, model=source.path)
    check_whole(source.path, source.name)  # they fit its weights, and are of its settings
    say_changes(source.path)  # they are marked as those of a base with this config
    return _plan(source, place, overwrite=overwrite)


def _plan(source: hub.Checkpoint, place: Path, *, overwrite: bool) -> Plan:
    config = source.config()
    row = row_of(config["model_type"])
    if config["sparsek"]["scorer"]["type"] == "random":
        raise UsageError(
            f"'{source.name}' keeps random tokens: it has no scorers to take along",
            hint="name a model that was converted or trained with scorers",
        )
    shards = read_shards(source.path)
    held = {name: (shard.path, e) for shard in shards for name, e in shard.tensors.items()}
    names, size = {}, 0
    dense = dense_config(config)
    shared = shared_layers(own_config(row, dense)) if row.by_layer else 0
    for layer in full_layers(layer_types(row, dense), shared):
        path = f"{row.attention_path(layer)}.scorer."
        for start in (path, path.removeprefix(f"{row.stored}.")):
            for name in (name for name in held if name.startswith(start)):
                file, entry = held[name]
                names[f"layers.{layer}.{name.removeprefix(start)}"] = (file, name)
                size += entry.end - entry.start
    scorers = [name for name in held if ".scorer." in name]
    if len(scorers) != len(names) or not names:
        raise SparsekError(
            f"'{source.name}' does not hold the scorers that its config.json promises",
            hint="convert or fetch it again",
        )
    others = sum(shard.bytes for shard in shards) - size
    return Plan(source, row, config, place, names, size, others, overwrite)


def run(plan: Plan, reporter: Reporter | None = None) -> Taken:
    """Carries out a plan.

    Raises:
        SparsekError: disk full, no permission, scorers that are no numbers, or a base that is not
            what was written; OUT is as before.
    """
    reporter = reporter or Silent()
    for shard in without_scorers(read_shards(plan.source.path)):
        check_as_written(shard.path)  # else they would be marked as those of other weights
    with reporter.progress("reading the base's weights", plan.base_bytes) as bar:
        digest = weights_digest(plan.source.path, plan.row, bar.advance)
    if plan.single:
        _write(plan, plan.out, digest, overwrite=plan.overwrite)
    else:
        leftovers.clear(plan.out, reporter.say)
        check_folder(plan.out, SCORERS_ALONE, overwrite=plan.overwrite, model=plan.source.path)
        with staged(plan.out, overwrite=plan.overwrite, contents=SCORERS_ALONE) as folder:
            fill(plan, folder, digest)
    return Taken(plan, digest)


def keep_scorers(source: hub.Checkpoint, name: str, folder: Path, reporter: Reporter) -> None:
    """Fills an empty `folder` with the scorers of a checkpoint that was just converted.

    Args:
        source: the whole model. name: what its base is called.
    """
    made = _plan(source, folder, overwrite=False)
    with reporter.progress("hashing the base's weights", made.base_bytes) as bar:
        digest = weights_digest(source.path, made.row, bar.advance)
    fill(made, folder, digest, base=name)


def fill(plan: Plan, folder: Path, digest: str, base: str = "") -> None:
    """Writes the scorers, and the texts that came with them, into an empty folder."""
    _write(plan, folder / SCORERS, digest, base)
    found = scorers_file.header(folder / SCORERS)
    for name, text in found.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_card(found), encoding="utf-8")


def _write(plan: Plan, file: Path, digest: str, base: str = "", *, overwrite: bool = True) -> None:
    beside = plan.source.path
    texts = {name: _text(beside / name) for name in scorers_file.TEXTS if (beside / name).is_file()}
    mark = {
        "name": base or _base_name(texts) or plan.source.name,
        "model_type": plan.row.model_type,
        "config": comparable(plan.row, dense_config(plan.config)),
        "weights": digest,
    }
    block = plan.config["sparsek"]
    scorers_file.write(file, _tensors(plan), block, mark, texts, overwrite=overwrite)


def _text(file: Path) -> str:
    return portable(file) if file.suffix == ".yaml" else utf8_text(file)


def _tensors(plan: Plan) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    found = {}
    for file in {file for file, _ in plan.names.values()}:
        check_seal(file)
    for wanted, (file, name) in plan.names.items():
        with disk.os_errors(), safe_open(file, "np") as opened:
            found[wanted] = opened.get_tensor(name)
    scorers_file.check_finite(found, str(plan.source.path))
    return found


def _base_name(texts: dict[str, str]) -> str:
    """The base that the recipe of a conversion names."""
    import yaml

    recipe = texts.get("sparsek.yaml")
    model = (yaml.safe_load(recipe) or {}).get("model") if recipe else None
    if not isinstance(model, str):
        return ""
    return model


def _card(scorers: scorers_file.Scorers) -> str:
    name, block = scorers.base["name"], scorers.block
    base = f"base_model: {name}\nbase_model_relation: adapter\n" if "/" in name else ""
    return f"""---
{base}library_name: sparsek
pipeline_tag: text-generation
tags:
- sparsek
- sparse-attention
---

# Scorers for {name}

With them, {name} attends by SparseK (arXiv 2406.16747): each KV head keeps {block["sinks"]} first
tokens, the newest {block["window"]}, and those that a learned score ranks highest. They fit the
weights they were made for, which are checked by hash, and no others.

```
sparsek merge {name} SCORERS OUT
```

or, without writing anything:

```python
import sparsek_cli as sparsek

model, tokenizer = sparsek.load("{name}", scorers="SCORERS")
```

where SCORERS is this folder, its `sparsek.safetensors`, or its name on the hub.
"""
