"""The model of a checkpoint: every weight that its config promises, and no others."""

import copy
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli import quantised
from sparsek_cli.checkpoint_files.shape_checks import sizes_beyond
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.checkpoint_files.tied_ends import ends_differ
from sparsek_cli.checkpoint_files.wrapped_names import WRAPPED, in_place_of
from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families.own_config import own_value
from sparsek_cli.loading.configs import load_config
from sparsek_cli.loading.generation import check_generation
from sparsek_cli.loading.library_errors import DAMAGED, readable_errors
from sparsek_cli.loading.positions import stretch
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from sparsek_cli.hub import Checkpoint

_LOG = logging.getLogger("sparsek_cli")
# Buffers that older versions of transformers saved and newer ones compute.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


def load_model(
    checkpoint: "Checkpoint",
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    cache_dtype: str | None = None,
    yarn: float | None = None,
    **options: Any,
) -> "PreTrainedModel":
    """The causal LM in eval mode on a device; sparse and plain dense checkpoints alike.

    Args:
        cache_dtype: what a converted model's cache holds, in place of what its config says.
        yarn: how many times its own length it is to read; see positions.py.
        options: passed on to `load_weights`.

    Raises:
        SparsekError: see `load_weights`.
        UsageError: a cache_dtype that does not exist, or for a model that is not converted; a
            model whose positions cannot be stretched.
    """
    from sparsek_cli.models.learned_positions import guard

    if yarn is not None:
        options["config"] = load_config(checkpoint.path, checkpoint.name)
        stretch(options["config"], yarn)
    model = load_weights(checkpoint.path, checkpoint.name, dtype=dtype, device=device, **options)
    if cache_dtype is not None:
        if not is_converted(model.config):
            raise UsageError(
                f"{checkpoint.name} is a dense model, whose cache is transformers' own",
                hint="convert it first (sparsek convert), or leave the cache's dtype out",
            )
        from sparsek_cli.models import set_budget

        set_budget(model, cache_dtype=cache_dtype)
    guard(model)
    return model.eval()


def load_weights(
    path: Path,
    name: str,
    *,
    dtype: "torch.dtype",
    device: "torch.device | str" = "cpu",
    kind: Any = None,
    config: "PreTrainedConfig | None" = None,
    scorers_later: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """The causal LM in a folder with every weight that its config promises, and no others.

    Dense ones, too, have positions as converted ones have (models/positions.py): whatever reads
    them here reads in pieces.

    Args:
        name: what to call it.
        dtype: of the weights; packed ones stay as they are, see quantised.py.
        device: where the model goes; "meta": nowhere, its weights are only looked for.
        kind: class to load with; default AutoModelForCausalLM.
        config: what to load it with; default: the folder's own.
        scorers_later: a dense checkpoint is loaded with a sparse class, which draws scorers.
        options: passed on to `from_pretrained`, `attn_implementation` for instance.

    Raises:
        SparsekError: weights are missing, left over or of another shape, or cannot be read;
            scorers are not those that were written, or a base's not those that were converted.
        UsageError: its generation_config.json asks for what cannot be.
    """
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models.positions import fix_positions  # registers the sparsek_* model types

    if kind is None:
        kind, options["trust_remote_code"] = AutoModelForCausalLM, False
    config = config or load_config(path, name)
    looked_for = str(device) == "meta" or quantised.described(config)
    if not looked_for and sizes_beyond(read_shards(path), config.to_dict()):
        # Names and shapes alone first.
        load_weights(
            path, name, dtype=dtype, device="meta", kind=kind, config=copy.deepcopy(config),
            scorers_later=scorers_later, **options,
        )  # fmt: skip
    with quiet_transformers(), readable_errors(name):
        check_generation(path)
        model, report = quantised.load(
            kind, path, config, dtype, device,
            # So that mis-shaped ones are named here, not in a report that is not shown.
            ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    check_loaded(report, name, scorers_later=scorers_later)
    fix_positions(model)
    _say_untied(model, path, name)
    if not scorers_later:
        _check_scorers(model, name)
    return model


def _say_untied(model: "PreTrainedModel", path: Path, name: str) -> None:
    """Where both matrices lie in a file and differ, transformers does not tie them."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(end, "weight", None) for end in ends]
    if not own_value(model.config, "tie_word_embeddings") or any(w is None for w in weights):
        return
    unread = any(weight.is_meta for weight in weights)
    if ends_differ(read_shards(path)) if unread else weights[0] is not weights[1]:
        _warn_untied(name)


def say_untied(path: Path, name: str, config: "PreTrainedConfig") -> None:
    """Warns as `load_weights` does, for programs that load the files of `path` themselves."""
    if own_value(config, "tie_word_embeddings") and ends_differ(read_shards(path)):
        _warn_untied(name)


@cache
def _warn_untied(name: str) -> None:
    """Once: a verb looks at its weights before it loads them."""
    _LOG.warning(
        "'%s': config.json says tie_word_embeddings, but input and output embeddings differ: they "
        "are not tied here, and other programs (vLLM is one) tie them; set it to false",
        name,
    )


def check_whole(path: Path, name: str) -> None:
    """Every weight that a folder's config promises is there, of its shape; none is read.

    Of quantised ones config.json alone is looked at: packed tensors do not tell their shapes.

    Raises:
        SparsekError: as `load_weights`.
    """
    import torch

    config = load_config(path, name)
    if not quantised.described(config):
        load_weights(path, name, dtype=torch.float32, device="meta", config=config)


def _check_scorers(model: "PreTrainedModel", name: str) -> None:
    """Scores that are no numbers select whatever comes first, and nobody sees it."""
    for key, parameter in model.named_parameters():
        if ".scorer." in key and not parameter.is_meta and not parameter.isfinite().all():
            raise SparsekError(
                f"'{name}': {key} holds values that are not finite",
                hint="fetch the model again, or convert its base again: `sparsek export` gives it",
            )


def check_loaded(report: dict[str, Any], name: str, *, scorers_later: bool = False) -> None:
    """Raises SparsekError where transformers' loading report says that weights do not fit."""
    missing = sorted(report["missing_keys"])
    if scorers_later:
        missing = [key for key in missing if ".scorer." not in key]
    if missing:
        there = sorted(report["unexpected_keys"])
        # The first may be an output embedding, which is stored once where it is tied.
        instead = in_place_of(missing[0], there) or in_place_of(missing[-1], there)
        raise SparsekError(
            f"'{name}' lacks {_count(missing)}" + (f"; it holds {instead}" if instead else ""),
            hint=WRAPPED if instead else DAMAGED,
        )
    shapes = sorted((str(key), list(a), list(b)) for key, a, b in report["mismatched_keys"])
    if shapes:
        key, there, wanted = shapes[0]
        raise SparsekError(
            f"'{name}': {key} has shape {there}, config.json asks for {wanted}",
            hint="correct config.json if the weights are right, else fetch the model again",
        )
    idle = (*_BUFFERS, *quantised.ACTIVATION_SCALES)
    others = sorted(k for k in report["unexpected_keys"] if not k.endswith(idle))
    if others:
        raise SparsekError(
            f"'{name}' holds {_count(others)}, which its config.json has no place for",
            hint="they would be ignored: name the checkpoint that config.json belongs to, or fetch "
            "the model again",
        )


def embedding_rows(model: "PreTrainedModel") -> int:
    """How many ids a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


def _count(names: list[str]) -> str:
    """One name, or how many there are and the first."""
    return f"{len(names)} weights, the first is {names[0]}" if names[1:] else f"weight {names[0]}"
