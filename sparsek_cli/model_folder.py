"""What lies at the path that a user calls a model, told from names and headers alone.

Every verb's MODEL passes here (hub.resolve): what can be read goes on, anything else is refused in
one line that says what it is and what to do. Tensors are not loaded.
"""

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from sparsek_cli import quantised
from sparsek_cli.conversion import json_text
from sparsek_cli.conversion.checks import check_layers, check_rows
from sparsek_cli.conversion.shards import INDEX, SINGLE, Shard, read_shards
from sparsek_cli.conversion.weights_beside import PICKLES, gguf_files, left_out
from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.families import TABLE
from sparsek_cli.output.contents import SCORERS

_LOG = logging.getLogger("sparsek_cli")
_SAVE = "from_pretrained(...).save_pretrained(FOLDER)"
_MERGE = (
    "merge it: PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT), "
    "the tokenizer too, then name OUT"
)
_ONE_OF_THEM = "keep the one that is meant, or fetch the file again"
_TOKENIZER_AGAIN = "copy the tokenizer's files of the base model into the folder again"
# Beside config.json, and what to do about each that is no JSON object.
_SIDE_FILES = {
    "generation_config.json": "fetch it again, or remove it: it only says how to generate",
    "tokenizer_config.json": _TOKENIZER_AGAIN,
    "special_tokens_map.json": _TOKENIZER_AGAIN,
    "added_tokens.json": _TOKENIZER_AGAIN,
}
_LONGEST_CONFIG = 4 << 20  # bytes
# Where transformers looks for the part of a model that writes text (`get_text_config`).
_TEXT_PARTS = ("text_config", "decoder", "generator", "text_encoder")
_DTYPES = ("bfloat16", "float16", "float32", "float64", "float", "half", "double", "auto")


def file_error(file: Path) -> UsageError:
    """A single file is no model that can be named."""
    suffix = file.suffix.lower()
    if suffix == ".gguf" or _is_gguf(file):
        return UsageError(
            f"'{file}' is a GGUF file, which only convert reads",
            hint=_unpack(file),
        )
    if suffix in PICKLES:
        return UsageError(
            f"'{file}' is a file of pickled weights, not a checkpoint folder",
            hint=f"pickles can run code and are not read: {_SAVE} writes safetensors",
        )
    if suffix == ".safetensors" and (error := _scorers_error(file, str(file))):
        return error
    what = "safetensors file" if suffix == ".safetensors" else "file"
    return UsageError(
        f"'{file}' is a {what}, not a checkpoint folder",
        hint=f"name its folder, '{file.parent}', with config.json and the tokenizer beside it",
    )


