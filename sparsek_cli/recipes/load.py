"""One validated recipe out of a YAML file, dotted words and flags; the strongest is the flag.

Precedence: flag > dotted word > recipe file > default. Every mistake is reported with the place
where the user wrote it (file and line, word, or flag) and the nearest name that would be right.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.explain import Loc, explain
from sparsek_cli.recipes.shipped import find_recipe
from sparsek_cli.recipes.yaml_lines import Spelled, parse_yaml, read_yaml

if TYPE_CHECKING:
    from pydantic import BaseModel

    Recipe = TypeVar("Recipe", bound=BaseModel)

_TEXT_MISSED = ("string_type", "list_type")  # a list may be written as `a,b`
WORD = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")

BESIDE = 1  # the strength of flags and words


class Place(str):
    """Where a value was written, in words; `strength`: 0 in the recipe that was named.

    One that it extends has -1, and so on.
    """

    strength: int

    def __new__(cls, words: str, strength: int) -> "Place":
        made = super().__new__(cls, words)
        made.strength = strength
        return made


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
        self._origins: dict[Loc, Place] = {}
        if name_or_path is not None:
            self._tree, self._origins = read_recipe(find_recipe(name_or_path, verb=verb), verb=verb)

    def get(self, key: str, default: Any = None) -> Any:
        """What stands at a top-level key, as it was written."""
        return self._tree.get(key, default)

    def set(self, key: str, value: Any, origin: str) -> None:
        """Puts a value at "key" or "key.sub"; `origin` is named where it is refused."""
        _assign(self._tree, self._origins, key, value, Place(origin, BESIDE))

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

        tree = _without_weaker(self._tree, self._origins, getattr(model_cls, "gives_way", {}))
        try:
            return model_cls.model_validate(_settled(model_cls, tree))
        except ValidationError as error:
            raise explain(model_cls, error, self._origins) from error


def _without_weaker(
    tree: dict[str, Any], origins: Mapping[Loc, Place], gives_way: Mapping[str, str]
) -> dict[str, Any]:
    """The tree without what gives way to another key that was written in a stronger place.

    Args:
        gives_way: by key: the other one, "limit", or it with the value it must have, "limit=3".
    """
    kept = dict(tree)
    for key, stronger in gives_way.items():
        to, _, value_of_it = stronger.partition("=")
        if key not in tree or to not in tree or value_of_it not in ("", str(tree[to])):
            continue
        value, whole, against = tree[key], origins[(key,)], origins[(to,)].strength
        if isinstance(value, dict):  # of keys that are no words the place is not known
            places = {part: origins.get((key, part), whole) for part in value}
            kept[key] = {part: value[part] for part in value if places[part].strength >= against}
        elif whole.strength < against:
            del kept[key]
    return kept


def _settled(model_cls: "type[BaseModel]", tree: dict[str, Any]) -> dict[str, Any]:
    """The tree whose 1e4 are numbers, and the words that they were where a setting is text."""
    from pydantic import ValidationError

    words: set[int] = set()
    try:
        model_cls.model_validate(tree)
    except ValidationError as error:
        words = {id(p["input"]) for p in error.errors() if p["type"] in _TEXT_MISSED}

    def settled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: settled(part) for key, part in value.items()}
        if isinstance(value, list):
            return [settled(part) for part in value]
        if isinstance(value, Spelled):
            return value.text if id(value) in words else float(value)
        return value

    return settled(tree)


def read_recipe(
    file: Path, *, verb: str | None = None, seen: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[Loc, Place]]:
    """`read_yaml` of a recipe over the one that it `extends`; mappings are merged key by key.

    Raises:
        UsageError: as read_yaml; or what it extends is not there, or extends it in turn.
    """
    tree, lines = read_yaml(file)
    origins = {loc: Place(line, -len(seen)) for loc, line in lines.items()}
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, origins
    where = origins.pop(("extends",))
    parent = parent.text if isinstance(parent, Spelled) else parent
    if not isinstance(parent, str):
        raise UsageError(
            f"{where}: 'extends' should be a recipe's name, not {parent!r}",
            hint="name one recipe: a file beside this one, or one that ships",
        )
    verb = verb or file.stem.rpartition(".")[2]
    names = (parent.removesuffix(".yaml"), f"{parent}.{verb}")
    beside = (file.parent / f"{name}.yaml" for name in names)
    above = next((path for path in beside if path.is_file()), None)
    above = above or find_recipe(parent, verb=verb)
    if above.resolve() in {path.resolve() for path in (*seen, file)}:
        raise UsageError(
            f"{where}: '{parent}' extends this recipe in turn", hint="one of them must stand alone"
        )
    merged, places = read_recipe(above, verb=verb, seen=(*seen, file))
    _merge(merged, places, tree, origins, ())
    return merged, places


def _merge(into: dict, places: dict[Loc, Place], over: dict, origins: dict[Loc, Place], loc: Loc):
    """Lays `over` on `into`, below `loc`."""
    for key, value in over.items():
        here = (*loc, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            places.update({here: origins[here]} if here in origins else {})  # 5: is no word
            _merge(into[key], places, value, origins, here)
            continue
        for below in [place for place in places if place[: len(here)] == here]:
            del places[below]
        places.update({place: at for place, at in origins.items() if place[: len(here)] == here})
        into[key] = value


def _parse_word(word: str) -> tuple[str, Any]:
    if not WORD.match(word):
        raise UsageError(f"'{word}' is no setting", hint="write key=value or key.sub=value")
    key, _, text = word.partition("=")
    hint = "quote it for the shell and for YAML: 'key=\"text: with colon\"'"
    value, _ = parse_yaml(text, f"'{word[:80]}'", hint)
    return key.replace("-", "_"), value


def _assign(tree: dict, origins: dict[Loc, Place], key: str, value: Any, origin: Place) -> None:
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
    _note(origins, loc, value, origin)


def _note(origins: dict[Loc, Place], loc: Loc, value: Any, origin: Place) -> None:
    """The place of a value and of all keys in it, by which a mistake is named."""
    origins[loc] = origin
    for key, part in value.items() if isinstance(value, dict) else ():
        _note(origins, (*loc, key), part, origin)
