"""config.json: read, and looked at by its own keys."""

import json
import math
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.converted import check_whole_settings
from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.families import TABLE
from sparsek_cli.families.causal import check_alone
from sparsek_cli.families.original_length import check_original
from sparsek_cli.families.positions import check_one_rope
from sparsek_cli.families.rope_beside import check_beside
from sparsek_cli.families.rotary_base import check_base
from sparsek_cli.model_folder.not_a_model import no_config

ONE_OF_THEM = "keep the one that is meant, or fetch the file again"
UNMARKED = "save it as UTF-8 without one: transformers does not read it"
_LONGEST = 4 << 20  # bytes
# Where transformers looks for the part of a model that writes text (`get_text_config`).
_TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "n_embd", "n_layer", "n_head",
    "n_positions",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "float64", "float", "half", "double")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UsageError: there is none, or it is no JSON object.
    """
    file = path / "config.json"
    again = "fetch or save the model again"
    check_length(file)
    try:
        config = json_text.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise no_config(path) from error
    except json_text.GivenTwice as error:
        raise UsageError(f"{file}: {error}", hint=ONE_OF_THEM) from error
    except json_text.Marked as error:
        raise UsageError(f"{file} begins with a byte order mark", hint=UNMARKED) from error
    except (ValueError, RecursionError) as error:
        why = first_line(error)
        raise UsageError(f"{file} is not valid JSON: {why}", hint=again) from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} holds no JSON object", hint=again)
    for key, kind in (("model_type", str), ("architectures", list)):
        if not isinstance(config.get(key), kind | None):
            raise UsageError(
                f"{file}: {key} is {json.dumps(config[key])[:40]}, expected a {kind.__name__}",
                hint=again,
            )
    for key, value in json_text.floats(config):
        if not math.isfinite(value):
            raise UsageError(f"{file}: {key} is {value}, expected a finite number", hint=again)
    return config


def check_length(file: Path) -> None:
    """Libraries copy configs again and again: a million keys are minutes."""
    if file.is_file() and file.stat().st_size > _LONGEST:
        raise UsageError(
            f"{file} is larger than any model's ({_LONGEST >> 20} MiB)",
            hint="fetch or save the model again",
        )


def check_config(config: dict[str, Any], name: str) -> None:
    """Raises UsageError or SparsekError where a config is none of one causal language model."""
    _check_class(config, name)
    _check_one_model(config, name)
    _check_converted(config, name)
    _check_sizes(config, name)
    _check_outputs(config, name)
    _check_attention(config, name)
    check_one_rope(config)
    check_base(config)
    check_beside(config)
    check_original(config)
    _check_dtype(config, name)


def _check_class(config: dict[str, Any], name: str) -> None:
    architectures = config.get("architectures") or []
    if not all(isinstance(found, str) for found in architectures):
        raise UsageError(
            f"'{name}': architectures in config.json are no names",
            hint="fetch or save the model again",
        )
    causal = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))]
    seeing = [key for key in ("vision_config", "audio_config") if key in config]
    if (architectures and not causal) or (seeing and not causal):
        what = architectures[0] if architectures else f"model with a {seeing[0]}"
        hint = "name a model that generates text left to right (its class ends in ForCausalLM)"
        if seeing:
            what += f" (it also has a {seeing[0].removesuffix('_config')} tower)"
            hint = "save its language model on its own, or name the text-only version"
        raise UsageError(f"'{name}' is a {what}, not a causal language model", hint=hint)


def _check_one_model(config: dict[str, Any], name: str) -> None:
    """A family of plain text models has one set of sizes.

    transformers would build the model by the outer ones and ask the block within for what else it
    needs of its text part: its cache, and what generates.
    """
    family = str(config.get("model_type")).removeprefix("sparsek_")
    for key in _TEXT_PARTS:
        if family in TABLE and config.get(key) is not None:
            raise UsageError(
                f"'{name}': config.json holds a {key} within, as models of several parts do, and "
                f"model_type {family} is one text model",
                hint=f"take {key} out of config.json if the weights have the sizes around it, else "
                "save the language model on its own",
            )
    if family in TABLE:
        check_alone(config)


def _check_converted(config: dict[str, Any], name: str) -> None:
    """The type and the settings of a converted model come together."""
    ours, settings = str(config.get("model_type")).startswith("sparsek_"), config.get("sparsek")
    if ours != isinstance(settings, dict) or (settings is not None and not ours):
        raise UsageError(
            f"'{name}': config.json has model_type {config.get('model_type')} and sparsek settings "
            f"{json.dumps(settings)[:60]}: is it converted or not?",
            hint="convert the base again; its config.json and the converted one are different",
        )
    if ours:
        check_whole_settings(settings, f"'{name}'")


def _check_dtype(config: dict[str, Any], name: str) -> None:
    """Weights are loaded in the format that config.json names, whatever they are stored in."""
    for key in ("dtype", "torch_dtype"):
        found = config.get(key)
        if found is not None and found not in _DTYPES:  # `torch.bfloat16` fails in transformers
            raise UsageError(
                f"'{name}': {key} in config.json is {json.dumps(found)[:40]}, no number format of "
                "weights",
                hint=f"set it to that of the weights: {', '.join(_DTYPES[:3])}",
            )


def _check_sizes(config: dict[str, Any], name: str) -> None:
    for key in _SIZES:
        size = config.get(key)
        if type(size) is int and size <= 0:
            raise UsageError(
                f"'{name}': {key} in config.json is {size}, expected a positive whole number",
                hint="correct it: the weights were made with another; or fetch the model again",
            )
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise SparsekError(
            f"'{name}': config.json has pad_token_id {pad}, beyond its vocab_size of {rows}",
            hint="set pad_token_id in config.json to the eos token's id, or to null",
        )


def _check_outputs(config: dict[str, Any], name: str) -> None:
    """Settings of what a model returns, which are no matter of its weights."""
    if config.get("return_dict") is False:
        raise UsageError(
            f"'{name}': config.json has return_dict false, and outputs are read by their names",
            hint="take return_dict out of config.json: it changes nothing in the weights",
        )
    if config.get("output_attentions"):
        raise UsageError(
            f"'{name}': config.json has output_attentions true, and attention that is fast hands "
            "no weights out",
            hint="take output_attentions out of config.json: it changes nothing in the weights",
        )


def _check_attention(config: dict[str, Any], name: str) -> None:
    """transformers fetches a kernel that is called as a repository is, and runs its code."""
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if "/" in str(config.get(key)):
            raise UsageError(
                f"'{name}': config.json asks for attention from the hub "
                f"({json.dumps(config[key])[:80]}), whose code is not run",
                hint=f"take {key} out of config.json: it changes nothing in the weights",
            )
