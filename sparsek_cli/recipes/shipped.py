"""Recipes that ship with the package, and the file that a name or path means."""

import os
import sysconfig
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sparsek_cli.errors import UsageError
from sparsek_cli.plain_files import check_plain
from sparsek_cli.recipes.earlier_versions import RENAMED

if TYPE_CHECKING:
    from pydantic import BaseModel

    Recipe = TypeVar("Recipe", bound=BaseModel)


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
    """The file that a name or path means.

    Args:
        name_or_path: a file, or the name of a recipe that ships; its verb may be left out where
            `verb` says it, or there is one for a single verb.
    """
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
    verbs = [full for full in recipe_names() if full.rpartition(".")[0] == name]
    if verb is None and len(verbs) == 1:
        return recipe_folder() / f"{verbs[0]}.yaml"
    if given.is_dir():
        raise UsageError(f"'{given}' is a folder, not a recipe", hint="name a YAML file")
    words = RENAMED.get(name.removesuffix(".finetune"))
    if words is not None:
        raise UsageError(f"no recipe '{name_or_path}'", hint=f"it is --recipe {words.strip()}")
    if verb is None and verbs:
        raise UsageError(
            f"'{name}' is a recipe of several verbs", hint=f"name one: {', '.join(verbs)}"
        )
    near = get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    raise UsageError(
        f"no recipe '{name_or_path}'",
        hint=f"did you mean '{near[0]}'?" if near else "`sparsek recipes list` shows the names",
    )
