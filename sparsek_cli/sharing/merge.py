"""Scorers onto their base: a converted checkpoint on disk, or a model in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsek_cli import hub
from sparsek_cli.conversion.base_config import convertible
from sparsek_cli.conversion.calibrate.method import Method
from sparsek_cli.conversion.card import model_card
from sparsek_cli.conversion.default_sizes import with_settings_of
from sparsek_cli.conversion.geometry import Geometry, geometry
from sparsek_cli.conversion.plan import plan as plan_conversion
from sparsek_cli.conversion.planned import Plan as Conversion
from sparsek_cli.conversion.run import Converted, write_verified
from sparsek_cli.conversion.verify import check_base
from sparsek_cli.conversion.write import Scorer, converted_config
from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families import Row
from sparsek_cli.families.layers import full_layers, idle_window_off, layer_types
from sparsek_cli.output import leftovers
from sparsek_cli.output.contents import MODEL
from sparsek_cli.output.place import check_folder
from sparsek_cli.output.scorers_file import Scorers
from sparsek_cli.output.staging import staged
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.reporter import Reporter, Silent
from sparsek_cli.scorers_alone.base_identity import check_config, check_weights, weights_digest
from sparsek_cli.scorers_alone.find import read

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DAMAGED = "fetch or export the scorers again"


@dataclass(frozen=True)
class Plan:
    """What will be put together: a conversion whose scorers exist already."""

    conversion: Conversion
    scorers: Scorers

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {**self.conversion.data(), **_about(self.scorers)}

    def text(self) -> str:
        """For a person."""
        lines = self.conversion.text().splitlines()
        lines = [line for line in lines if not line.startswith("calibration")]
        return "\n".join([*lines, f"scorers     {self.scorers.file}"])


@dataclass(frozen=True)
class Merged:
    """What was written."""

    plan: Plan
    converted: Converted

    @property
    def out(self) -> str:
        """The folder that appeared."""
        return self.converted.out

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {**self.converted.data(), **_about(self.plan.scorers)}

    def text(self) -> str:
        """For a person."""
        done = self.converted
        return (
            f"{self.plan.text()}\nverified    {done.verified.text()}\ntokenizer   {done.tokenizer}"
        )


def plan(
    base: str,
    scorers: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Checks the request, and the base's config against the scorers'; no weights are read.

    Args:
        base: folder, short name or hub id of the dense model. revision: of a hub id.
        scorers: file, folder or hub id.

    Raises:
        UsageError: no scorers, another base, or OUT cannot be written.
        SparsekError: the scorers' settings are none.
    """
    found = read(scorers)
    checkpoint, row = _resolved(base, revision, found)
    config = checkpoint.config()
    check_config(found.base, row, config, checkpoint.name)
    block = _settings(found, row, config)
    recipe = ConvertRecipe(
        model=base,
        out=None if out is None else str(out),
        revision=revision,
        cache_dtype=block.get("cache_dtype", "auto"),
        calibrate="none",
        copy=copy,
        overwrite=overwrite,
    )
    recipe = with_settings_of(recipe, block)
    scorer = block["scorer"]
    method = Method(scorer=scorer["type"], width=scorer.get("width", 1))
    return Plan(plan_conversion(recipe, method), found)


def run(plan: Plan, reporter: Reporter | None = None) -> Merged:
    """Carries out a plan.

    Raises:
        UsageError: the base's weights are not those that the scorers were made for.
        SparsekError: the scorers are damaged, disk full or no permission; OUT is as before.
    """
    reporter, conversion = reporter or Silent(), plan.conversion
    leftovers.clear(conversion.out, reporter.say)
    overwrite, base = conversion.overwrite, conversion.base
    check_folder(conversion.out, MODEL, overwrite=overwrite, model=base.path)
    _check_weights(plan.scorers, base, conversion.row, conversion.base_bytes, reporter)
    scorers = _by_layer(plan)
    _check_block(plan, scorers)
    with staged(conversion.out, overwrite=overwrite) as folder:
        check_base(conversion)
        done = write_verified(conversion, scorers, folder, reporter, "as of the scorers' base")
        for name, text in plan.scorers.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        card = model_card(conversion, None, scorers=_story(plan.scorers))
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Merged(plan, done)


