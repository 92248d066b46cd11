"""The plan of a conversion: everything decided and checked before anything is written.

Reads config.json and safetensors headers only.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsek_cli import hub, quantised
from sparsek_cli.checkpoint_files.shards import Shard, read_shards, stored_dtype, without_scorers
from sparsek_cli.conversion.base_config import convertible
from sparsek_cli.conversion.calibrate.method import Method, method_of, with_documents
from sparsek_cli.conversion.checks import check_room, check_tensors
from sparsek_cli.conversion.default_sizes import (
    calibration_size,
    slots,
    with_settings_of,
)
from sparsek_cli.conversion.from_gguf.checkpoint import GgufCheckpoint
from sparsek_cli.conversion.from_gguf.checkpoint import find as find_gguf
from sparsek_cli.conversion.geometry import geometry
from sparsek_cli.conversion.planned import Calibration, Plan, contents_of
from sparsek_cli.converted import dense_config, is_converted
from sparsek_cli.data.text.find_files import find_files, is_hub_id
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.disk import existing_parent
from sparsek_cli.errors import UsageError
from sparsek_cli.families import Row
from sparsek_cli.families.layers import (
    full_layers,
    given_window,
    idle_window_off,
    layer_types,
    no_width,
)
from sparsek_cli.families.own_config import own_config
from sparsek_cli.hub import Checkpoint
from sparsek_cli.loading import check_tokenizer, load_tokenizer
from sparsek_cli.model_folder.side_files import belonging_files
from sparsek_cli.output.place import absolute, check_folder
from sparsek_cli.recipes.schema_convert import ConvertRecipe


def _check_words(recipe: ConvertRecipe) -> None:
    """Calibration alone uses them, minutes later; without one no word would be too odd.

    What is left to us needs no look: torch, which looks, takes seconds to import.

    Raises:
        UsageError: a device that is not there, or a dtype that there is none of.
    """
    if {recipe.device, recipe.dtype} - {None, "auto"}:
        choose_dtype(recipe.dtype, choose_device(recipe.device))


def _check_calibration(recipe: ConvertRecipe) -> None:
    """How to calibrate is not said where there is no calibration.

    `recall` may be: records write it down, also where it was not chosen.

    Raises:
        UsageError: it is.
    """
    for key in ConvertRecipe.gives_way if recipe.calibrate == "none" else ():
        value = getattr(recipe, key)
        if value is not None:
            raise UsageError(
                f"{key} {value} would count for nothing: calibrate is none",
                hint=f"leave one of the two out ({key}=null drops a recipe's)",
            )


def plan(recipe: ConvertRecipe, method: Method | None = None) -> Plan:
    """Checks the request and its base checkpoint, and fills in what was left open.

    Args:
        recipe: the request.
        method: how scorers are found; None: as ablations settled it.

    Raises:
        UsageError: the request cannot be carried out (family, sizes, OUT).
        SparsekError: the checkpoint is damaged, or there is no room for it.
    """
    if recipe.model is None:
        raise UsageError(
            "MODEL is missing", hint="name one, e.g. `sparsek convert tiny`; --list-models shows"
        )
    _check_words(recipe)
    _check_calibration(recipe)
    base = find_gguf(recipe.model, recipe.revision) or hub.resolve(recipe.model, recipe.revision)
    config = base.config()
    again = recipe.again and is_converted(config)
    repeatable = method is None
    if again:
        method = method or method_of(config["sparsek"])
        recipe = with_settings_of(recipe, config["sparsek"])
        config = dense_config(config)
    row = convertible(config)
    sizes = geometry(config, row)
    types = layer_types(row, {**config, **idle_window_off(row, config, sizes.context)})
    converted = full_layers(types, sizes.shared)
    if not converted:
        raise UsageError(
            "no layer of the model attends to everything: there is nothing to convert",
            hint="its cache is bounded already",
        )
    topk, window = slots(
        sizes.context,
        budget=recipe.budget, topk=recipe.topk, window=recipe.window, sinks=recipe.sinks,
    )  # fmt: skip
    out = out_folder(recipe, base)
    check_folder(out, contents_of(recipe.scorers_only), overwrite=recipe.overwrite, model=base.path)
    packed = isinstance(base, GgufCheckpoint)
    if recipe.scorers_only:
        _check_scorers_only(recipe, packed=packed)
    shards = base.outline() if packed else read_shards(base.path)
    if again:
        shards = without_scorers(shards)
    if not (config.get("dtype") or config.get("torch_dtype")):
        sizes = replace(sizes, dtype=stored_dtype(shards))
    quantised_by = config if quantised.described(config) else None
    prefixed = check_tensors(shards, row, converted, sizes, packed=quantised_by)
    linkable = _linkable(recipe, shards, out, packed=packed)
    if not linkable:
        check_room(existing_parent(out), sum(shard.bytes for shard in shards), packed=packed)
    tokens, length = 0, 0
    if recipe.calibrate != "none":
        check_text(recipe.calibrate)
        tokens, length = calibration_size(
            sizes,
            topk + window + recipe.sinks,
            tokens=recipe.calibrate_tokens,
            length=recipe.calibrate_length,
        )
    selected = topk * sizes.kv_heads * len(converted)
    return Plan(
        base=base,
        config=config,
        out=out,
        row=row,
        geometry=sizes,
        types=tuple(types),
        sliding_window=_sliding_window(row, config, types),
        prefixed=prefixed,
        shards=shards,
        side_files=belonging_files(base.path),
        tokenizer=_tokenizer(recipe, base, config),
        topk=topk,
        window=window,
        sinks=recipe.sinks,
        linkable=linkable,
        calibrate_tokens=tokens,
        calibrate_length=length,
        calibration=Calibration(
            text=recipe.calibrate,
            method=with_documents(method or Method(), selected, length),
            recall=recipe.recall,
            per_head=recipe.budgets == "per_head",
            stand_ins=recipe.stand_ins,
            device=recipe.device,
            dtype=recipe.dtype,
        ),
        gate=recipe.gate,
        cache_dtype=recipe.cache_dtype,
        copy_base=recipe.copy_base,
        scorers_only=recipe.scorers_only,
        overwrite=recipe.overwrite,
        seed=recipe.seed,
        request=recipe.model_dump(by_alias=True),
        repeatable=repeatable,
    )


def check_text(spec: str) -> None:
    """Refuses text to calibrate on that is not there.

    Raises:
        UsageError: no such file or folder, or nothing readable in it.
    """
    if spec != "auto" and not is_hub_id(spec):
        find_files(spec)


def out_folder(recipe: ConvertRecipe, base: Checkpoint) -> Path:
    """The folder to write: the request's, else named after the base."""
    if recipe.out is not None:
        return absolute(recipe.out)
    return absolute(f"{base.name}-{'scorers' if recipe.scorers_only else 'sparsek'}")


