"""JSON-like values as text, and as a digest of it."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """Twelve hex digits that change with any part of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_json(value: Any) -> str:
    """Text of a JSON-like value for a file."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
