"""The plan of a conversion: everything decided and checked before anything is written.

Reads config.json and safetensors headers only.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsek_cli import hub, quantised
from sparsek_cli.conversion.base_config import convertible, dense_config
from sparsek_cli.conversion.checks import check_room, check_tensors
from sparsek_cli.conversion.geometry import Geometry, geometry
from sparsek_cli.conversion.shards import Shard, read_shards, stored_dtype, without_scorers
from sparsek_cli.conversion.sizes import (
    calibration_size,
    fit_length,
    slots,
    with_documents,
    with_settings_of,
)
from sparsek_cli.conversion.tokenizer import FILES as TOKENIZER_FILES
from sparsek_cli.converted import is_converted
from sparsek_cli.disk import existing_parent
from sparsek_cli.errors import UsageError
from sparsek_cli.families import Row
from sparsek_cli.families.layers import full_layers, idle_window_off, layer_types
from sparsek_cli.families.own_config import own_config
from sparsek_cli.gguf.checkpoint import GgufCheckpoint
from sparsek_cli.gguf.checkpoint import find as find_gguf
from sparsek_cli.hub import Checkpoint
from sparsek_cli.output.contents import MODEL, SCORERS_ALONE, Contents
from sparsek_cli.output.place import absolute, check_folder
from sparsek_cli.recipes.schema_convert import CalibrationMethod, ConvertRecipe

_SIDE_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class Calibration:
    """How scorers are found.

    Attributes:
        text: what they are fitted on, as the recipe's `calibrate`.
        per_head: whether heads that look far back get more of the same total.
        device, dtype: as users name them.
    """

    text: str
    method: CalibrationMethod
    per_head: bool
    device: str
    dtype: str


# What asks for things far back, in words.
_DOCUMENTS = {
    "retold": "that are told again",
    "statements": "whose facts are told again",
    "questions": "with questions",
    "told_and_asked": "with facts told again and asked for",
    "mixed": "with questions and passages told again",
    "none": "of plain text",
}


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Attributes:
        base: the checkpoint to convert; `config` is its config.json, without what an earlier
            conversion added.
        out: folder to appear.
        row, geometry: its family, which says where its attention is, and how large it is.
        types: kind of each layer, as transformers names it.
        sliding_window: of the layers that slide; 0 where none does.
        prefixed: whether the base's tensor names carry the base model's prefix.
        shards: base files in order.
        side_files: small files that come along.
        topk, window, sinks: slots per KV head.
        linkable: whether `out` lies on the base's filesystem.
        calibrate_tokens: tokens to fit maps on, in sequences of `fit_length`; 0: no calibration.
        calibrate_length: tokens of the documents on which they are compared.
        calibration: how scorers are found. gate: how scores enter attention.
        cache_dtype: of the slots, auto or int8.
        copy_base: base files are copied even where they could be linked.
        scorers_only: `out` gets the scorers and no base.
        overwrite: `out` may be there. seed: of everything drawn.
        request: the recipe as plain data, for the record.
    """

    base: Checkpoint
    config: dict[str, Any]
    out: Path
    row: Row
    geometry: Geometry
    types: tuple[str, ...]
    sliding_window: int
    prefixed: bool
    shards: list[Shard]
    side_files: list[Path]
    topk: int
    window: int
    sinks: int
    linkable: bool
    calibrate_tokens: int
    calibrate_length: int
    calibration: Calibration
    gate: str
    cache_dtype: str
    copy_base: bool
    scorers_only: bool
    overwrite: bool
    seed: int
    request: dict[str, Any]

    @property
    def contents(self) -> Contents:
        """What lies in `out` afterwards."""
        return contents_of(self.scorers_only)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that are converted: those that attend to everything."""
        return full_layers(self.types)

    @property
    def budget(self) -> int:
        """Slots per KV head: sinks + topk + window."""
        return self.sinks + self.topk + self.window

    @property
    def evicts(self) -> bool:
        """Whether a text of the model's own context loses anything."""
        return self.budget < self.geometry.context

    @property
    def fit_length(self) -> int:
        """Tokens of a sequence that maps are fitted on."""
        return fit_length(self.calibrate_length)

    @property
    def base_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def scorer_path(self, layer: int) -> str:
        """State-dict path of one layer's scorer, in the naming style of the base's tensors."""
        path = f"{self.row.attention_path(layer)}.scorer"
        return path if self.prefixed else path.removeprefix(f"{self.row.stored}.")

    def resolved(self) -> dict[str, Any]:
        """The request with every default filled in: what sparsek.yaml records."""
        settings = dict(self.request)
        where = str(self.base.path) if self.base.source == "folder" else settings["model"]
        settings.update(model=where, out=str(self.out))
        settings.update(budget=None, topk=self.topk, window=self.window)
        settings.update(
            calibrate_tokens=self.calibrate_tokens or None,
            calibrate_length=self.calibrate_length or None,
        )
        return settings

    def cache_bytes(self, tokens: int, *, dense: bool) -> int:
        """KV bytes of one sequence, all layers, in the checkpoint's number format.

        Sliding layers hold their window either way; states are not counted.
        """
        pairs = len(self.sparse_layers) * (tokens if dense else self.budget)
        each = self._pair_bytes if dense else self._slot_bytes
        return pairs * each + self.sliding_bytes(tokens if dense else None)

    def sliding_bytes(self, tokens: int | None) -> int:
        """KV bytes of the layers that slide, after so many tokens; None: their windows are full."""
        kept = max(self.sliding_window - 1, 0)  # the last of a window is the query's own
        kept = kept if tokens is None else min(kept, tokens)
        return self.types.count("sliding_attention") * kept * self._pair_bytes

    @property
    def _pair_bytes(self) -> int:
        """Of a key and value in every KV head of a layer."""
        width = 4 if self.geometry.dtype in ("float32", "float") else 2
        return 2 * self.geometry.kv_heads * self.geometry.head_dim * width

    @property
    def _slot_bytes(self) -> int:
        """The same where SparseK holds them: in 8 bits, each with a float32 scale, if asked for."""
        if self.cache_dtype == "auto":
            return self._pair_bytes
        return 2 * self.geometry.kv_heads * (self.geometry.head_dim + 4)

    def data(self) -> dict[str, Any]:
        """For --json: what --dry-run shows."""
        size = self.geometry
        return {
            "model": str(self.base.path),
            "family": self.row.model_type,
            "quantised": quantised.described(self.config) or None,
            "out": str(self.out),
            "layers": size.layers,
            "layer_types": dict(Counter(self.types)),
            "converted_layers": list(self.sparse_layers),
            "kv_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "context": size.context,
            "topk": self.topk,
            "window": self.window,
            "sinks": self.sinks,
            "gate": self.gate,
            "scorer": self.calibration.method.scorer,
            "slots_per_kv_head": self.budget,
            "evicts": self.evicts,
            "kv_bytes": self.cache_bytes(size.context, dense=False),
            "dense_kv_bytes_at_context": self.cache_bytes(size.context, dense=True),
            "base_files": len(self.shards),
            "base_bytes": self.base_bytes,
            "base_bytes_to_copy": 0 if self.linkable else self.base_bytes,
            "scorers_only": self.scorers_only,
            "calibrate": self.calibration.text,
            "calibrate_tokens": self.calibrate_tokens,
            "calibrate_length": self.calibrate_length,
        }

    def _layers(self) -> str:
        kept = Counter(self.types[i] for i in set(range(len(self.types))) - {*self.sparse_layers})
        if not kept:
            return f"{self.geometry.layers} layers"
        others = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kept.items())
        return f"{len(self.sparse_layers)} of {self.geometry.layers} layers; as they are: {others}"

    def _quantised(self) -> str:
        how = quantised.described(self.config)
        return f", quantised: {how}" if how else ""

    def text(self) -> str:
        """For a person."""
        size = self.geometry
        gib = self.base_bytes / 2**30
        how = "linked, 0 bytes copied" if self.linkable else "copied"
        if isinstance(self.base, GgufCheckpoint):
            how = self.base.header.text()
        if self.scorers_only:
            how = "read and hashed; OUT holds the scorers alone"
        never = "" if self.evicts else f"; nothing is evicted within {size.context:,} tokens"
        kept, dense = (self.cache_bytes(size.context, dense=d) / 2**20 for d in (False, True))
        if self.calibrate_tokens:
            count = self.calibrate_tokens // self.fit_length
            calibration = (
                f"{self.calibration.text}: {count} sequences of {self.fit_length:,} tokens, "
                f"compared on documents of {self.calibrate_length:,} "
                f"{_DOCUMENTS[self.calibration.method.documents]}"
            )
        else:
            calibration = "none: neutral scorers, a plain window until fine-tuned"
        return "\n".join(
            [
                f"base        {self.base.path} ({self.row.model_type}, {self._layers()}, "
                f"{size.kv_heads} KV heads, context {size.context:,}{self._quantised()})",
                f"out         {self.out}",
                f"attention   {self.sinks} sinks + {self.topk} selected + {self.window} window = "
                f"{self.budget} slots per KV head, gate {self.gate}{never}",
                f"cache       {kept:.1f} MiB always; dense at {size.context:,}: {dense:.1f} MiB",
                f"weights     {len(self.shards)} file(s), {gib:.2f} GiB, {how}",
                f"calibration {calibration}",
            ]
        )


