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
_RECIPE = {"truncate": str}
_ENVIRONMENT = {"versions": dict, "dtype": str, "device": str}
_ABSENT = {"task": str, "reason": str, "remedy": str}
_MODEL = {"name": str, "path": str, "type": str}


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
        and _has(found["environment"], _ENVIRONMENT)
        and all(_has(item, _ABSENT) for item in found["absent"])
        and all(map(is_unit, found["units"]))
    )


def _is_metric(found: Any) -> bool:
    return (
        _has(found, _METRIC)
        and "stderr" in found
        and isinstance(found["stderr"], int | float | None)
    )


def _has(found: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(k), kinds[k]) for k in kinds)
