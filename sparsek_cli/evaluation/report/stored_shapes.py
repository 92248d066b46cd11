"""Whether what is read from a result folder is what a run writes there."""

from typing import Any

_UNIT = {"task": str, "policy": str, "primary": str, "metrics": dict}
_REPORT = {"model": dict, "recipe": dict, "environment": dict, "units": list, "complete": bool}
_MODEL = {"name": str, "path": str}


def is_unit(found: Any) -> bool:
    """Whether it is one result: a task and a policy, and numbers by name."""
    return (
        _has(found, _UNIT)
        and isinstance(found.get("length"), int | None)
        and found["primary"] in found["metrics"]
        and all(_is_metric(metric) for metric in found["metrics"].values())
    )


def is_report(found: Any) -> bool:
    """Whether it is results.json."""
    return (
        _has(found, _REPORT)
        and _has(found["model"], _MODEL)
        and isinstance(found["environment"].get("versions"), dict)
        and all(map(is_unit, found["units"]))
    )


def _is_metric(found: Any) -> bool:
    return (
        _has(found, {"value": int | float, "higher_is_better": bool})
        and "stderr" in found
        and isinstance(found["stderr"], int | float | None)
    )


def _has(found: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(k), kinds[k]) for k in kinds)