def check(path: Path, name: str) -> dict[str, Any]:
    """config.json of a folder that holds a causal language model in plain safetensors.

    Weights beside those that are read are named in a warning.

    Args:
        path: the folder.
        name: what to call it.

    Raises:
        UsageError: it is something else.
        SparsekError: it is one, and damaged.
    """
    if not (path / "config.json").is_file():
        raise _no_config(path)
    config = read_config(path)
    _check_class(config, name)
    _check_one_model(config, name)
    _check_converted(config, name)
    _check_side_files(path, config)
    if (path / "adapter_config.json").is_file():
        raise UsageError(
            f"'{name}' holds a PEFT adapter beside a base model; only one of them would count",
            hint=f"{_MERGE}; or move adapter_config.json and adapter_model.* away",
        )
    _check_weights(path, name)
    shards = read_shards(path)
    quantised.check(config, shards, name, _method_apart(path))
    _check_shards(shards, name)
    check_layers(shards, config, name)
    check_rows(shards, config)
    _check_sizes(config, name)
    _check_dtype(config, name)
    if others := left_out(path, (shard.path for shard in shards)):
        _LOG.warning("%s", others)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UsageError: there is none, or it is no JSON object.
    """
    file = path / "config.json"
    again = "fetch or save the model again"
    _check_length(file)
    try:
        config = json_text.parse(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise _no_config(path) from error
    except json_text.GivenTwice as error:
        raise UsageError(f"{file}: {error}", hint=_ONE_OF_THEM) from error
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


def _check_length(file: Path) -> None:
    """Libraries copy configs again and again: a million keys are minutes."""
    if file.is_file() and file.stat().st_size > _LONGEST_CONFIG:
        raise UsageError(
            f"{file} is larger than any model's ({_LONGEST_CONFIG >> 20} MiB)",
            hint="fetch or save the model again",
        )


def _no_config(path: Path) -> UsageError:
    """What a folder without config.json is instead."""
    no = f"'{path}' is no checkpoint: it has no config.json"

    def holds(*patterns: str) -> bool:
        return any(any(path.glob(pattern)) for pattern in patterns)

    if holds("adapter_config.json"):
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) and base else ""
        return UsageError(f"'{path}' is a PEFT adapter{of}, not a whole model", hint=_MERGE)
    if error := _scorers_error(path / SCORERS, str(path)):
        return error
    if packed := gguf_files(path):
        return UsageError(
            f"'{path}' holds GGUF files, of which convert reads one at a time",
            hint=_unpack(packed[0]),
        )
    if holds("recipe.yaml") and path.name.endswith(".part"):
        return UsageError(
            f"'{path}' is an unfinished run of finetune",
            hint="finish it: the same finetune command with --resume",
        )
    if holds("run.json", "results.json"):
        return UsageError(
            f"'{path}' holds results of evaluate, not a model", hint="name the model's own folder"
        )
    if holds("params.json", "consolidated*"):
        return UsageError(
            f"'{path}' holds weights in their makers' own format, without a config.json",
            hint="name the same model's Hugging Face version (its folder has a config.json)",
        )
    if holds("model_index.json"):
        return UsageError(
            f"'{path}' is a diffusion pipeline, not a language model",
            hint="name a model that generates text left to right",
        )
    below = sorted(p.parent for p in path.glob("*/config.json"))
    below += sorted(p.parent for p in path.glob("snapshots/*/config.json"))
    if below:
        return UsageError(no, hint=f"did you mean '{below[0]}'?")
    if holds(*(f"*{suffix}" for suffix in (*PICKLES, ".safetensors"))):
        return UsageError(
            no, hint="the weights are there: fetch config.json and the tokenizer of the same model"
        )
    if not any(path.iterdir()):
        return UsageError(f"{no}; it is empty", hint="name the folder that holds the model")
    return UsageError(no, hint=f"name a folder with config.json and *.safetensors ({_SAVE})")


def _unpack(file: Path) -> str:
    return f"`sparsek convert {quote(str(file))} OUT` unpacks it; then name OUT"


def _scorers_error(file: Path, name: str) -> UsageError | None:
    """The refusal of scorers alone; None where the file holds none."""
    if not file.is_file():
        return None
    from sparsek_cli.sharing.scorers_file import header

    found = header(file)
    if found is None:
        return None
    base = found.base["name"]
    return UsageError(
        f"'{name}' holds scorers alone, made for {base}",
        hint=f"put them onto it: `sparsek merge {quote(base)} {quote(name)} OUT`, then name OUT",
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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


def _check_converted(config: dict[str, Any], name: str) -> None:
    """The type and the settings of a converted model come together."""
    ours, settings = str(config.get("model_type")).startswith("sparsek_"), config.get("sparsek")
    if ours != isinstance(settings, dict) or (settings is not None and not ours):
        raise UsageError(
            f"'{name}': config.json has model_type {config.get('model_type')} and sparsek settings "
            f"{json.dumps(settings)[:60]}: is it converted or not?",
            hint="convert the base again; its config.json and the converted one are different",
        )


def _check_side_files(path: Path, config: dict[str, Any]) -> None:
    """Files beside config.json that hold one JSON object each.

    transformers would go on without a generation_config.json that is none, and without its end
    tokens; of the tokenizer's files, verbs that read no text would see nothing.
    """
    for name, remedy in _SIDE_FILES.items():
        file = path / name
        if not file.is_file():
            continue
        if name == "generation_config.json":
            _check_length(file)
        try:
            found = json_text.parse(file.read_text(encoding="utf-8"))
        except json_text.GivenTwice as error:
            raise UsageError(f"{file}: {error}", hint=_ONE_OF_THEM) from error
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UsageError(f"{file} holds no JSON object", hint=remedy)
        if name == "generation_config.json":
            _check_ends(file, found, config.get("vocab_size"))


def _check_ends(file: Path, found: dict[str, Any], rows: Any) -> None:
    """A text whose end is no token of the model's never ends, and nobody is told."""
    ends = found.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int | None) for end in ends):
        why = "no token's number"
    elif isinstance(rows, int) and not all(end is None or 0 <= end < rows for end in ends):
        why = f"and the model has tokens 0 to {rows - 1}"
    else:
        return
    raise UsageError(
        f"{file}: eos_token_id is {json.dumps(found['eos_token_id'])[:40]}, {why}",
        hint="write the number of the token there, or a list of numbers",
    )


