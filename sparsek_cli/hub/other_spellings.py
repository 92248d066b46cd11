"""Names on the hub as its pages and other programs write them, and what to write here."""

import os
import re
from shlex import quote

from sparsek_cli.checkpoint_files.weights_beside import PICKLES

_GGUF = ".gguf"
_FILES = (_GGUF, ".safetensors", ".json", *PICKLES)
_HOST = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://", re.IGNORECASE)
# owner/name, then perhaps a revision or a quantisation, and a page of the hub or a file below.
_REPOSITORY = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<at>[^/]+)|:(?P<tag>[\w.-]+))?"
    r"(?:/(?:tree|blob|resolve|raw)/(?P<revision>[^/]+))?(?:/(?P<file>[^?#]*))?(?:[?#].*)?",
    re.ASCII,
)


def instead(name: str, kind: str = "models") -> str:
    """What to write in place of a name that seems to be the hub's; empty where it is a path.

    Args:
        kind: what is looked for, `models` or `datasets`.
    """
    host = _HOST.match(name)
    rest = name[host.end() :] if host else name
    if host:
        rest = rest.removeprefix(f"{kind}/")
    found = _REPOSITORY.fullmatch(rest)
    if found is None or (not host and _is_path(rest, found)):
        return ""
    hub_id, file = found["id"], found["file"] or ""
    packed = file if file.lower().endswith(_GGUF) else None
    if packed or found["tag"]:
        asked = quote(packed) if packed else "--include " + quote(f"*{found['tag']}*{_GGUF}")
        return (
            f"of a GGUF file on the hub: `hf download {hub_id} {asked} --local-dir DIR`, then name "
            "the file"
        )
    revision = found["at"] or found["revision"]
    at = f" --revision {quote(revision)}" if revision not in (None, "main") else ""
    return f"on the hub it is {hub_id}{at}"


def _is_path(rest: str, found: re.Match[str]) -> bool:
    """Whether a name without the hub's address is rather a path here."""
    if rest == found["id"] or os.path.lexists(rest.split("/")[0]):
        return True
    file = (found["file"] or "").lower()
    return bool(file) and not found["revision"] and not file.endswith(_FILES)
