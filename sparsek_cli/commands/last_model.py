"""Which model a verb means when none is named: the last one made here, else the bundled one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from sparsek_cli.disk import write_atomically


def state_file() -> Path:
    """The one file of state: $SPARSEK_STATE_DIR, else the XDG state directory."""
    own = os.environ.get("SPARSEK_STATE_DIR")
    if own:
        return Path(own) / "last-model.json"
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sparsek" / "last-model.json"


def remember(path: str | os.PathLike) -> None:
    """Notes a finished conversion or fine-tuning; a home that cannot be written is no failure."""
    file = state_file()
    try:
        write_atomically(file, json.dumps({"path": str(Path(path).resolve())}))
    except OSError:
        return


def recall() -> Path | None:
    """The folder last remembered, or None when there is none or it is gone."""
    if not state_file().is_file():  # a pipe there would be waited for
        return None
    try:
        path = Path(json.loads(state_file().read_text(encoding="utf-8"))["path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return path if (path / "config.json").is_file() else None


def name_or_default(name: str | None, *, say: Callable[[str], None]) -> str:
    """`name`; without one, the folder of the last model made here, else the bundled one's name.

    Args:
        say: receives the one line that tells which model was chosen for the user.
    """
    if name is not None:
        return name
    last = recall()
    if last is not None:
        say(f"model: {last} (the last one made here)")
        return str(last)
    say(
        "model: tiny (bundled: it recalls facts of a text and follows no instructions; name a "
        "model, or run `sparsek convert` for another)"
    )
    return "tiny"
