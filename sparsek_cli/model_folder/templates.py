"""Chat templates that a folder gives more than once: which one counts, in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files.weights_beside import listed

# As transformers looks for them: its own files take the place of what tokenizer_config.json says.
_FILES = "chat_template.jinja", "additional_chat_templates"
_CONFIG = "tokenizer_config.json"
# Of processors, and of other programs; transformers reads neither for a tokenizer.
_OTHERS = "chat_template.json", "chat_templates"
_DEFAULT = "default"

Templates = dict[str, str]  # texts by name


def told_apart(folder: Path) -> str | None:
    """Which templates count, where others beside them differ or are not read; None otherwise."""
    own = _in_files(folder)
    found = {
        "chat_template.jinja" if _DEFAULT in own else f"{_FILES[1]}/": own,
        _CONFIG: _in_json(folder / _CONFIG),
        _OTHERS[0]: _in_json(folder / _OTHERS[0]),
        f"{_OTHERS[1]}/": _as_default(_in_folder(folder / _OTHERS[1])),
    }
    found = {place: templates for place, templates in found.items() if templates}
    read = next((place for place in found if not place.startswith(_OTHERS)), None)
    taken = found.get(read, {})
    others = [p for p, templates in found.items() if p != read and not _within(templates, taken)]
    if not others:
        return None
    counts = f"that of {read} counts" if read else "none is read"
    return f"of the chat templates in '{folder}' {counts}, and what {listed(others)} says does not"


def _within(some: Templates, all_of: Templates) -> bool:
    return all(all_of.get(name) == text for name, text in some.items())


def _in_files(folder: Path) -> Templates:
    named = _in_folder(folder / _FILES[1])
    single = folder / _FILES[0]
    return {**({_DEFAULT: _text(single)} if single.is_file() else {}), **named}


def _in_folder(folder: Path) -> Templates:
    files = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
    return {f.stem: _text(f) for f in files}


def _as_default(templates: Templates) -> Templates:
    return {_DEFAULT if n == "chat_template" else n: text for n, text in templates.items()}


def _in_json(file: Path) -> Templates:
    """Of a `chat_template` key: one text, a list of named ones, or texts by name."""
    try:
        found: Any = json.loads(_text(file))
    except (ValueError, RecursionError):
        return {}
    found = found.get("chat_template") if isinstance(found, Mapping) else None
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
    named = found if isinstance(found, Mapping) else {_DEFAULT: found}
    return {str(k): v.removesuffix("\n") for k, v in named.items() if isinstance(v, str)}


def _text(file: Path) -> str:
    """Without the last line's end, which templates do not write; nothing of no file."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
    except OSError:
        return ""
