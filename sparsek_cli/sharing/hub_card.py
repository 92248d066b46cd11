"""The model card of what is pushed: whose weights, which licence, what was measured."""

import re
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from sparsek_cli import hub
from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.policies.registry import DENSE
from sparsek_cli.evaluation.report.rows import rows
from sparsek_cli.evaluation.report.table import markdown
from sparsek_cli.evaluation.result_files import load_results
from sparsek_cli.output.contents import CONVERT_RECIPE, FINETUNE_RECIPE
from sparsek_cli.plain_files import utf8_text

_LICENCE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
# Bases of bases that are followed: tuned of tuned of converted.
_DEEPEST = 8


def check_licence(licence: str | None) -> None:
    """Raises UsageError for what can be no name of a licence on the hub, which refuses the card."""
    if licence is None or _LICENCE.fullmatch(licence):
        return
    if not licence.strip():
        raise UsageError(
            "the licence is empty",
            hint="name it as the hub does (apache-2.0, mit, other), or leave it out for the "
            "base's; in a shell, the variable may not be set",
        )
    near = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-.")
    near = f"did you mean '{near}'? " if _LICENCE.fullmatch(near) else ""
    raise UsageError(
        f"{licence[:60]!r} is no name of a licence on the hub",
        hint=f"{near}they are words in small letters and hyphens: apache-2.0, mit, other",
    )


def card(
    folder: Path, *, licence: str | None = None, evaluation: Path | None = None
) -> tuple[str, dict[str, Any]]:
    """README.md as it is pushed, and its front matter.

    Args:
        folder: what is pushed; its own README.md is the text.
        licence: the hub's name of it; None: the base's, where that is known.
        evaluation: a result folder of `sparsek evaluate`, of this very model.

    Raises:
        UsageError: the results are of another model, or unfinished.
    """
    file = folder / "README.md"
    own, text = split(utf8_text(file) if file.is_file() else "")
    base, known = _origin(folder)
    matter = {
        "license": licence or own.get("license") or known,
        "base_model": own.get("base_model") or base,
        **{key: value for key, value in own.items() if key not in ("license", "base_model")},
    }
    tags = own.get("tags") if isinstance(own.get("tags"), list) else []
    matter["tags"] = sorted({*map(str, tags), "sparsek"})
    if evaluation is not None:
        report = _report(evaluation, folder)
        text = f"{text.rstrip()}\n\n{markdown(report)}"
        matter["model-index"] = [_index(folder.name, report)]
    matter = {key: value for key, value in matter.items() if value is not None}
    head = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{text.lstrip()}", matter


def split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and the rest."""
    if text.startswith("---\n") and (end := text.find("\n---", 4)) >= 0:
        try:
            matter = yaml.safe_load(text[4:end])
        except (yaml.YAMLError, ValueError, RecursionError):
            matter = None
        if isinstance(matter, dict):
            return matter, text[end + 4 :].lstrip("\n")
    return {}, text


def _origin(folder: Path) -> tuple[str | None, str | None]:
    """The hub id and the licence of the base, as far as files on this machine tell."""
    for _ in range(_DEEPEST):
        named = _named_base(folder)
        place = None if named is None else Path(named).expanduser()
        if place is None:
            break
        if not place.is_dir():
            if hub.is_hub_id(named):  # a folder that is gone may have been owner/model--q3
                return named, _matter(_cached_card(named)).get("license")
            break
        found = _matter(place / "README.md")
        # A base's own card names what it was made from; one of ours names the base.
        if _named_base(place) is None:
            return None, found.get("license")
        if found.get("license") or found.get("base_model"):
            return found.get("base_model"), found.get("license")
        folder = place
    return None, None


def _named_base(folder: Path) -> str | None:
    """What the newest recipe in a folder, or PEFT's config, was made from."""
    for name, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        (FINETUNE_RECIPE, "model"),
        (CONVERT_RECIPE, "model"),
    ):
        if (folder / name).is_file():
            try:
                found = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError, RecursionError):
                continue
            model = found.get(key) if isinstance(found, dict) else None
            if isinstance(model, str):
                from sparsek_cli.model_folder.short_names import SHORT_NAMES

                return SHORT_NAMES[model].hub_id if model in SHORT_NAMES else model
    return None


def _cached_card(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "README.md")
    return Path(found) if isinstance(found, str) else None


def _matter(file: Path | None) -> dict[str, Any]:
    if file is None or not file.is_file():
        return {}
    return split(file.read_text(encoding="utf-8", errors="replace"))[0]


def _report(evaluation: Path, folder: Path) -> dict[str, Any]:
    report = load_results(evaluation)
    if not report["complete"]:
        raise UsageError(
            f"the results in '{evaluation}' are unfinished", hint="finish them: evaluate --resume"
        )
    place = Path(report["model"]["path"])
    if place.resolve() != folder.resolve():
        raise UsageError(
            f"the results in '{evaluation}' are of {place}, not of '{folder}'",
            hint=f"measure this one: `sparsek evaluate {quote(str(folder))}`",
        )
    return report


def _index(name: str, report: dict[str, Any]) -> dict[str, Any]:
    """What the hub shows beside the card: the model's own scores, dense's in the name beside it."""
    results = []
    for row in rows(report):
        cell, dense = row["cells"].get("sparsek"), row["cells"].get(DENSE)
        if cell is None:
            continue
        beside = "" if dense is None else f" (dense: {dense['value']:.4g})"
        length = "" if row["length"] is None else f", {row['length']} tokens"
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": row["task"], "name": f"{row['task']}{length}"},
                "metrics": [
                    {
                        "type": row["metric"],
                        "value": cell["value"],
                        "name": f"{row['metric']}{beside}",
                    }
                ],
            }
        )
    return {"name": name, "results": results}