def _linkable(recipe: ConvertRecipe, shards: list[Shard], out: Path, *, packed: bool) -> bool:
    """Whether OUT can have the base's files without a copy: whole ones of its own file system.

    Scorers alone need them only as long as they are checked: any kind of link will do.
    """
    if recipe.scorers_only or packed or recipe.copy_base:
        return recipe.scorers_only
    device = existing_parent(out).stat().st_dev
    return all(shard.path.stat().st_dev == device and not shard.part for shard in shards)


def _tokenizer(recipe: ConvertRecipe, base: Checkpoint, config: dict[str, Any]) -> Checkpoint:
    """Where the tokenizer comes from; one that was named is looked at now."""
    if recipe.tokenizer is None:
        return base
    found = hub.tokenizer_of(recipe.tokenizer)
    check_tokenizer(load_tokenizer(found), config["vocab_size"], found.name)
    return found


def _check_scorers_only(recipe: ConvertRecipe, *, packed: bool) -> None:
    if packed:
        raise UsageError(
            "scorers_only: a GGUF file is no base that scorers can be put onto later",
            hint="convert it whole; `sparsek export OUT DENSE` then gives the base for its scorers",
        )
    if recipe.copy_base:
        raise UsageError(
            "scorers_only and copy are both given", hint="scorers alone hold nothing of the base"
        )


def _sliding_window(row: Row, config: dict[str, Any], types: list[str]) -> int:
    if "sliding_attention" not in types:
        return 0
    window = config.get("sliding_window")
    if window is None:
        window = own_config(row, config).sliding_window
    if given_window(window, "sliding_window") is None:
        raise no_width(window, mixed=row.mixed)
    return window
