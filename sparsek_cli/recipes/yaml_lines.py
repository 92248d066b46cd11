"""YAML as recipes use it: each value with the line it was written in."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.explain import Loc

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel

    Recipe = TypeVar("Recipe", bound=BaseModel)

_SPELLED = "tag:yaml.org,2002:float-without-a-dot"  # ours
LARGEST = 1 << 20  # bytes of a recipe
MOST_VALUES = 100_000  # of a recipe
DEEPEST = 100  # brackets within each other
_TOO_DEEP = "values lie within each other too deeply"
# YAML 1.1 also knows 010, which is eight, and 1:30, which is ninety.
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0[xb][0-9a-fA-F_]+)")

_EXPONENT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class Spelled(float):
    """A number that YAML 1.1 takes for a word: `text` is the word, for settings that are text."""

    text: str


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
    tree, lines = parse_yaml(
        read_text(file), str(file), "a recipe is a mapping of `key: value` lines"
    )
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"{file}:1: a recipe must be a mapping, not a {type(tree).__name__}",
            hint="a recipe is a mapping of `key: value` lines",
        )
    return tree, {loc: f"{file}:{line}" for loc, line in lines.items()}


def parse_yaml(text: str, where: str, hint: str) -> tuple[Any, dict[Loc, int]]:
    """What a YAML text says, and the line of each path in it; aliases are written out.

    Raises:
        UsageError: not YAML, a key twice, or more than `MOST_VALUES` values.
    """
    import yaml

    try:
        loader = _loader(text)
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
        raise UsageError(f"{where}: not valid YAML: {_TOO_DEEP}", hint=hint) from error
    except (yaml.YAMLError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"{where}: not valid YAML: {why}", hint=hint) from error


def _loader(text: str) -> "yaml.SafeLoader":
    """One that takes 1e-4 for a number; YAML 1.1 makes a word of it, for want of a dot.

    And days for words: no setting is a date, and folders are called after them.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader's own table of what plain scalars are stays as it is."""

        def fetch_flow_collection_start(self, kind: type) -> None:
            # Each may begin a key, and is looked at for each that follows, before one is parsed.
            if self.flow_level >= DEEPEST:
                raise yaml.scanner.ScannerError(None, None, _TOO_DEEP, self.get_mark())
            super().fetch_flow_collection_start(kind)

    def number(loader: Loader, node: yaml.ScalarNode) -> Spelled:
        made = Spelled(loader.construct_yaml_float(node))
        made.text = node.value
        return made

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(_SPELLED, _EXPONENT, list("-+.0123456789"))
    Loader.add_constructor(_SPELLED, number)
    return Loader(text)


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
            if key.tag == _SPELLED:
                key.tag = "tag:yaml.org,2002:str"  # keys are names
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
