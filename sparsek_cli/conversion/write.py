"""Writing a converted checkpoint: links to the base, one small file of scorers, and JSON."""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli import disk
from sparsek_cli.checkpoint_files import json_text, samples
from sparsek_cli.checkpoint_files.file_hashes import KEY, SOON, hash_of, known_hash, written_hashes
from sparsek_cli.checkpoint_files.seal import seal
from sparsek_cli.checkpoint_files.shards import INDEX, write_part
from sparsek_cli.conversion.card import model_card
from sparsek_cli.conversion.link_weights import Means, link_or_copy
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.converted import ATTENTION
from sparsek_cli.errors import SparsekError
from sparsek_cli.families.layers import idle_window_off
from sparsek_cli.families.remote_code import REMOTE_CODE_FILE, remote_code_text
from sparsek_cli.output import written_config
from sparsek_cli.output.contents import CALIBRATION, CONVERT_RECIPE, SCORERS
from sparsek_cli.output.tokenizer_files import copy_missing, files_in

# Equal scores with any slope > 0 keep the newest tokens; this one is small beside real scores.
NEUTRAL_SLOPE = 1e-3


@dataclass(frozen=True)
class Scorer:
    """One layer's scorer: weight [G, hidden], bias [G], slopes [G], all float32.

    topk holds the selected keys of each KV head. A scorer with a hidden layer also has
    hidden_weight [width, hidden], hidden_bias [width] and out_weight [G, width]; one with stand-ins
    for evicted pairs stand_ins [H, M, 2 D + 2].
    """

    weight: np.ndarray
    bias: np.ndarray
    slopes: np.ndarray
    topk: tuple[int, ...]
    hidden_weight: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    out_weight: np.ndarray | None = None
    stand_ins: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """By the names that the model's scorer has for them."""
        names = (
            "weight", "bias", "slopes", "hidden_weight", "hidden_bias", "out_weight", "stand_ins"
        )  # fmt: skip
        arrays = {name: getattr(self, name) for name in names}
        return {name: array for name, array in arrays.items() if array is not None}


@dataclass(frozen=True)
class Written:
    """How the base's files came along."""

    means: tuple[Means, ...]
    bytes_copied: int


def neutral_scorers(plan: Plan) -> list[Scorer]:
    """Scores 0 and a small recency slope: keeps the newest topk, a plain window until trained."""
    heads, hidden = plan.geometry.kv_heads, plan.geometry.hidden
    random = np.random.default_rng(plan.seed)

    def layer() -> dict[str, np.ndarray]:
        """A hidden layer that training can use; its output is 0 until then."""
        if plan.calibration.method.scorer == "linear":
            return {}
        width = plan.calibration.method.width
        weight = random.standard_normal((width, hidden), np.float32) / np.sqrt(hidden)
        return {
            "hidden_weight": weight.astype(np.float32),
            "hidden_bias": np.zeros(width, np.float32),
            "out_weight": np.zeros((heads, width), np.float32),
        }

    return [
        Scorer(
            np.zeros((heads, hidden), np.float32),
            np.zeros(heads, np.float32),
            np.full(heads, NEUTRAL_SLOPE, np.float32),
            (plan.topk,) * heads,
            **layer(),
        )
        for _ in plan.sparse_layers
    ]


def write_checkpoint(
    plan: Plan, scorers: list[Scorer], folder: Path, report: Mapping[str, Any] | None = None
) -> Written:
    """Fills the empty `folder` with the converted checkpoint.

    Args:
        plan: what to convert.
        scorers: one per converted layer.
        folder: where; a staging folder, see staging.py.
        report: what calibration measured, kept beside the weights.

    Raises:
        SparsekError: disk full or no permission.
    """
    try:
        with disk.os_errors():
            return _write(plan, scorers, folder, report)
    except OSError as error:
        raise _write_error(error, plan.out) from error


