"""The way back: a converted checkpoint, fine-tuned or not, as the plain dense model it is made of.

Weights are linked or streamed as bytes, config.json becomes the base's again, and what was written
is looked at as any program would: by the family's own class, and tensor by tensor.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsek_cli import byte_units, disk, hub
from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.file_hashes import check_as_written
from sparsek_cli.checkpoint_files.shards import (
    INDEX,
    SINGLE,
    Shard,
    read_shards,
    same_tensors,
    without_scorers,
    write_part,
)
from sparsek_cli.conversion.link_weights import link_or_copy
from sparsek_cli.converted import dense_config, is_converted
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families import Row, row_of
from sparsek_cli.model_folder.side_files import belonging_files
from sparsek_cli.output import leftovers
from sparsek_cli.output.contents import EXPORT_NOTE, MODEL
from sparsek_cli.output.place import absolute, check_folder
from sparsek_cli.output.staging import staged
from sparsek_cli.output.tokenizer_files import bring, copy_missing, holds_tokenizer
from sparsek_cli.output.tokenizer_files import files_in as tokenizer_files
from sparsek_cli.output.written_config import say_changes
from sparsek_cli.reporter import Reporter, Silent

_BUG = "please report this with the model's name; nothing was written"


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        source: the converted checkpoint. row: its family. config: the dense config.json.
        out: folder to appear. shards: the source's files, scorers left out.
        copy: whether whole files are copied even where they could be linked.
        overwrite: whether an earlier `out` is replaced.
    """

    source: hub.Checkpoint
    row: Row
    config: dict[str, Any]
    out: Path
    shards: list[Shard]
    copy: bool
    overwrite: bool

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are written or linked."""
        return sum(e.end - e.start for shard in self.shards for e in shard.tensors.values())

    def name_of(self, number: int) -> str:
        """The file name of one shard, counted from 1, as transformers names them."""
        if len(self.shards) == 1:
            return SINGLE
        return f"model-{number:05}-of-{len(self.shards):05}.safetensors"

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {
            "model": str(self.source.path),
            "out": str(self.out),
            "model_type": self.config["model_type"],
            "architectures": self.config["architectures"],
            "files": [self.name_of(n) for n in range(1, len(self.shards) + 1)],
            "tensors": sum(len(shard.tensors) for shard in self.shards),
            "bytes": self.bytes,
        }

    def text(self) -> str:
        """For a person."""
        size = byte_units.size(self.bytes)
        return (
            f"model       {self.source.path} ({self.row.sparsek_type})\n"
            f"out         {self.out} ({self.config['architectures'][0]})\n"
            f"weights     {len(self.shards)} file(s), {size}, without scorers"
        )


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        means: how the files of weights came along: reflink, hard link or copy.
        tokenizer: what was found about it, in words.
    """

    plan: Plan
    means: tuple[str, ...]
    tokenizer: str

    @property
    def out(self) -> str:
        """The folder that appeared."""
        return str(self.plan.out)

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {
            **self.plan.data(),
            "linked_by": sorted(set(self.means)),
            "tokenizer": self.tokenizer,
        }

    def text(self) -> str:
        """For a person."""
        return (
            f"{self.plan.text()}\n"
            f"written     by {' and '.join(sorted(set(self.means)))}; every tensor is the model's\n"
            f"tokenizer   {self.tokenizer}"
        )