def plan(recipe: ConvertRecipe) -> Plan:
    """Checks the request and its base checkpoint, and fills in what was left open.

    Raises:
        UsageError: the request cannot be carried out (family, sizes, OUT).
        SparsekError: the checkpoint is damaged, or there is no room for it.
    """
    if recipe.model is None:
        raise UsageError(
            "MODEL is missing", hint="name one, e.g. `sparsek convert tiny`; --list-models shows"
        )
    base = find_gguf(recipe.model, recipe.revision)
    base = base or hub.resolve(recipe.model, recipe.revision)
    config = base.config()
    again = recipe.again and is_converted(config)
    if again:
        recipe = with_settings_of(recipe, config["sparsek"])
        config = dense_config(config)
    row = convertible(config)
    sizes = geometry(config, row)
    types = layer_types(row, {**config, **idle_window_off(row, config, sizes.context)})
    if not full_layers(types):
        raise UsageError(
            "no layer of the model attends to everything: there is nothing to convert",
            hint="its cache is bounded already",
        )
    topk, window = slots(
        sizes.context,
        budget=recipe.budget,
        topk=recipe.topk,
        window=recipe.window,
        sinks=recipe.sinks,
    )
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
    packed_weights = bool(quantised.described(config))
    prefixed = check_tensors(shards, row, full_layers(types), packed=packed_weights)
    parent = existing_parent(out)
    # Scorers alone need the base's files for as long as they are checked: any kind of link will do.
    linkable = (
        recipe.scorers_only
        or not (packed or recipe.copy_base)
        and all(
            shard.path.stat().st_dev == parent.stat().st_dev and not shard.part for shard in shards
        )
    )
    if not linkable:
        check_room(parent, sum(shard.bytes for shard in shards), packed=packed)
    tokens, length = 0, 0
    if recipe.calibrate != "none":
        tokens, length = calibration_size(
            sizes,
            topk + window + recipe.sinks,
            tokens=recipe.calibrate_tokens,
            length=recipe.calibrate_length,
        )
    selected = topk * sizes.kv_heads * len(full_layers(types))
    side = {path for pattern in _SIDE_FILES for path in base.path.glob(pattern) if path.is_file()}
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
        side_files=sorted(side),
        topk=topk,
        window=window,
        sinks=recipe.sinks,
        linkable=linkable,
        calibrate_tokens=tokens,
        calibrate_length=length,
        calibration=Calibration(
            text=recipe.calibrate,
            method=with_documents(recipe.method, selected, length),
            per_head=recipe.budgets == "per_head",
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
    )


def out_folder(recipe: ConvertRecipe, base: Checkpoint) -> Path:
    """The folder to write: the request's, else named after the base."""
    return absolute(recipe.out or f"{base.name}-{'scorers' if recipe.scorers_only else 'sparsek'}")


def contents_of(scorers_only: bool) -> Contents:
    """What will lie in OUT."""
    return SCORERS_ALONE if scorers_only else MODEL


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
    return config.get("sliding_window") or own_config(row, config).sliding_window
