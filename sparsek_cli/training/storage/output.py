"""The finished model folder: weights, tokenizer, card and the resolved recipe, in one rename."""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from sparsek_cli import byte_units, disk
from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.seal import seal
from sparsek_cli.conversion.link_weights import link_or_copy
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families import row_of
from sparsek_cli.output import written_config
from sparsek_cli.output.contents import ADAPTERS, FINETUNE_RECIPE, MODEL, SCORERS, Contents
from sparsek_cli.output.staging import staged
from sparsek_cli.output.tokenizer_files import bring
from sparsek_cli.training.model import cast_for_saving
from sparsek_cli.training.parameters import is_scorer
from sparsek_cli.training.run_sizes import counted_steps
from sparsek_cli.training.storage.adapters import save_adapters
from sparsek_cli.training.storage.checkpoints import checkpoints_in
from sparsek_cli.training.storage.resume import part_folder
from sparsek_cli.training.storage.whole_weights import write_weights

if TYPE_CHECKING:
    from sparsek_cli.hub import Checkpoint
    from sparsek_cli.reporter import Reporter
    from sparsek_cli.training.assemble import Learner
    from sparsek_cli.training.plan import Plan
    from sparsek_cli.training.run_sizes import Sizes
    from sparsek_cli.training.settings import Start

# How long a finished run waits for room on a full disk, and how often it looks, in seconds. Other
# processes of the run wait too, and give up after ten minutes.
PATIENCE = 300.0
_PAUSE = 5.0


def check_scorers_apart(source: "Checkpoint") -> None:
    """Quantised weights are linked into OUT, never written again: scorers need a file of their own.

    Raises:
        UsageError: they have none.
    """
    if not (source.path / SCORERS).is_file():
        raise UsageError(
            f"'{source.name}' is quantised, and its scorers are not in a file of their own",
            hint="convert its base again, or take them out and merge them: `sparsek export "
            f"{source.path} SCORERS --scorers`, `sparsek merge BASE SCORERS OUT`",
        )


def check_room(
    sizes: "Sizes", base: Path | None, dtype: torch.dtype, *, adapters: bool, checkpoints: int
) -> None:
    """Raises SparsekError where the disk cannot hold what the run will write: better now than then.

    Args:
        base: the folder of the model that is trained; None: random weights are.
        dtype: of the weights on disk. adapters: they alone are written.
        checkpoints: how many are kept; 0: none is written.
    """
    output = Path(sizes.out)
    weights = 4 * sizes.trained
    # A checkpoint holds weights and both moments, and is whole before an older one goes.
    saves = min(checkpoints + 1, sizes.steps) if checkpoints else 0
    whole = dtype.itemsize * (sizes.trained + sizes.frozen)
    model = weights if adapters else whole
    if sizes.train == "scorers":
        model = weights + _copied(base, output)
    needed = model + 3 * weights * saves
    free = disk.free_bytes(output) + disk.size(part_folder(output))
    if free < needed:
        size, room = byte_units.size(needed), byte_units.size(free)
        raise SparsekError(
            f"the run will write {size}, and {room} are free in {disk.existing_parent(output)}",
            hint="free some space, choose another OUT"
            + (", or set save_steps=0 (no checkpoints)" if saves else ""),
        )


def _copied(base: Path | None, output: Path) -> int:
    """Bytes of a base's weights that are no links in OUT: those of another file system."""
    if base is None:
        return 0
    device = disk.existing_parent(output).stat().st_dev
    files = [p.stat() for p in base.glob("*.safetensors") if p.name != SCORERS and p.is_file()]
    return sum(file.st_size for file in files if file.st_dev != device)


