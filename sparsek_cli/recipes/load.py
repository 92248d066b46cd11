"""One validated recipe out of a YAML file, dotted words and flags; the strongest is the flag.

Precedence: flag > dotted word > recipe file > default. Every mistake is reported with the place
where the user wrote it (file and line, word, or flag) and the nearest name that would be right.
"""

import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsek_cli.errors import UsageError
from sparsek_cli.file_kinds import check_plain
from sparsek_cli.recipes.earlier_versions import RENAMED
from sparsek_cli.recipes.explain import Loc, explain

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

    Recipe = TypeVar("Recipe", bound=BaseModel)

LARGEST = 1 << 20  # bytes of a recipe
MOST_VALUES = 100_000  # of a recipe
# YAML 1.1 also knows 010, which is eight, and 1:30, which is ninety.
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0[xb][0-9a-fA-F_]+)")
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
    return Draft(name_or_path, verb=verb).words(overrides).flags(flags or {}).validated(model_cls)


class Draft:
    """A recipe in the making: its values, and for each of them the place where it was written.

    Commands look into it before it is validated, so that a recipe is parsed once.
    """

    def __init__(self, name_or_path: str | Path | None = None, *, verb: str | None = None):
        """Arguments as of `load_recipe`."""
        self._tree: dict[str, Any] = {}
        self._origins: dict[Loc, str] = {}
        if name_or_path is not None:
            self._tree, self._origins = read_recipe(find_recipe(name_or_path, verb=verb), verb=verb)

    def get(self, key: str, default: Any = None) -> Any:
        """What stands at a top-level key, as it was written."""
        return self._tree.get(key, default)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Puts a value at "key" or "key.sub"; `origin` is named where it is refused."""
        _assign(self._tree, self._origins, key, value, origin)

    def words(self, overrides: Sequence[str]) -> "Draft":
        """Words "key.sub=value"."""
        for word in overrides:
            key, value = _parse_word(word)
            self.set(key, value, f"'{word}'")
        return self

    def flags(self, flags: Mapping[str, Any], written: str = "--{}") -> "Draft":
        """Flags that were given; `written` is how their user wrote them."""
        for key, value in flags.items():
            if value is not None:
                name = key.split(".")[-1]
                self.set(key, value, written.format(name.replace("_", "-")))
        return self

    def validated(self, model_cls: "type[Recipe]") -> "Recipe":
        """The recipe; raises UsageError for anything wrong with it."""
        from pydantic import ValidationError

        try:
            return model_cls.model_validate(self._tree)
        except ValidationError as error:
            raise explain(model_cls, error, self._origins) from error


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
    if os.path.lexists(given) and not given.is_dir():
        check_plain(given, hint="write the recipe into a file, and name that")
    if given.is_file():
        return given
    name = str(name_or_path).removesuffix(".yaml").removesuffix(".yml")
    for candidate in (name, f"{name}.{verb}"):
        file = recipe_folder() / f"{candidate}.yaml"
        if "/" not in candidate and file.is_file():
            return file
    if given.is_dir():
        raise UsageError(f"'{given}' is a folder, not a recipe", hint="name a YAML file")
    words = RENAMED.get(name.removesuffix(".finetune"))
    if words is not None:
        raise UsageError(f"no recipe '{name_or_path}'", hint=f"it is --recipe {words.strip()}")
    near = get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    raise UsageError(
        f"no recipe '{name_or_path}'",
        hint=f"did you mean '{near[0]}'?" if near else "`sparsek recipes list` shows the names",
    )


def read_recipe(
    file: Path, *, verb: str | None = None, seen: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[Loc, str]]:
    """`read_yaml` of a recipe over the one that it `extends`; mappings are merged key by key.

    Raises:
        UsageError: as read_yaml; or what it extends is not there, or extends it in turn.
    """
    tree, origins = read_yaml(file)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    where = origins.pop(("extends",))
    if not isinstance(parent, str):
        raise UsageError(
            f"{where}: 'extends' should be a recipe's name, not {parent!r}",
            hint="name one recipe: a file beside this one, or one that ships",
        )
    verb = verb or file.stem.rpartition(".")[2]
    names = (parent.removesuffix(".yaml"), f"{parent}.{verb}")
    beside = (file.with_name(f"{name}.yaml") for name in names)
    above = next((path for path in beside if path.is_file()), None)
    above = above or find_recipe(parent, verb=verb)
    if above.resolve() in {path.resolve() for path in (*seen, file)}:
        raise UsageError(
            f"{where}: '{parent}' extends this recipe in turn", hint="one of them must stand alone"
        )
    merged, places = read_recipe(above, verb=verb, seen=(*seen, file))
    _merge(merged, places, tree, origins, ())
    return merged, places


def _merge(into: dict, places: dict[Loc, str], over: dict, origins: dict[Loc, str], loc: Loc):
    """Lays `over` on `into`, below `loc`."""
    for key, value in over.items():
        here = (*loc, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            places[here] = origins[here]
            _merge(into[key], places, value, origins, here)
            continue
        for below in [place for place in places if place[: len(here)] == here]:
            del places[below]
        places.update({place: at for place, at in origins.items() if place[: len(here)] == here})
        into[key] = value


def read_text(file: Path) -> str:
    """A recipe's file.

    Raises:
        UsageError: unreadable, larger than any recipe, or not UTF-8.
    """
    try:
        with file.open("rb") as opened:
            raw = opened.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint="check the path") from error
    if len(raw) > LARGEST:
        raise UsageError(
            f"{file} is larger than any recipe ({LARGEST >> 20} MiB)", hint="name a recipe"
        )
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text", hint="save the recipe as UTF-8") from error


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[Loc, str]]:
    """A YAML mapping and, for each path in it, "file:line" of its key.

    Raises:
        UsageError: as `read_text`; not YAML, not a mapping, a key twice, or aliases without end.
    """
    tree, lines = _parse(read_text(file), str(file), "a recipe is a mapping of `key: value` lines")
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"{file}:1: a recipe must be a mapping, not a {type(tree).__name__}",
            hint="a recipe is a mapping of `key: value` lines",
        )
    return tree, {loc: f"{file}:{line}" for loc, line in lines.items()}


def _parse(text: str, where: str, hint: str) -> tuple[Any, dict[Loc, int]]:
    """What a YAML text says, and the line of each path in it; aliases are written out.

    Raises:
        UsageError: not YAML, a key twice, or more than `MOST_VALUES` values.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines: dict[Loc, int] = {}
        for loc, line in _lines(node, (), where):
            lines[loc] = line
            if len(lines) > MOST_VALUES:
                raise UsageError(
                    f"{where}: more than {MOST_VALUES:,} values, aliases written out",
                    hint="no recipe needs so many; write them without aliases",
                )
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        why = error.problem or error.context
        raise UsageError(f"{place}: not valid YAML: {why}", hint=hint) from error
    except RecursionError as error:
        why = "values lie within each other too deeply"
        raise UsageError(f"{where}: not valid YAML: {why}", hint=hint) from error
    except (yaml.YAMLError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"{where}: not valid YAML: {why}", hint=hint) from error


