"""A tokenizer's files in a folder that is written, and whether they load as it elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.silence import quiet_transformers

CONFIG = "tokenizer_config.json"
# Files of a tokenizer that are not called after it.
BESIDE = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "chat_template.json",  # and chat_templates/: not read by transformers, but by others
)
# Everything that transformers makes a tokenizer of.
FILES = (
    "tokenizer.*",  # .json, .model, .model.v3; not whatever a user calls tokenizer-something
    "tokenizer*.json",
    *BESIDE,
    "*.jinja",
    "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja",
)
# Leading and double spaces, marks of chats, digits, contractions, line ends, other scripts.
PROBES = (
    "Hello there,  don't count 12345 crates.",
    "ok</s> [INST] More [/INST]",
    "<|im_start|>user\nhi<|im_end|>",
    "    return x\n\n\tZürich 東京 🙂",
)


def bring(tokenizer: Any, folder: Path) -> bool:
    """Writes a tokenizer in use into `folder`, beside config.json, from the files it came from.

    What transformers would save is not always what it loaded: saved again, a LlamaTokenizer of
    the old kind gives other ids.

    Returns:
        Whether what loads from `folder` is this tokenizer.
    """
    source = Path(tokenizer.name_or_path or folder)
    with quiet_transformers():
        if not source.is_dir():
            tokenizer.save_pretrained(folder)
            return _loads_as(facts_of(tokenizer), folder)
        copy_missing(files_in(source), source, folder)
        return make_load_as(tokenizer, facts_of(tokenizer), folder)


def files_in(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`, by name."""
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer, of which templates of chats alone are none."""
    templates = (".jinja", "chat_template.json")
    return any(not file.name.endswith(templates) for file in files_in(folder))


def copy_missing(files: Iterable[Path], source: Path, folder: Path) -> None:
    """Copies files below `source` to the same places below `folder`, where nothing is yet."""
    for file in files:
        target = folder / file.relative_to(source)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file.resolve(), target)


def make_load_as(tokenizer: Any, facts: list[Any], folder: Path) -> bool:
    """Names the class; writes the files anew where they alone load as something else."""
    _name_class(folder / CONFIG, tokenizer)
    if _loads_as(facts, folder):
        return True
    # Settings that libraries apply to the base's type alone become part of the files.
    tokenizer.save_pretrained(folder)
    return _loads_as(facts, folder)


def _name_class(file: Path, base: Any) -> None:
    """Writes the class's name where another, or none, stands."""
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    name = type(base).__name__
    if config.get("tokenizer_class") != name:
        config["tokenizer_class"] = name
        json_text.write(file, config)


def _loads_as(facts: list[Any], folder: Path) -> bool:
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        return False  # then the folder gets files that do load
    return facts_of(other) == facts


def facts_of(tokenizer: Any) -> list[Any]:
    return [
        tokenizer.get_vocab(),
        tokenizer.special_tokens_map,
        sorted(tokenizer.all_special_ids),
        tokenizer.chat_template,
        (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
        [tokenizer(text).input_ids for text in PROBES],
        [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES],
    ]