def _method_apart(path: Path) -> str | None:
    """The method of quantisation that an older file beside config.json stands for."""
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / file).is_file():
            return method
    return None


def _check_weights(path: Path, name: str) -> None:
    """Exactly one set of weights, where transformers looks for it."""
    for file in sorted(path.glob("*.safetensors")):
        if file.is_symlink() and not file.exists():
            raise UsageError(
                f"'{file}' is a link to a file that is gone", hint="fetch the model again"
            )
    single, index = (path / SINGLE).is_file(), (path / INDEX).is_file()
    if single and index and set(_json(path / INDEX).get("weight_map", {}).values()) != {SINGLE}:
        raise UsageError(
            f"'{name}' holds both {SINGLE} and {INDEX}: it is not clear which weights count",
            hint="move one of them away",
        )
    if single or index:
        return
    others = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    pickled = any(p.suffix in PICKLES for p in path.iterdir())
    if others:
        raise UsageError(
            f"'{name}' holds {others[0]}, but neither {SINGLE} nor {INDEX}",
            hint=f"name a whole file {SINGLE}, or fetch the missing {INDEX}",
        )
    if packed := gguf_files(path):
        raise UsageError(
            f"'{name}' holds no .safetensors weights, but {packed[0].name}, which only convert "
            "reads",
            hint=_unpack(packed[0]),
        )
    raise UsageError(
        f"'{name}' holds no .safetensors weights"
        + ("; pickled weights (.bin, .pt) are refused: they can run code" if pickled else ""),
        hint=f"save it again from transformers: {_SAVE} writes safetensors"
        if pickled
        else "fetch the model again: its weights are missing",
    )


def _check_shards(shards: Iterable[Shard], name: str) -> None:
    """No tensor is an adapter's."""
    for shard in shards:
        for tensor in shard.tensors:
            if ".lora_A." in tensor or ".lora_B." in tensor:
                raise UsageError(
                    f"'{name}' holds adapter weights ({tensor}) among its own", hint=_MERGE
                )


def _check_dtype(config: dict[str, Any], name: str) -> None:
    """Weights are loaded in the format that config.json names, whatever they are stored in."""
    for key in ("dtype", "torch_dtype"):
        found = config.get(key)
        if found is not None and str(found).removeprefix("torch.") not in _DTYPES:
            raise UsageError(
                f"'{name}': {key} in config.json is {json.dumps(found)[:40]}, no number format of "
                "weights",
                hint=f"set it to that of the weights: {', '.join(_DTYPES[:3])}",
            )


def _check_sizes(config: dict[str, Any], name: str) -> None:
    if config.get("return_dict") is False:
        raise UsageError(
            f"'{name}': config.json has return_dict false, and outputs are read by their names",
            hint="take return_dict out of config.json: it changes nothing in the weights",
        )
    pad, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise SparsekError(
            f"'{name}': config.json has pad_token_id {pad}, beyond its vocab_size of {rows}",
            hint="set pad_token_id in config.json to the eos token's id, or to null",
        )


def _is_gguf(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError:
        return False
