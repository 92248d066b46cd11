"""In what a run differs from the one whose results lie in its folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsek_cli.evaluation.json_values import to_json
from sparsek_cli.evaluation.result_files import RESULTS

MOST = 3  # differences in a message
_FILES = "the model's files, its config.json, the text or the data have changed since"


def differences(folder: Path, settings: dict[str, Any]) -> str:
    """What to call the results in `folder`: of which other settings.

    Files count by their size and time of change, so one that was written again is another.

    Args:
        folder: holds results; what results.json says of their run is compared.
        settings: what `settings_of` gives for the new run.
    """
    try:
        before = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        found = [*_differ(before, json.loads(to_json(settings)))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "other settings"
    if before.get("meaning") != settings["meaning"]:
        return "another version of sparsek, which measured something else under these names"
    if not found:
        return f"other files: {_FILES}"
    more = f", and {len(found) - MOST} more" if len(found) > MOST else ""
    return f"other settings: {', '.join(found[:MOST])}{more}"


def _differ(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Each as "limit 3 (was 2)"."""
    was, asked = before["recipe"], now["recipe"]
    pairs = {"model": (before["model"]["path"], now["model"])}
    pairs |= {key: (was.get(key), value) for key, value in asked.items()}
    pairs["max_length"] = before["max_length"], now["max_length"]
    pairs["dtype"] = before["environment"]["dtype"], now["dtype"]
    versions = before["environment"]["versions"]
    pairs |= {f"{name}'s version": (versions.get(name), v) for name, v in now["versions"].items()}
    for name, (old, new) in pairs.items():
        if old != new:
            yield f"{name} {_shown(new)} (was {_shown(old)})"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