def plan(
    model: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Checks the request; reads config.json and safetensors headers only.

    A config.json that was changed since the model was made is told.

    Args:
        model: folder or hub id of a converted model.
        out: the folder to write; default: `<name>-dense`.

    Raises:
        UsageError: the model is dense already, or OUT cannot be written.
        SparsekError: the checkpoint is damaged, or there is no room.
    """
    source = hub.resolve(model, revision)
    config = source.config()
    if not is_converted(config):
        raise UsageError(
            f"'{source.name}' is a plain dense model already: there is nothing to export",
            hint="name a folder that `sparsek convert` or `sparsek finetune` wrote",
        )
    row = row_of(config["model_type"])
    place = absolute(f"{source.name}-dense" if out is None else out)
    check_folder(place, MODEL, overwrite=overwrite, model=source.path)
    made = Plan(
        source=source,
        row=row,
        config={**dense_config(config), "architectures": [row.causal_lm]},
        out=place,
        shards=without_scorers(read_shards(source.path)),
        copy=copy,
        overwrite=overwrite,
    )
    _check_room(made)
    say_changes(source.path)  # OUT's config.json will say the same, and nothing what it was
    return made


def run(plan: Plan, reporter: Reporter | None = None) -> Exported:
    """Carries out a plan.

    Raises:
        SparsekError: disk full, or weights that are not what was written, the model's or OUT's;
            OUT is as before.
    """
    from sparsek_cli.loading import load_config

    reporter = reporter or Silent()
    load_config(plan.source.path, plan.source.name)  # else its tokenizer would be blamed
    for shard in plan.shards:
        check_as_written(shard.path)  # OUT says nothing of hashes: damage would pass for good
    leftovers.clear(plan.out, reporter.say)
    check_folder(plan.out, MODEL, overwrite=plan.overwrite, model=plan.source.path)
    with disk.os_errors(), staged(plan.out, overwrite=plan.overwrite) as folder:
        with reporter.progress("writing weights", plan.bytes) as bar:
            means = _write_weights(plan, folder, bar.advance)
        json_text.write(folder / "config.json", plan.config)
        json_text.write(folder / EXPORT_NOTE, _note(plan))
        (folder / "README.md").write_text(_card(plan), encoding="utf-8")
        tokenizer = _bring_side_files(plan, folder)
        reporter.say("verifying")
        _verify(plan, folder)
    return Exported(plan, tuple(means), tokenizer)


def _check_room(plan: Plan) -> None:
    device = disk.existing_parent(plan.out).stat().st_dev
    copied = sum(
        sum(e.end - e.start for e in shard.tensors.values())
        for shard in plan.shards
        if plan.copy or shard.part or shard.path.stat().st_dev != device
    )
    free = disk.free_bytes(plan.out)
    if free < copied:
        raise SparsekError(
            f"not enough space for {plan.out}: {byte_units.size(copied)} needed, "
            f"{byte_units.size(free)} free",
            hint="free some space, or choose OUT on the model's filesystem so that it is linked",
        )


def _write_weights(plan: Plan, folder: Path, advance: Any) -> list[str]:
    means, weight_map = [], {}
    for number, shard in enumerate(plan.shards, start=1):
        file = folder / plan.name_of(number)
        if shard.part:
            write_part(shard, file)
            means.append("copy")
        else:
            means.append(link_or_copy(shard.path, file, copy=plan.copy))
        if means[-1] == "copy":
            disk.readable(file)
        weight_map.update(dict.fromkeys(shard.tensors, file.name))
        advance(sum(e.end - e.start for e in shard.tensors.values()))
    if len(plan.shards) > 1:
        index = {"metadata": {"total_size": plan.bytes}, "weight_map": weight_map}
        json_text.write(folder / INDEX, index)
    return means


def _bring_side_files(plan: Plan, folder: Path) -> str:
    """Copies what belongs to the weights; what was found about the tokenizer, in words."""
    source = plan.source.path
    for file in belonging_files(source):
        shutil.copyfile(file.resolve(), folder / file.name)
    copy_missing(tokenizer_files(source), source, folder)
    if not holds_tokenizer(source):
        return "none beside the weights"
    from sparsek_cli.loading import load_tokenizer

    tokenizer = load_tokenizer(plan.source)
    if not bring(tokenizer, folder):
        raise SparsekError(
            f"the tokenizer of {plan.source.name} would give other ids after exporting",
            hint="load it with transformers, save it with save_pretrained into the model's "
            "folder, and export that",
        )
    return f"{type(tokenizer).__name__}, as of the model"


def _verify(plan: Plan, folder: Path) -> None:
    """The family's own class finds every weight, and each has the source's bytes."""
    import torch

    from sparsek_cli.loading import load_weights

    for number, shard in enumerate(plan.shards, start=1):
        file = folder / plan.name_of(number)
        # Another name of the same bytes needs no reading.
        if not (file.samefile(shard.path) or same_tensors(shard, file)):
            raise SparsekError(f"verification failed: {file.name} differs", hint=_BUG)
    load_weights(folder, plan.source.name, dtype=torch.float32, device="meta")


def _note(plan: Plan) -> dict[str, Any]:
    from sparsek_cli import __version__

    source = plan.source
    where = str(source.path) if source.source == "folder" else source.source
    return {"sparsek": __version__, "exported_from": where}


def _card(plan: Plan) -> str:
    name = plan.source.name
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {plan.out.name}

The dense weights of {name}, as `sparsek export` took them out of a model with SparseK attention:
a plain {plan.config["architectures"][0]}. Nothing of SparseK is left in it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{plan.out.name}")
tokenizer = AutoTokenizer.from_pretrained("{plan.out.name}")
```

The base model's licence applies to the weights.
"""
