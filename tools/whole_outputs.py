"""Whether what a run left at OUT is whole, and what it comes to: for kill_runs.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

# What is of the moment: never compared.
_MOMENTARY = ("seconds", "tokens_per_second", "started", "finished", "date", "time", "version")


def digest_of_model(out: Path) -> str:
    """Weights, config and tokenizer."""
    found = hashlib.sha256()
    for file in sorted(out.iterdir()):
        if file.name.endswith((".safetensors", ".jinja")) or file.name in (
            "config.json", "tokenizer.json", "model.safetensors.index.json",
        ):  # fmt: skip
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def digest_of_results(out: Path) -> str:
    """Every number of every unit, but for times; "none" where there is no report."""
    if not (out / "results.json").is_file():
        return "none"
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(_lasting(report["units"])).encode()).hexdigest()


def _lasting(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _lasting(inner) for key, inner in sorted(value.items())
            if not any(word in key for word in _MOMENTARY)
        }  # fmt: skip
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def whole_model(out: Path, known: set[str]) -> bool:
    """OUT is absent, or one of the models that uninterrupted runs give."""
    return not out.exists() or digest_of_model(out) in known


def whole_results(out: Path, known: set[str]) -> bool:
    """Every JSON file in OUT and in OUT.part is whole, and each report is what it says it is."""
    return all(_whole_report(folder, known) for folder in (out, part_of(out)))


def part_of(out: Path) -> Path:
    """Where a run keeps what will be called OUT."""
    return out.with_name(f"{out.name}.part")


def _whole_report(folder: Path, known: set[str]) -> bool:
    """A report that is complete is one that was known; any other is of units that lie beside it."""
    try:
        read = {file: json.loads(file.read_bytes()) for file in folder.rglob("*.json")}
    except ValueError:
        return False
    report = read.get(folder / "results.json")
    if report is None:
        return True
    if report.get("complete", True):
        return digest_of_results(folder) in known
    return all(unit in read.values() for unit in report["units"])
