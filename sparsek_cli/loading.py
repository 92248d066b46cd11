"""A checkpoint on disk becomes a model and its tokenizer: one way for all verbs.

No weight is ever random, no pickle is read, no code of a checkpoint runs, nothing is asked.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli import quantised
from sparsek_cli.checkpoint_files.shape_checks import sizes_beyond
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.checkpoint_files.template_steps import check_template
from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError, UsageError, first_line, reason
from sparsek_cli.families import TABLE
from sparsek_cli.families.layers import stray_types, stray_window
from sparsek_cli.families.own_config import own_value
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sparsek_cli.hub import Checkpoint

_LOG = logging.getLogger("sparsek_cli")
_DAMAGED = "the folder is incomplete or damaged: fetch or convert it again"
_UNFIT = (
    "correct what its config.json says if the weights are right, else fetch or convert it again"
)
_MISFIT = "a package that loading it needs does not fit the installed transformers: upgrade both"
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
# Buffers that older versions of transformers saved and newer ones compute.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


def load_model(
    checkpoint: "Checkpoint",
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    cache_dtype: str | None = None,
    **options: Any,
) -> "PreTrainedModel":
    """The causal LM in eval mode on a device; sparse and plain dense checkpoints alike.

    Args:
        cache_dtype: what a converted model's cache holds, in place of what its config says.
        options: passed on to `load_weights`.

    Raises:
        SparsekError: see `load_weights`.
        UsageError: a cache_dtype that does not exist, or for a model that is not converted.
    """
    model = load_weights(checkpoint.path, checkpoint.name, dtype=dtype, device=device, **options)
    if cache_dtype is not None:
        if not is_converted(model.config):
            raise UsageError(
                f"{checkpoint.name} is a dense model, whose cache is transformers' own",
                hint="convert it first (sparsek convert), or leave the cache's dtype out",
            )
        from sparsek_cli.models import set_budget

        set_budget(model, cache_dtype=cache_dtype)
    return model.eval()


def load_config(path: Path, name: str) -> "PreTrainedConfig":
    """config.json as transformers reads it.

    Raises:
        SparsekError: it needs code of its own, or is no config that transformers knows.
        UsageError: it names an activation function that there is none of, or a window or kinds
            of layers that the family does not have.
    """
    from transformers import AutoConfig

    import sparsek_cli.models  # noqa: F401  (registers the sparsek_* model types)

    with readable_errors(name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    _check_activations(config, name)
    _settle_stray_kinds(config)
    return config


def _settle_stray_kinds(config: "PreTrainedConfig") -> None:
    """A window or kinds of layers of a family that has none: no layer heeds them, its cache does.

    Raises:
        UsageError: they are in use, and a cache would forget what attention asks for.
    """
    kind = config.model_type.removeprefix("sparsek_")
    if kind not in TABLE or TABLE[kind].mixed:
        return
    types = getattr(config, "layer_types", None)
    if types != own_value(config, "layer_types") and {*types} != {"full_attention"}:
        raise stray_types(types, kind)
    for key in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, key, None)
        if window is None or own_value(config, key) is not None:
            continue
        context = getattr(config, "max_position_embeddings", None) or 0
        if window < context and getattr(config, "use_sliding_window", True):
            raise stray_window(key, window, kind)
        setattr(config, key, None)


def _check_activations(config: "PreTrainedConfig", name: str) -> None:
    """Raises UsageError where a function is named that transformers does not have."""
    from transformers.activations import ACT2FN

    for key in _ACTIVATIONS:
        found = own_value(config, key)
        if isinstance(found, str) and found not in ACT2FN:
            near = get_close_matches(found, list(ACT2FN), n=1)
            meant = f"did you mean '{near[0]}'? " if near else ""
            raise UsageError(
                f"'{name}': {key} in config.json is {found!r}, no activation function that "
                "transformers knows",
                hint=f"{meant}silu, gelu and relu are some",
            )


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

    Args:
        name: what to call it.
        dtype: of the weights; packed ones stay as they are, see quantised.py.
        device: where the model goes; "meta": nowhere, its weights are only looked for.
        kind: class to load with; default AutoModelForCausalLM.
        config: what to load it with; default: the folder's own.
        scorers_later: a dense checkpoint is loaded with a sparse class, which draws scorers.
        options: passed on to `from_pretrained`, `attn_implementation` for instance.

    Raises:
        SparsekError: weights are missing, left over or of another shape, or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401  (registers the sparsek_* model types)

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
        model, report = quantised.load(
            kind, path, config, dtype, device,
            # So that mis-shaped ones are named here, not in a report that is not shown.
            ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    check_loaded(report, name, scorers_later=scorers_later)
    _say_untied(model, name)
    if not scorers_later:
        _check_scorers(model, name)
    return model


def _say_untied(model: "PreTrainedModel", name: str) -> None:
    """Where both matrices lie in a file and differ, transformers does not tie them."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(end, "weight", None) for end in ends]
    tied = own_value(model.config, "tie_word_embeddings")
    if not tied or any(weight is None or weight.is_meta for weight in weights):
        return
    if weights[0] is not weights[1]:
        _LOG.warning(
            "'%s': config.json says tie_word_embeddings, but input and output embeddings differ: "
            "they are not tied here, and other programs may tie them; set it to false",
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
        raise SparsekError(f"'{name}' lacks {_count(missing)}", hint=_DAMAGED)
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


def load_tokenizer(source: "Checkpoint | str | Path") -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint, in a folder, or of a hub id.

    Raises:
        SparsekError: there is none, it cannot be used, or its chat template does not end; or the
            config.json beside it is none.
    """
    from transformers import AutoTokenizer

    import sparsek_cli.models  # noqa: F401  (a sparsek_* config must be known to AutoTokenizer)

    place, name = source, str(source)
    if not isinstance(source, str | Path):
        place, name = source.path, source.name
    if (Path(place) / "config.json").is_file():
        load_config(Path(place), name)  # AutoTokenizer reads it, too, and would blame itself
    hint = "copy tokenizer.json and tokenizer_config.json of the base model into its folder"
    try:
        # Silenced: a class that is no tokenizer's may load a model, and report on it.
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        probe = tokenizer("a word and 1").input_ids
    except Exception as error:
        # Every tokenizer library fails in its own way; all of them mean the same to the user.
        raise SparsekError(
            f"'{name}' has no usable tokenizer: {first_line(error)}", hint=hint
        ) from error
    if not probe:
        raise SparsekError(
            f"'{name}' has no usable tokenizer: it makes no tokens of any text", hint=hint
        )
    check_template(tokenizer, name)
    return tokenizer


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", rows: int, name: str) -> None:
    """The tokenizer's ids must be rows of the embedding.

    A padding token that is none is replaced by the end-of-text token, in memory.

    Args:
        rows: of the embedding.

    Raises:
        SparsekError: an id of any other token is beyond them.
    """
    # A class may add a token for the unknown that its byte-level vocabulary never gives.
    vocabulary = {k: v for k, v in tokenizer.get_vocab().items() if k != tokenizer.unk_token}
    largest = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    pad = tokenizer.pad_token
    if largest[1] >= rows and largest[0] == pad and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        rest = (item for item in vocabulary.items() if item[0] != pad)
        largest = max(rest, key=lambda item: item[1])
    if largest[1] >= rows:
        raise SparsekError(
            f"the tokenizer of '{name}' has token {largest[0]!r} with id {largest[1]}, and the "
            f"model has embeddings for {rows} ids",
            hint="put the tokenizer beside the weights that they were trained with, or resize the "
            "embeddings: model.resize_token_embeddings(len(tokenizer)), save_pretrained",
        )


def embedding_rows(model: "PreTrainedModel") -> int:
    """How many ids a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """What libraries raise while a checkpoint loads, as one line that names it.

    Raises:
        SparsekError: in place of any such error.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SparsekError:
        raise
    except SafetensorError as error:
        raise SparsekError(
            f"the weights of '{name}' cannot be read: {first_line(error)}", hint=_DAMAGED
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = str(error)
        if "can't allocate memory" in text:
            raise SparsekError(
                f"'{name}' needs more memory than there is: {text[text.index('you tried') :]}"
                if "you tried" in text
                else f"'{name}' needs more memory than there is",
                hint="check the sizes in its config.json; else take --dtype bfloat16, or a machine "
                "with more memory",
            ) from error
        if "trust_remote_code" in text or "custom code" in text:
            raise SparsekError(
                f"'{name}' needs code of its own (auto_map in config.json), which is not run",
                hint="name a model of a family that transformers knows by itself",
            ) from error
        hint = _MISFIT if isinstance(error, ImportError) else _UNFIT
        raise SparsekError(f"'{name}' cannot be loaded: {reason(error)}", hint=hint) from error


def _count(names: list[str]) -> str:
    """One name, or how many there are and the first."""
    return f"{len(names)} weights, the first is {names[0]}" if names[1:] else f"weight {names[0]}"
