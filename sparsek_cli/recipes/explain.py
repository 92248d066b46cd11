"""What is wrong with a recipe, in one line: where it was written, and the nearest right name."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

Loc = tuple[str | int, ...]


def explain(model_cls: "type[BaseModel]", error: Any, origins: Mapping[Loc, str]) -> UsageError:
    """The first mistake as one line with its place; unknown keys first, they explain the rest."""
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    # Mistakes in one value of several types come as one entry per type: they are one mistake.
    more = len({_written(p["loc"], origins) for p in problems}) - 1
    loc = _written(problem["loc"], origins)
    key = ".".join(str(part) for part in loc) or "recipe"
    place = next((origins[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origins), "")
    where = f"{place}: " if place else ""
    tail = f" (and {more} more)" if more else ""
    if problem["type"] == "extra_forbidden":
        settled = getattr(model_cls, "settled", {}).get(key)
        hint = settled or _nearest_key(model_cls, loc)
        return UsageError(f"{where}unknown key '{key}'{tail}", hint=hint)
    if problem["type"] == "missing":
        name = key.split(".")[-1].replace("_", "-")
        return UsageError(
            f"{where}'{key}' is missing{tail}",
            hint=f"give --{name}, the word {key}=..., or a recipe",
        )
    messages = [p["msg"] for p in problems if _written(p["loc"], origins) == loc]
    message = " or ".join(dict.fromkeys(_plain(m) for m in messages))
    value = "" if isinstance(problem["input"], dict) else f", not {problem['input']!r}"
    described = _field(model_cls, loc)
    hint = getattr(described, "description", None) or "`sparsek recipes show NAME` has examples"
    return UsageError(f"{where}'{key}' {message}{value}{tail}", hint=hint)


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ").split(", unable to parse")[0]
    message = re.sub(r"a valid dictionary( or instance of \w+)?$", "a mapping", message)
    return re.sub(r"^Input should be", "should be", message)


def _written(loc: Loc, origins: Mapping[Loc, str]) -> Loc:
    """`loc` without the union branches pydantic adds: the longest part the user wrote, or all."""
    for n in range(len(loc), 0, -1):
        if loc[:n] in origins:
            return loc[:n] if n < len(loc) and not _is_key(loc[n]) else loc
    return loc


def _is_key(part: str | int) -> bool:
    return isinstance(part, str) and part.isidentifier() and part not in _TYPE_NAMES


_TYPE_NAMES = {"int", "float", "str", "bool", "list", "dict", "none", "literal", "constrained"}


def _models_in(annotation: Any) -> Iterator["type[BaseModel]"]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _field(model_cls: "type[BaseModel]", loc: Loc) -> Any:
    """The pydantic field at `loc`, or None."""
    models, field = [model_cls], None
    for part in loc:
        if isinstance(part, int):
            continue
        field = next((m.model_fields[part] for m in models if part in m.model_fields), None)
        if field is None:
            return None
        models = list(_models_in(field.annotation))
    return field


def _all_keys(model_cls: "type[BaseModel]", prefix: str = "") -> Iterator[str]:
    for name, field in model_cls.model_fields.items():
        yield prefix + name
        for model in _models_in(field.annotation):
            yield from _all_keys(model, f"{prefix}{name}.")


def _nearest_key(model_cls: "type[BaseModel]", loc: Loc) -> str:
    keys = list(_all_keys(model_cls))
    prefix = "".join(f"{part}." for part in loc[:-1] if isinstance(part, str))
    beside = [key for key in keys if key.startswith(prefix) and "." not in key[len(prefix) :]]
    wrong = str(loc[-1])
    near = get_close_matches(wrong, [key[len(prefix) :] for key in beside], n=1)
    if near:
        return f"did you mean '{prefix}{near[0]}'?"
    elsewhere = {key.split(".")[-1]: key for key in keys}
    near = get_close_matches(wrong, elsewhere, n=1)
    if near:
        return f"did you mean '{elsewhere[near[0]]}'?"
    return "known here: " + ", ".join(key[len(prefix) :] for key in beside)
