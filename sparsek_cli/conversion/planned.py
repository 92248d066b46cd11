"""What a conversion will do: its sizes, the bytes that follow from them, and how both are shown."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsek_cli import quantised
from sparsek_cli.byte_units import size as byte_size
from sparsek_cli.checkpoint_files.shards import Shard
from sparsek_cli.conversion.calibrate.method import DOCUMENTS, Method
from sparsek_cli.conversion.default_sizes import fit_length
from sparsek_cli.conversion.from_gguf.checkpoint import GgufCheckpoint
from sparsek_cli.conversion.geometry import Geometry
from sparsek_cli.families import Row
from sparsek_cli.families.layers import full_layers, storing_layers
from sparsek_cli.hub import Checkpoint
from sparsek_cli.output.contents import MODEL, SCORERS_ALONE, Contents


@dataclass(frozen=True)
class Calibration:
    """How scorers are found.

    Attributes:
        text: what they are fitted on, as the recipe's `calibrate`.
        recall: how much what stands far back counts against running text, from 0 to 1.
        per_head: whether heads that look far back get more of the same total.
        stand_ins: whether a pair per query head is fitted for what it no longer sees.
        device, dtype: as users name them.
    """

    text: str
    method: Method
    recall: float
    per_head: bool
    stand_ins: bool
    device: str
    dtype: str


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
        side_files: small files of the base that come along; its tokenizer's are not among them.
        tokenizer: the folder whose tokenizer `out` gets; the base, unless another was named.
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
        repeatable: the recipe alone makes the same scorers; not where it came with a method.
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
    tokenizer: Checkpoint
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
    repeatable: bool

    @property
    def contents(self) -> Contents:
        """What lies in `out` afterwards."""
        return contents_of(self.scorers_only)

    @property
    def own_tokenizer(self) -> bool:
        """Whether the tokenizer is the base's."""
        return self.tokenizer.path == self.base.path

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that get scorers: those that attend to everything, in keys of theirs."""
        return full_layers(self.types, self.geometry.shared)

    @property
    def stored_by(self) -> dict[int, int]:
        """By layer that attends to everything in another one's keys: that other one."""
        return storing_layers(self.types, self.geometry.shared)

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
        if not self.own_tokenizer and self.tokenizer.source == "folder":
            settings.update(tokenizer=str(self.tokenizer.path))
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
        if self.geometry.sliding_features is not None:
            return 2 * self.geometry.sliding_features * kept * self._number_bytes
        return self.types.count("sliding_attention") * kept * self._pair_bytes

    @property
    def _number_bytes(self) -> int:
        """Of a feature, in the checkpoint's number format."""
        return 4 if self.geometry.dtype in ("float32", "float") else 2

    @property
    def _pair_bytes(self) -> int:
        """Of a key and value in every KV head of a layer that is converted."""
        return 2 * self.geometry.kv_heads * self.geometry.head_dim * self._number_bytes

    @property
    def slot_dtype(self) -> str:
        """Number format of the slots: the checkpoint's, or int8."""
        return self.geometry.dtype if self.cache_dtype == "auto" else self.cache_dtype

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
            "tokenizer": None if self.own_tokenizer else str(self.tokenizer.path),
            "layers": size.layers,
            "layer_types": dict(Counter(self.types)),
            "converted_layers": list(self.sparse_layers),
            "kv_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "context": size.context,
            "positions": size.positions,
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
        full = full_layers(self.types)
        kept = Counter(kind for i, kind in enumerate(self.types) if i not in full)
        what = f"{len(full)} of {self.geometry.layers} layers" if kept else f"{len(full)} layers"
        if self.stored_by:
            what += f" ({len(self.stored_by)} of them by the keys of another)"
        others = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kept.items())
        return f"{what}; as they are: {others}" if others else what

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
        kept, dense = (self.cache_bytes(size.context, dense=d) for d in (False, True))
        if self.calibrate_tokens:
            count = self.calibrate_tokens // self.fit_length
            calibration = (
                f"{self.calibration.text}: {count} sequences of {self.fit_length:,} tokens, "
                f"compared on documents of {self.calibrate_length:,} "
                f"{DOCUMENTS[self.calibration.method.documents]}"
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
                f"cache       {byte_size(kept)} always, in {self.slot_dtype}; "
                f"dense at {size.context:,}: {byte_size(dense)}",
                *((f"positions   {size.positions}",) if size.positions else ()),
                f"weights     {len(self.shards)} file(s), {gib:.2f} GiB, {how}",
                f"calibration {calibration}",
                *(() if self.own_tokenizer else (f"tokenizer   {self.tokenizer.path}",)),
            ]
        )


def contents_of(scorers_only: bool) -> Contents:
    """What will lie in OUT."""
    return SCORERS_ALONE if scorers_only else MODEL
