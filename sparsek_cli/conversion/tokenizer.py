"""The tokenizer of a folder that is written: the base's, or one that was named, whoever loads it.

Its files come along as they are, but AutoTokenizer also looks at the model's type, and a program
that has not imported this package does not know ours. So the class that the base gets is written
into tokenizer_config.json, and what then loads is compared with the base's.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.conversion import json_text
from sparsek_cli.dialogue.template_steps import check_template
from sparsek_cli.errors import SparsekError, first_line
from sparsek_cli.loading import check_tokenizer
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    from sparsek_cli.conversion.planned import Plan

CONFIG = "tokenizer_config.json"
# Everything that transformers makes a tokenizer of.
FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.jinja",
    "chat_template.json",  # and chat_templates/: not read by transformers, but by others
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


def settle(plan: Plan, folder: Path) -> str:
    """Makes the tokenizer in `folder`, which holds the files of the plan's, load as that.

    Args:
        folder: the staged checkpoint, config.json included.

    Returns:
        What was found, in words.

    Raises:
        SparsekError: the base's does not load or fit its embedding, or the two still differ.
    """
    if not files_in(folder):
        return "none beside the weights"
    with quiet_transformers():
        try:
            base = _load_base(plan)
            facts = _facts(base)
        except Exception as error:
            # Every tokenizer library fails in its own way; code of its own is not run either.
            first = first_line(error)
            raise SparsekError(
                f"the tokenizer of {plan.tokenizer.name} does not load: {first}",
                hint="mend its files, name another one with --tokenizer, or take them all out of "
                "the folder: without any, --calibrate none converts the weights alone",
            ) from error
        check_template(base, plan.tokenizer.name)
        if not _make_load_as(base, facts, folder):
            raise SparsekError(
                f"the tokenizer of {plan.tokenizer.name} would give other ids after converting",
                hint="load it with transformers, save it with save_pretrained into the base's "
                "folder, and convert that",
            )
    if rows := plan.config.get("vocab_size"):
        check_tokenizer(base, rows, plan.tokenizer.name)  # last: it may change the padding token
    of = "the base" if plan.own_tokenizer else plan.tokenizer.title
    return f"{type(base).__name__}, as of {of}"


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
            return _loads_as(_facts(tokenizer), folder)
        copy_missing(files_in(source), source, folder)
        return _make_load_as(tokenizer, _facts(tokenizer), folder)


def files_in(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`, by name."""
    found = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def copy_missing(files: Iterable[Path], source: Path, folder: Path) -> None:
    """Copies files below `source` to the same places below `folder`, where nothing is yet."""
    for file in files:
        target = folder / file.relative_to(source)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file.resolve(), target)


def _make_load_as(tokenizer: Any, facts: list[Any], folder: Path) -> bool:
    """Names the class; writes the files anew where they alone load as something else."""
    _name_class(folder / CONFIG, tokenizer)
    if _loads_as(facts, folder):
        return True
    # Settings that libraries apply to the base's type alone become part of the files.
    tokenizer.save_pretrained(folder)
    return _loads_as(facts, folder)


def _load_base(plan: Plan) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import (
        MODEL_IDS_TO_TOKENIZERS_BACKEND,
        TokenizersBackend,
    )

    if plan.config.get("model_type") != _model_type(plan.tokenizer.path):
        import sparsek_cli.models  # noqa: F401  (the base is a converted model, to convert --again)
    # Some models get another class by their name on the hub.
    source = plan.tokenizer.source.lower()
    named = any(fnmatch.fnmatch(source, pattern) for pattern in MODEL_IDS_TO_TOKENIZERS_BACKEND)
    load: Callable[..., Any] = TokenizersBackend if named else AutoTokenizer
    return load.from_pretrained(plan.tokenizer.path, trust_remote_code=False)


def _model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.exists() else None


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
    return _facts(other) == facts


def _facts(tokenizer: Any) -> list[Any]:
    return [
        tokenizer.get_vocab(),
        tokenizer.special_tokens_map,
        sorted(tokenizer.all_special_ids),
        tokenizer.chat_template,
        (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length),
        [tokenizer(text).input_ids for text in PROBES],
        [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES],
    ]
