"""A GGUF file becomes a checkpoint folder, for as long as a conversion needs one."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli import disk
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.conversion.from_gguf.checkpoint import GgufCheckpoint
from sparsek_cli.errors import SparsekError, first_line
from sparsek_cli.hub import Checkpoint
from sparsek_cli.output.leftovers import held, make_beside
from sparsek_cli.output.tokenizer_files import bring
from sparsek_cli.reporter import Reporter
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    from sparsek_cli.conversion.planned import Plan

_SHARD = "4GB"


@contextmanager
def unpacked(plan: "Plan", reporter: Reporter) -> Iterator["Plan"]:
    """The plan with a folder as its base: unchanged, or a GGUF file's tensors unpacked beside OUT.

    Files written there are linked into OUT like those of any base; the folder goes when the block
    ends, what is linked stays.

    Args:
        plan: what to convert; OUT's parent must exist.
        reporter: hears of it, since it takes a while.

    Raises:
        SparsekError: the disk is full, or the file does not hold the model that it names.
    """
    base = plan.base
    if not isinstance(base, GgufCheckpoint):
        yield plan
        return
    header = base.header
    reporter.say(f"unpacking {base.path.name} to {plan.base_bytes:,} bytes of {header.dtype}")
    folder = make_beside(plan.out)
    try:
        with held(folder):
            _unpack(base, folder, with_tokenizer=plan.own_tokenizer)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found = Checkpoint(folder, base.name, base.source)
            # What is unpacked here is nobody else's: it is linked even where copies are asked for.
            yield replace(
                plan,
                base=found,
                tokenizer=found if plan.own_tokenizer else plan.tokenizer,
                config=config,
                shards=read_shards(folder),
                side_files=[folder / "generation_config.json"],
                linkable=True,
                copy_base=False,
                request=plan.request | {"copy": False, "model": str(base.path)},
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(base: GgufCheckpoint, folder: Path, *, with_tokenizer: bool) -> None:
    """Writes config.json, weights, generation_config.json and, if wanted, the tokenizer."""
    # Seen from a folder of its own: transformers would read what lies beside the file, too.
    alone = folder / "alone.gguf"
    alone.symlink_to(base.path)
    place = {"pretrained_model_name_or_path": folder, "gguf_file": alone.name}
    with quiet_transformers():
        tokenizer = _tokenizer(base, place) if with_tokenizer else None
        model = _load(base, place)
    alone.unlink()
    model.config.architectures = base.config()["architectures"]
    model.generation_config.eos_token_id = list(base.header.stops) or None
    try:
        with disk.os_errors(), quiet_transformers():
            model.save_pretrained(folder, max_shard_size=_SHARD)
    except OSError as error:
        if not disk.is_full(error):
            raise
        raise SparsekError(
            f"the disk is full while unpacking {base.path.name}",
            hint="free some space, or choose OUT on another disk",
        ) from error
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    if not bring(tokenizer, folder):
        raise SparsekError(
            f"the tokenizer in {base.path.name} gives other ids once it is saved",
            hint=_another_tokenizer(),
        )


def _tokenizer(base: GgufCheckpoint, place: dict[str, Any]) -> Any:
    """The tokenizer in the file."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # the tokenizers library raises plain ones
        raise SparsekError(
            f"the tokenizer in {base.path.name} cannot be read: {first_line(error)}",
            hint=_another_tokenizer(),
        ) from error


def _another_tokenizer() -> str:
    return (
        "name the folder or hub id of the model that the file was made from with --tokenizer; or "
        f"upgrade what read this one: {_readers('tokenizers')}"
    )


def _another() -> str:
    return (
        "name the checkpoint that it was made from, or upgrade what read the file: "
        f"{_readers('gguf')}"
    )


def _readers(package: str) -> str:
    """The versions of transformers and of what it reads with."""
    return " and ".join(f"{name} {version(name)}" for name in ("transformers", package))


def _load(base: GgufCheckpoint, place: dict[str, Any]) -> Any:
    """The dense model; every value of the file is one of its weights, and the other way round."""
    import torch
    from transformers import AutoModelForCausalLM

    header, options = base.header, {}
    try:  # since 5.20 blocks stay packed unless told otherwise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **place,
            config=base.transformers_config,
            dtype=getattr(torch, header.dtype),
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        raise SparsekError(
            f"transformers cannot load {header.path.name}: {first_line(error)}", hint=_another()
        ) from error
    absent = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if absent:
        raise SparsekError(
            f"{header.path.name} does not hold {absent[0]} of a '{header.architecture}' model "
            f"({len(absent)} weights are missing)",
            hint=_another(),
        )
    held_values = sum(p.numel() for p in model.parameters())
    if held_values != header.values:
        raise SparsekError(
            f"{header.path.name} holds {header.values:,} values, of which transformers reads "
            f"{held_values:,}: its '{header.architecture}' model has no place for the others",
            hint=_another(),
        )
    return model