def _write(
    plan: Plan, scorers: list[Scorer], folder: Path, report: Mapping[str, Any] | None
) -> Written:
    from safetensors.numpy import save_file

    weight_map: dict[str, str] = {}
    means: list[Means] = []
    copied = 0
    for number, shard in enumerate(plan.shards, start=1):
        name = f"base-{number:05}.safetensors"
        if shard.part:
            write_part(shard, folder / name)
            disk.readable(folder / name)
            means.append("copy")
        else:
            symbolic = plan.scorers_only
            means.append(
                link_or_copy(shard.path, folder / name, copy=plan.copy_base, symbolic=symbolic)
            )
        copied += shard.bytes if means[-1] == "copy" else 0
        weight_map.update(dict.fromkeys(shard.tensors, name))
    metadata: dict[str, Any] = {KEY: hashes} if (hashes := _hashes(plan, folder)) else {}
    if not plan.scorers_only:
        files = dict.fromkeys(weight_map.values())
        metadata[samples.KEY] = samples.samples_of(folder / name for name in files)
    tensors = {
        f"{plan.scorer_path(layer)}.{part}": np.ascontiguousarray(array)
        for layer, scorer in zip(plan.sparse_layers, scorers, strict=True)
        for part, array in scorer.tensors().items()
    }
    save_file(tensors, folder / SCORERS, metadata={"format": "pt"})
    seal(folder / SCORERS)
    disk.readable(folder / SCORERS)
    weight_map.update(dict.fromkeys(tensors, SCORERS))
    total = sum(e.end - e.start for s in plan.shards for e in s.tensors.values())
    total += sum(array.nbytes for array in tensors.values())
    metadata["total_size"] = total
    metadata[written_config.KEY] = config = converted_config(plan, scorers)
    json_text.write(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    json_text.write(folder / "config.json", config)
    (folder / REMOTE_CODE_FILE).write_text(remote_code_text(), encoding="utf-8")
    copy_missing(plan.side_files, plan.base.path, folder)
    copy_missing(files_in(plan.tokenizer.path), plan.tokenizer.path, folder)
    if report:
        json_text.write(folder / CALIBRATION, report)
    (folder / CONVERT_RECIPE).write_text(_recipe_text(plan), encoding="utf-8")
    (folder / "README.md").write_text(model_card(plan, report), encoding="utf-8")
    return Written(tuple(means), copied)


def _hashes(plan: Plan, folder: Path) -> dict[str, str]:
    """By name of a base's file in `folder`, its sha256, where that is known or soon found out."""
    if plan.scorers_only:
        return {}
    few, found = sum(shard.bytes for shard in plan.shards) <= SOON, {}
    written = written_hashes(plan.base.path)  # of a model that is converted again
    for number, shard in enumerate(plan.shards, start=1):
        file = folder / f"base-{number:05}.safetensors"
        name = shard.path.name
        known = None if shard.part else known_hash(shard.path) or written.get(name)
        if known or few:
            found[file.name] = known or hash_of(file)
    return found


def converted_config(plan: Plan, scorers: list[Scorer]) -> dict[str, Any]:
    """config.json of the converted model: the base's, plus type, classes and `sparsek` block."""
    sizes = {size for scorer in scorers for size in scorer.topk}
    each = dict(zip(plan.sparse_layers, (list(scorer.topk) for scorer in scorers), strict=True))
    topk = sizes.pop() if len(sizes) == 1 else [each.get(i) for i in range(len(plan.types))]
    module = Path(REMOTE_CODE_FILE).stem
    row = plan.row
    own_config, own_model, own_causal_lm, *_ = row.sparsek_names
    config = {k: v for k, v in plan.config.items() if not k.startswith("_attn_implementation")}
    config.update(idle_window_off(row, plan.config, plan.geometry.context))
    config.update(
        model_type=row.sparsek_type,
        attn_implementation=ATTENTION,
        architectures=[own_causal_lm],
        auto_map={
            "AutoConfig": f"{module}.{own_config}",
            "AutoModel": f"{module}.{own_model}",
            "AutoModelForCausalLM": f"{module}.{own_causal_lm}",
        },
        sparsek={
            "topk": topk,
            "window": plan.window,
            "sinks": plan.sinks,
            "gate": plan.gate,
            "scorer": _scorer_block(scorers[0]),
            **({} if plan.cache_dtype == "auto" else {"cache_dtype": "int8"}),
        },
    )
    if row.dropout:
        config[row.dropout] = 0.0
    return config


def _scorer_block(scorer: Scorer) -> dict[str, Any]:
    more = {} if scorer.stand_ins is None else {"stand_ins": scorer.stand_ins.shape[1]}
    if scorer.hidden_weight is None:
        return {"type": "linear", **more}
    return {"type": "mlp", "width": len(scorer.hidden_weight), **more}


def _recipe_text(plan: Plan) -> str:
    import yaml

    head = (
        "# What made this checkpoint; `sparsek convert --recipe sparsek.yaml` makes it again.\n"
        if plan.repeatable
        else "# Settings of this checkpoint. They do not say what made its scorers: converting\n"
        "# with them gives others.\n"
    )
    return head + yaml.safe_dump(plan.resolved(), sort_keys=False, allow_unicode=True)


def _write_error(error: OSError, out: Path) -> SparsekError:
    if disk.is_full(error):
        return SparsekError(
            f"the disk is full while writing {out}",
            hint="free some space, or choose OUT on the base's filesystem so that it can be linked",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SparsekError(
            f"no permission to write {error.filename or out}",
            hint="check the permissions of OUT's parent and of the base's files",
        )
    return SparsekError(
        f"cannot write {out}: {error}", hint="check the disk, or choose another OUT"
    )
