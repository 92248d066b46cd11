"""What is wrong with a recipe, in one line: where it was written, and the nearest right name."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args, get_origin

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
    loc = _without_kind(model_cls, _written(problem["loc"], origins))
    key = ".".join(str(part) for part in loc) or "recipe"
    settled = getattr(model_cls, "settled", {})
    if problem["type"] == "extra_forbidden" and isinstance(problem["input"], dict):
        # A whole block is gone: the key in it that was written says more.
        inner = next((sub for sub in problem["input"] if f"{key}.{sub}" in settled), None)
        loc, key = (loc, key) if inner is None else ((*loc, inner), f"{key}.{inner}")
    place = next((origins[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origins), "")
    where = f"{place}: " if place else ""
    tail = f" (and {more} more)" if more else ""
    if problem["type"] == "extra_forbidden":
        hint = settled.get(key) or _nearest_key(model_cls, loc)
        return UsageError(f"{where}unknown key '{key}'{tail}", hint=hint)
    if problem["type"] == "missing":
        return UsageError(
            f"{where}'{key}' is missing{tail}",
            hint=f"give the word {key}=..., or set it in a recipe",
        )
    if problem["type"].startswith("union_tag"):
        wrong = problem.get("ctx", {}).get("tag")
        kinds = ", ".join(sorted(_kinds(model_cls, loc)))
        said = (
            "has no kind"
            if wrong in (None, "None")
            else f"has kind {wrong!r}, which does not exist"
        )
        return UsageError(f"{where}'{key}' {said}{tail}", hint=f"set {key}.kind to one of {kinds}")
    messages = [p["msg"] for p in problems if _written(p["loc"], origins) == loc]
    messages = messages or [problem["msg"]]
    message = " or ".join(dict.fromkeys(_plain(m) for m in messages))
    value = "" if isinstance(problem["input"], dict) else f", not {problem['input']!r}"
    described = _field(model_cls, loc)
    hint = getattr(described, "description", None) or "`sparsek recipes show NAME` has examples"
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
        # YAML makes a number of digits (a commit's, without the zeros in front), a switch of no.
        inside = '["..."]' if isinstance(loc[-1], int) else '"..."'
        name = next(part for part in reversed(loc) if isinstance(part, str))
        hint = f"write it in quotes if it is a word or name: {name}: {inside} ({hint})"
    return UsageError(f"{where}'{key}' {message}{value}{tail}", hint=hint)


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ").split(", unable to parse")[0]
    message = re.sub(r"a valid dictionary( or .*)?$", "a mapping", message)
    message = message.replace("a valid tuple", "a list of two")
    message = re.sub(
        r"^List should have at least (\d+) items?.*", r"should have \1 or more", message
    )
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
    named = [part for part in loc if isinstance(part, str)]
    if not named:
        return None
    above = _models_at(model_cls, tuple(named[:-1]))
    return next((m.model_fields[named[-1]] for m in above if named[-1] in m.model_fields), None)


def _all_keys(model_cls: "type[BaseModel]", prefix: str = "") -> Iterator[str]:
    """Keys that stand in every recipe: not those below names that users give."""
    for name, field in model_cls.model_fields.items():
        yield prefix + name
        for model in () if get_origin(field.annotation) is dict else _models_in(field.annotation):
            yield from _all_keys(model, f"{prefix}{name}.")


def _nearest_key(model_cls: "type[BaseModel]", loc: Loc) -> str:
    prefix = "".join(f"{part}." for part in loc[:-1] if isinstance(part, str))
    above = _models_at(model_cls, loc[:-1])
    beside = list(dict.fromkeys(name for model in above for name in model.model_fields))
    wrong = str(loc[-1])
    near = get_close_matches(wrong, beside, n=1)
    if near:
        return f"did you mean '{prefix}{near[0]}'?"
    elsewhere = {key.split(".")[-1]: key for key in _all_keys(model_cls)}
    near = [wrong] if wrong in elsewhere else get_close_matches(wrong, elsewhere, n=1)
    if near:
        return f"did you mean '{elsewhere[near[0]]}'?"
    return "known here: " + ", ".join(beside)


def _models_at(model_cls: "type[BaseModel]", loc: Loc) -> list["type[BaseModel]"]:
    """The models that may stand at `loc`; a name that a user gave may be that of a field, too."""
    models, given = [model_cls], False
    for part in loc:
        fields = [] if given else [m.model_fields[part] for m in models if part in m.model_fields]
        given = any(get_origin(field.annotation) is dict for field in fields)
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
    return models


def _without_kind(model_cls: "type[BaseModel]", loc: Loc) -> Loc:
    """`loc` without the kind that pydantic writes behind a source's name."""
    return loc[:2] + loc[3:] if len(loc) > 2 and loc[2] in _kinds(model_cls, loc[:2]) else loc


def _kinds(model_cls: "type[BaseModel]", loc: Loc) -> set[str]:
    """What `kind` may be at `loc`."""
    fields = [model.model_fields.get("kind") for model in _models_at(model_cls, loc)]
    return {kind for field in fields if field is not None for kind in get_args(field.annotation)}
