"""One validated recipe out of a YAML file, dotted words and flags; the strongest is the flag.

Precedence: flag > dotted word > recipe file > default. Every mistake is reported with the place
where the user wrote it (file and line, word, or flag) and the nearest name that would be right.
"""

import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

    Recipe = TypeVar("Recipe", bound=BaseModel)

Loc = tuple[str | int, ...]

WORD = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")


def load_recipe(
    model_cls: "type[Recipe]",
    name_or_path: str | Path | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    verb: str | None = None,
) -> "Recipe":
    """Builds one `model_cls` from the recipe, the dotted words and the flags.

    Args:
        model_cls: the pydantic model of the verb (extra="forbid").
        name_or_path: a YAML file, the name of a shipped recipe ("tiny.finetune"), or None.
        overrides: words "key.sub=value"; the value is read as YAML.
        flags: "key" or "key.sub" -> value; None means that the flag was not given.
        verb: lets "tiny" stand for "tiny.<verb>".

    Raises:
        UsageError: anything wrong with any of them.
    """
    from pydantic import ValidationError

    tree: dict[str, Any] = {}
    origins: dict[Loc, str] = {}
    if name_or_path is not None:
        tree, lines = read_yaml(find_recipe(name_or_path, verb=verb))
        origins.update(lines)
    for word in overrides:
        key, value = _parse_word(word)
        _assign(tree, origins, key, value, f"'{word}'")
    for key, value in (flags or {}).items():
        if value is not None:
            flag = f"--{key.split('.')[-1].replace('_', '-')}"
            _assign(tree, origins, key, value, flag)
    try:
        return model_cls.model_validate(tree)
    except ValidationError as error:
        raise _explain(model_cls, error, origins) from error


def recipe_folder() -> Path:
    """Where the shipped recipes are: beside the package in a checkout, else under share/."""
    package = Path(__file__).resolve().parents[1]
    places = [package.parent / "recipes", Path(sysconfig.get_path("data"), "share/sparsek/recipes")]
    # pip --user, --target and --prefix put share/ beside one of the package's own parents.
    places += [parent / "share/sparsek/recipes" for parent in package.parents]
    for place in places:
        if place.is_dir() and any(place.glob("*.yaml")):
            return place
    return places[0]


def recipe_names() -> list[str]:
    """Names of the shipped recipes, "<model>.<verb>", sorted."""
    return sorted(file.stem for file in recipe_folder().glob("*.yaml"))


def find_recipe(name_or_path: str | Path, *, verb: str | None = None) -> Path:
    """The file that a name or path means."""
    given = Path(name_or_path).expanduser()
    if given.is_file():
        return given
    name = str(name_or_path).removesuffix(".yaml").removesuffix(".yml")
    for candidate in (name, f"{name}.{verb}"):
        file = recipe_folder() / f"{candidate}.yaml"
        if "/" not in candidate and file.is_file():
            return file
    if given.is_dir():
        raise UsageError(f"'{given}' is a folder, not a recipe", hint="name a YAML file")
    near = get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    raise UsageError(
        f"no recipe '{name_or_path}'",
        hint=f"did you mean '{near[0]}'?" if near else "`sparsek recipes list` shows the names",
    )


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[Loc, str]]:
    """A YAML mapping and, for each path in it, "file:line" of its key.

    Raises:
        UsageError: unreadable, not UTF-8, not YAML, not a mapping, or a key twice.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text", hint="save the recipe as UTF-8") from error
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint="check the path") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        origins = {loc: f"{file}:{line}" for loc, line in _lines(node, (), file)}
        tree = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UsageError(
            f"{where}: not valid YAML: {error.problem or error.context}",
            hint="a recipe is a mapping of `key: value` lines",
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"{file}: not valid YAML: {str(error).splitlines()[0]}",
            hint="a recipe is a mapping of `key: value` lines",
        ) from error
    if not isinstance(tree, dict):
        raise UsageError(
            f"{file}:1: a recipe must be a mapping, not a {type(tree).__name__}",
            hint="a recipe is a mapping of `key: value` lines",
        )
    return tree, origins


def _lines(node: "yaml.Node", loc: Loc, file: Path) -> Iterator[tuple[Loc, int]]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UsageError(
                    f"{file}:{line}: key '{key.value}' is given twice (first in line "
                    f"{seen[key.value]})",
                    hint="keep one of them",
                )
            seen[key.value] = line
            yield (*loc, key.value), line
            yield from _lines(value, (*loc, key.value), file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*loc, index), value.start_mark.line + 1
            yield from _lines(value, (*loc, index), file)


def _parse_word(word: str) -> tuple[str, Any]:
    import yaml

    if not WORD.match(word):
        raise UsageError(f"'{word}' is no setting", hint="write key=value or key.sub=value")
    key, _, text = word.partition("=")
    try:
        return key.replace("-", "_"), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"'{word}': the value is not valid YAML",
            hint="quote it for the shell and for YAML: 'key=\"text: with colon\"'",
        ) from error


def _assign(tree: dict, origins: dict[Loc, str], key: str, value: Any, origin: str) -> None:
    *parents, last = key.split(".")
    here: Any = tree
    for depth, part in enumerate(parents):
        child = here.get(part)
        if child is None:
            child = here[part] = {}
        if not isinstance(child, dict):
            place = origins.get(tuple(parents[: depth + 1]), "")
            raise UsageError(
                f"{origin}: '{'.'.join(parents[: depth + 1])}' is {child!r}"
                f"{f' ({place})' if place else ''}, it has no part '{last}'",
                hint="set the key itself, or give it a mapping in the recipe",
            )
        here = child
        origins.setdefault(tuple(parents[: depth + 1]), origin)
    here[last] = value
    loc = (*parents, last)
    for below in [o for o in origins if o[: len(loc)] == loc]:
        del origins[below]
    origins[loc] = origin


def _explain(model_cls: "type[BaseModel]", error: Any, origins: Mapping[Loc, str]) -> UsageError:
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
        return UsageError(f"{where}unknown key '{key}'{tail}", hint=_nearest_key(model_cls, loc))
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