def write_model(
    plan: "Plan",
    learner: "Learner",
    sizes: "Sizes",
    result: Any,
    *,
    state: dict[str, torch.Tensor] | None,
    reporter: "Reporter",
) -> None:
    """Writes `plan.out`.

    With `train: scorers` the base's shards are linked, not written again. A full disk is not the
    end of a finished run: for `PATIENCE` seconds it is tried again.

    Args:
        learner: what was trained; with a tuner, its adapters are all that is written.
        state: the full state dict where the model is sharded, else None.

    Raises:
        SparsekError: disk full or no permission; nothing is left behind.
    """
    output, start, base = plan.out, plan.settings.start, plan.source
    model, tuner = learner.model, learner.tuner

    def write(folder: Path) -> None:
        if tuner is not None:
            save_adapters(model, tuner, folder, base=base, scorers=start.lora.scorers, state=state)
        elif start.train == "scorers" and (base.path / SCORERS).is_file():
            _link_base(model, base.path, folder, state)
        else:
            write_weights(model, folder, cast_for_saving(model, learner.dtype, state))
        if not bring(plan.tokenizer, folder):
            reporter.say(
                "the tokenizer in OUT is not the one of training: transformers saves it otherwise"
            )
        head = "# What made this model; `sparsek finetune --recipe finetune.yaml` repeats it.\n"
        kept = {key: value for key, value in plan.request.items() if key != "overwrite"}
        settings = yaml.safe_dump(kept, sort_keys=False)
        (folder / FINETUNE_RECIPE).write_text(head + settings, encoding="utf-8")
        (folder / "README.md").write_text(_card(start, sizes, result), encoding="utf-8")

    until = time.monotonic() + PATIENCE
    while True:
        try:
            with (
                disk.os_errors(),
                staged(
                    output, overwrite=plan.settings.overwrite, contents=start.contents
                ) as folder,
            ):
                write(folder)
            break
        except OSError as error:
            left = until - time.monotonic()
            if not disk.is_full(error) or left <= 0:
                raise _write_error(error, output) from error
            reporter.say(
                f"the disk is full while writing {output}: free some space, it is tried again "
                f"for {left:.0f} s"
            )
            time.sleep(min(_PAUSE, left))


def _write_error(error: OSError, output: Path) -> SparsekError:
    after = (
        "; --resume finishes from the last checkpoint"
        if checkpoints_in(part_folder(output))
        else "; with save_steps a run keeps checkpoints to resume from"
    )
    return SparsekError(
        f"cannot write {output}: {error.strerror or error}",
        hint="check free space and permissions" + after,
    )


def _link_base(
    model: Any, source: Path, folder: Path, state: dict[str, torch.Tensor] | None
) -> None:
    from safetensors.torch import save_file

    own = (SCORERS, "README.md", FINETUNE_RECIPE)
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors" and file.name != SCORERS:
            link_or_copy(file, folder / file.name)
        elif file.is_file() and MODEL.knows(file.name) and file.name not in own:
            shutil.copyfile(file, folder / file.name)
    named = dict(model.named_parameters()) if state is None else state
    stored = _stored_names(source / SCORERS, model)
    tensors = {
        stored.get(key, key): value.detach().float().cpu().contiguous()
        for key, value in named.items()
        if is_scorer(key)
    }
    save_file(tensors, folder / SCORERS, metadata={"format": "pt"})
    seal(folder / SCORERS)
    disk.readable(folder / SCORERS)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["sparsek"] = model.config.sparsek
    json_text.write(folder / "config.json", config)
    written_config.record(folder, config)


def _stored_names(file: Path, model: Any) -> dict[str, str]:
    """By the model's names of its scorers, those in its file: some files name the base otherwise.

    The index beside the file names them too.
    """
    from safetensors import safe_open

    row = row_of(model.config)
    with safe_open(file, "np") as opened:
        names = list(opened.keys())
    inner = [name.removeprefix(f"{row.stored}.") for name in names]
    return {f"{row.base}.{name}": stored for name, stored in zip(inner, names, strict=True)}


def _card(start: "Start", sizes: "Sizes", result: Any) -> str:
    losses = ""
    if result.held_out_loss is not None:
        before = f" (before: {result.start_loss:.4f})" if result.start_loss is not None else ""
        losses = f"Held-out loss per token: {result.held_out_loss:.4f} nats{before}.\n"
    tokens = result.steps * sizes.tokens_per_step
    what = {
        "scorers": "only the scoring network was trained, the base is unchanged",
        "lora": "trained with LoRA adapters"
        + (", merged into the weights" if start.lora.merge else ", which these are"),
        "all": "all weights were trained",
    }[start.train]
    return f"""---
library_name: {"transformers" if start.contents is MODEL else "peft"}
pipeline_tag: text-generation
tags:
- sparsek
---

# {Path(result.out).name}

Made from {sizes.model} with `sparsek finetune`: {what}.
{counted_steps(result.steps)}, {tokens:,} tokens of {sizes.batch.length:,} per sequence.
{losses}
To repeat it: `sparsek finetune --recipe {FINETUNE_RECIPE}` (the recipe beside this card).

{_use(start.contents, Path(result.out).name)}"""


def _use(contents: Contents, name: str) -> str:
    """The lines of Python that load the model."""
    if contents is ADAPTERS:
        return f"""```python
import sparsek_cli.models
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
    return f"""```python
import sparsek_cli.models
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