def _lines(
    node: "yaml.Node | None", loc: Loc, where: str, around: tuple = ()
) -> Iterator[tuple[Loc, int]]:
    import yaml

    if node is None:
        return
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and not _NUMBER.fullmatch(node.value):
            raise UsageError(
                f"{where}:{line}: {node.value} would be read as a number to another base than ten",
                hint="write it in decimal, or in quotes if it is a word",
            )
        return
    if node in around:
        raise UsageError(
            f"{where}:{line}: an alias stands within what it stands for",
            hint="write the value out instead",
        )
    around = (*around, node)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in seen:
                raise UsageError(
                    f"{where}:{line}: key '{name}' is given twice (first in line {seen[name]})",
                    hint="keep one of them",
                )
            seen[name] = line
            yield (*loc, name), line
            yield from _lines(value, (*loc, name), where, around)
    else:
        for index, value in enumerate(node.value):
            yield (*loc, index), value.start_mark.line + 1
            yield from _lines(value, (*loc, index), where, around)


def _parse_word(word: str) -> tuple[str, Any]:
    if not WORD.match(word):
        raise UsageError(f"'{word}' is no setting", hint="write key=value or key.sub=value")
    key, _, text = word.partition("=")
    hint = "quote it for the shell and for YAML: 'key=\"text: with colon\"'"
    value, _ = _parse(text, f"'{word[:80]}'", hint)
    return key.replace("-", "_"), value


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
