"""JSON files: read so that each says one thing, written so that people can read them.

A key given twice is refused, where Python would take the last.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class GivenTwice(ValueError):
    """A key stands twice in one object; which of its values counts is anybody's guess."""


class Marked(ValueError):
    """It begins with a byte order mark, which transformers takes for no JSON."""


def parse(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON; as `GivenTwice`, it names a key twice; as `Marked`, others read
            it.
        RecursionError: it is nested too deeply.
    """
    if text[:1] == "\ufeff":
        raise Marked("it begins with a byte order mark")
    return json.loads(text, object_pairs_hook=_object)


def write(file: Path, data: Any) -> None:
    """Puts `data` at `file`, indented, with letters of any script as they are."""
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise GivenTwice(f"key '{twice}' is given twice")
    return found


def floats(tree: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Floats by dotted key; those in lists are left out, of which some are endless by right.

    Mamba's `time_step_limit` is [0.0, Infinity].
    """
    left = [("", tree)]
    while left:
        before, fields = left.pop()
        for key, value in fields.items():
            if isinstance(value, float):
                yield f"{before}{key}", value
            elif isinstance(value, dict):
                left.append((f"{before}{key}.", value))
