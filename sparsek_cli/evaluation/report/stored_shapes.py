"""Whether what is read from a result folder is what a run writes there."""

from typing import Any

_UNIT = {"task": str, "policy": str, "primary": str, "metrics": dict, "proof": dict}
_METRIC = {"value": int | float, "higher_is_better": bool, "samples": int}
_PROOF = {
    "backends": dict, "sparse_calls": int, "kv_pairs": int, "kept_share": int | float,
    "kv_bytes": int, "kv_tokens": int, "truncated_prompts": int, "prompts": int,
}  # fmt: skip
_REPORT = {
    "model": dict, "recipe": dict, "environment": dict, "policies": list, "units": list,
    "absent": list, "complete": bool,
}  # fmt: skip
_RECIPE = {
    "truncate": str,
    "tasks": list | None,
    "budgets": list | None,
    "yarn": int | float | None,
}
_ENVIRONMENT = {"versions": dict, "dtype": str, "device": str}
_ABSENT = {"task": str, "reason": str, "remedy": str}
_MODEL = {"name": str, "path": str, "type": str}
_BLOCK = {"topk": int | list, "window": int, "sinks": int}
_SAMPLE = {"doc_id": int | str, "prompt_hash": str, "filter": str, "scores": dict}


def is_unit(found: Any) -> bool:
    """Whether it is one result: a task and a policy, and numbers by name."""
    return (
        _has(found, _UNIT)
        and "length" in found
        and isinstance(found["length"], int | None)
        and found["primary"] in found["metrics"]
        and _has(found["proof"], _PROOF)
        and all(_is_metric(metric) for metric in found["metrics"].values())
    )


def is_report(found: Any) -> bool:
    """Whether it is results.json."""
    return (
        _has(found, _REPORT)
        and _has(found["model"], _MODEL)
        and _has(found["recipe"], _RECIPE)
        and "sparsek" in found["model"]
        and _is_block(found["model"]["sparsek"])
        and all(isinstance(task, str) for task in found["recipe"].get("tasks") or ())
        and all(isinstance(policy, str) for policy in found["policies"])
        and _has(found["environment"], _ENVIRONMENT)
        and all(_has(item, _ABSENT) for item in found["absent"])
        and all(map(is_unit, found["units"]))
    )


def is_sample(found: Any) -> bool:
    """Whether it is a line of the samples: a prompt and its scores."""
    return _has(found, _SAMPLE)


def _is_block(found: Any) -> bool:
    """Whether it says of a model what it keeps; None: a dense one."""
    if found is None:
        return True
    if not _has(found, _BLOCK):
        return False
    rows = found["topk"] if isinstance(found["topk"], list) else [found["topk"]]
    heads = [
        k for row in rows if row is not None for k in (row if isinstance(row, list) else [row])
    ]
    return bool(heads) and all(type(k) is int for k in heads)


def _is_metric(found: Any) -> bool:
    return (
        _has(found, _METRIC)
        and "stderr" in found
        and isinstance(found["stderr"], int | float | None)
    )


def _has(found: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(k), kinds[k]) for k in kinds)
