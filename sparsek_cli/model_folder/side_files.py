"""The small files beside config.json."""

import json
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.shards import INDEX
from sparsek_cli.errors import UsageError
from sparsek_cli.model_folder.config_file import ONE_OF_THEM, UNMARKED, check_length
from sparsek_cli.output.contents import CALIBRATION, CONVERT_RECIPE, FINETUNE_RECIPE
from sparsek_cli.output.tokenizer_files import BESIDE as TOKENIZER_BESIDE
from sparsek_cli.plain_files import check_entries

_TEMPLATE = "chat_template.jinja"
# What is read of a checkpoint, by a verb or by transformers; other files may be what they like.
READ = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    INDEX,
    "*.safetensors",
    "tokenizer*.json",  # tokenizer.4.0.0.json, too
    *TOKENIZER_BESIDE,
    _TEMPLATE,
    CALIBRATION,
    CONVERT_RECIPE,
    FINETUNE_RECIPE,
)
# What goes with weights wherever they are written.
_BELONGING = ("generation_config.json", "LICENSE*", "NOTICE*")
_TEMPLATES = ("chat_templates", "additional_chat_templates")
_TOKENIZER_AGAIN = "copy the tokenizer's files of the base model into the folder again"
# What to do about each that is no JSON object.
_SIDE_FILES = {
    "generation_config.json": "fetch it again, or remove it: it only says how to generate",
    "tokenizer_config.json": _TOKENIZER_AGAIN,
    "special_tokens_map.json": _TOKENIZER_AGAIN,
    "added_tokens.json": _TOKENIZER_AGAIN,
}


def belonging_files(path: Path) -> list[Path]:
    """The files in the folder `path` that go with its weights: generation settings, licences."""
    found = {file for pattern in _BELONGING for file in path.glob(pattern) if file.is_file()}
    return sorted(found)


def check_special(path: Path) -> None:
    """Raises UsageError where what is called as a model's file is a pipe, say, gone or no text.

    It would pass for a file that is not there, and the model for one without it.
    """
    hint = "remove it if it is not the model's, else fetch the model again"
    check_entries(path, READ, hint=hint)
    for folder in _TEMPLATES:
        if (path / folder).is_dir():
            check_entries(path / folder, ("*.jinja",), hint=hint)
    named = (file for folder in _TEMPLATES for file in (path / folder).glob("*.jinja"))
    for file in (path / _TEMPLATE, *named):
        if file.is_file():
            _check_text(file)


def _check_text(file: Path) -> None:
    """What reads a template that is no text blames the tokenizer."""
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text",
            hint="save it as UTF-8, or remove it: it is a chat template",
        ) from error


def check_side_files(path: Path, config: dict[str, Any]) -> None:
    """Files beside config.json that hold one JSON object each.

    transformers would go on without a generation_config.json that is none, and without its end
    tokens; of the tokenizer's files, verbs that read no text would see nothing.
    """
    for name, remedy in _SIDE_FILES.items():
        file = path / name
        if not file.is_file():
            continue
        if name == "generation_config.json":
            check_length(file)
        try:
            found = json_text.parse(file.read_text(encoding="utf-8"))
        except json_text.GivenTwice as error:
            raise UsageError(f"{file}: {error}", hint=ONE_OF_THEM) from error
        except json_text.Marked as error:
            raise UsageError(f"{file} begins with a byte order mark", hint=UNMARKED) from error
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UsageError(f"{file} holds no JSON object", hint=remedy)
        if name == "generation_config.json":
            _check_ends(file, found, config.get("vocab_size"))
            _check_pad(file, found, config.get("vocab_size"))
    if not (path / "generation_config.json").is_file():  # those of config.json count then
        _check_ends(path / "config.json", config, config.get("vocab_size"))


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


def _check_pad(file: Path, found: dict[str, Any], rows: Any) -> None:
    """Of texts that are written together those that end are padded, and the model reads that."""
    pad = found.get("pad_token_id")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        raise UsageError(
            f"{file}: pad_token_id is {pad}, and the model has tokens 0 to {rows - 1}",
            hint="write the number of the end token there, or take it out",
        )
