"""`sparsek recipes`: list, show and copy the recipes that ship."""

from pathlib import Path
from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import SparsekError

app = typer.Typer(
    help="List, show and copy recipes.",
    invoke_without_command=True,
    suggest_commands=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Recipe name or file.")]


@app.callback()
def recipes(context: typer.Context) -> None:
    """List, show and copy recipes."""
    if context.invoked_subcommand is None:
        list_recipes(json=False)


@app.command("list")
def list_recipes(json: options.Json = False) -> None:
    """Names of the shipped recipes, and what each is for."""
    from sparsek_cli.recipes.shipped import recipe_folder, recipe_names

    rows = [
        {"name": name, "about": _about(recipe_folder() / f"{name}.yaml")} for name in recipe_names()
    ]
    if not rows:
        raise SparsekError(
            f"no recipes in {recipe_folder()}", hint="reinstall sparsek, or write your own file"
        )
    width = max(len(row["name"]) for row in rows)
    text = "\n".join(f"{row['name']:<{width}}  {row['about']}".rstrip() for row in rows)
    Console(as_json=json).result(text, rows)


@app.command("show")
def show(name: Name) -> None:
    """Print a recipe."""
    from sparsek_cli.recipes.shipped import find_recipe
    from sparsek_cli.recipes.yaml_lines import read_text

    Console().show(read_text(find_recipe(name)))


@app.command("copy")
def copy(
    name: Name,
    to: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to; default: NAME.yaml here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from sparsek_cli.disk import write_atomically
    from sparsek_cli.output.place import absolute, check_file, check_not_inside
    from sparsek_cli.recipes.shipped import find_recipe
    from sparsek_cli.recipes.yaml_lines import read_text

    source = find_recipe(name)
    said = to or Path(source.name)
    if absolute(said).is_dir():
        said = said / source.name
    target = absolute(said)
    check_not_inside(target, None)
    check_file(target, overwrite=overwrite, suffixes=(".yaml", ".yml"))
    write_atomically(target, read_text(source))
    Console().result(str(said), {})


@app.command("schema")
def schema(
    verb: Annotated[
        str, typer.Argument(metavar="VERB", help="convert, finetune or evaluate.")
    ] = "finetune",
) -> None:
    """Print the JSON schema of a verb's recipes, for editors."""
    import json as text

    from sparsek_cli.recipes.json_schema import recipe_schema

    Console().show(text.dumps(recipe_schema(verb), indent=2) + "\n")


def _about(file: Path) -> str:
    """The recipe's first comment line."""
    from sparsek_cli.recipes.yaml_lines import read_text

    first = read_text(file).split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