def load_onto(
    base: hub.Checkpoint,
    scorers: Scorers,
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    cache_dtype: str | None = None,
    yarn: float | None = None,
    reporter: Reporter | None = None,
) -> "PreTrainedModel":
    """The base's model with these scorers, in eval mode; nothing is written.

    Args:
        cache_dtype: what the cache holds, in place of what the scorers' block says.
        yarn: as of `load_model`.

    Raises:
        UsageError: they belong to another base.
        SparsekError: weights or scorers are damaged.
    """
    from sparsek_cli.loading import load_config, load_weights
    from sparsek_cli.loading.positions import stretch
    from sparsek_cli.models import (
        family_of,
        set_budget,
        sparsek_attentions,
        sparsek_config_from,
    )

    row = _row(base, scorers)
    check_config(scorers.base, row, base.config(), base.name)
    files = (file for file in base.path.glob("*.safetensors") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    _check_weights(scorers, base, row, size, reporter or Silent())
    dense = load_config(base.path, base.name)
    if yarn is not None:
        stretch(dense, yarn)
    config = sparsek_config_from(dense, scorers.block)
    kind = family_of(config).sparsek_causal_lm
    model = load_weights(
        base.path, base.name, dtype=dtype, device=device, kind=kind, scorers_later=True,
        config=config,
    )  # fmt: skip
    import torch

    tensors = scorers.tensors()
    for attention in sparsek_attentions(model):
        own = scorers.of_layer(attention.layer_idx, tensors)
        state = {name: torch.from_numpy(array) for name, array in own.items()}
        try:
            attention.scorer.load_state_dict(state)
        except RuntimeError as error:
            raise _damaged(scorers, f"those of layer {attention.layer_idx}") from error
    if cache_dtype is not None:
        set_budget(model, cache_dtype=cache_dtype)
    return model.eval()


def _resolved(base: str, revision: str | None, scorers: Scorers) -> tuple[hub.Checkpoint, Row]:
    checkpoint = hub.resolve(base, revision)
    return checkpoint, _row(checkpoint, scorers)


def _row(base: hub.Checkpoint, scorers: Scorers) -> Row:
    config = base.config()
    if is_converted(config):
        raise UsageError(
            f"'{base.name}' has scorers of its own",
            hint=f"name its dense base ({scorers.base['name']}); "
            "`sparsek export` writes one without scorers",
        )
    return convertible(config)


def _settings(scorers: Scorers, row: Row, config: dict[str, Any]) -> dict[str, Any]:
    """The `sparsek` block beside the scorers, which anybody may have written."""
    from sparsek_cli.models.config import check_settings

    sizes = geometry(config, row)
    types = layer_types(row, {**config, **idle_window_off(row, config, sizes.context)})
    try:
        return check_settings(
            scorers.block,
            layers=sizes.layers,
            heads=sizes.kv_heads,
            sparse=full_layers(types, sizes.shared),
        )
    except UsageError as error:
        raise _damaged(scorers, error.message) from error


def _check_weights(
    scorers: Scorers, base: hub.Checkpoint, row: Row, size: int, reporter: Reporter
) -> None:
    with reporter.progress("comparing the base's weights", size) as bar:
        digest = weights_digest(base.path, row, bar.advance)
    check_weights(scorers.base, digest, base.name)


def _shapes(block: dict[str, Any], sizes: Geometry) -> dict[str, tuple[int, ...]]:
    """Of a scorer's tensors, by name, as its block in the config asks for them."""
    heads, hidden = sizes.kv_heads, sizes.hidden
    shapes = {"weight": (heads, hidden), "bias": (heads,), "slopes": (heads,)}
    if (width := block.get("width")) is not None:
        shapes |= {"hidden_weight": (width, hidden), "hidden_bias": (width,)}
        shapes["out_weight"] = (heads, width)
    if (pairs := block.get("stand_ins")) is not None:
        shapes["stand_ins"] = (sizes.heads, pairs, 2 * sizes.head_dim + 2)
    return shapes


def _by_layer(plan: Plan) -> list[Scorer]:
    """One scorer for each converted layer, of the sizes that the model has."""
    found, conversion = plan.scorers, plan.conversion
    tensors, topk = found.tensors(), found.block["topk"]
    shapes = _shapes(found.block["scorer"], conversion.geometry)
    scorers = []
    for layer in conversion.sparse_layers:
        parts = found.of_layer(layer, tensors)
        if {name: array.shape for name, array in parts.items()} != shapes or any(
            array.dtype != np.float32 for array in parts.values()
        ):
            raise _damaged(found, f"those of layer {layer}")
        own = topk[layer] if isinstance(topk, list) else topk
        each = tuple(own) if isinstance(own, list) else (own,) * conversion.geometry.kv_heads
        scorers.append(Scorer(**parts, topk=each))
    if len(tensors) != len(scorers) * len(shapes):
        raise _damaged(found, "others than its config promises")
    return scorers


def _check_block(plan: Plan, scorers: list[Scorer]) -> None:
    """The config that will be written says of attention what the scorers' own model said."""
    written = converted_config(plan.conversion, scorers)["sparsek"]
    apart = {"topk"}  # by layer and head in `scorers`
    for key in (written.keys() | plan.scorers.block.keys()) - apart:
        if written.get(key) != plan.scorers.block.get(key):
            raise SparsekError(
                f"the scorers in {plan.scorers.file} ask for {key} "
                f"{plan.scorers.block.get(key)!r}, which this version cannot write",
                hint="use the version of sparsek that wrote them, or a newer one",
            )


def _damaged(scorers: Scorers, what: str) -> SparsekError:
    return SparsekError(f"the scorers in {scorers.file} are damaged: {what}", hint=_DAMAGED)


def _about(scorers: Scorers) -> dict[str, Any]:
    return {"scorers": str(scorers.file), "scorers_base": scorers.base["name"]}


def _story(scorers: Scorers) -> str:
    return (
        f"The scorers were made for {scorers.base['name']}, whose weights these are (compared by "
        "hash), and put onto\nit with `sparsek merge`."
    )
