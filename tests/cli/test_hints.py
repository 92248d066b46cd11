"""What hints and messages name is there: verbs, flags, keys of recipes, files of the docs.

That following a hint works is shown in test_hints_followed.py, or where the refusal is tested.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import typer

from sparsek_cli.app import app

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "sparsek_cli").rglob("*.py"))
# Of other programs, named beside ours.
THEIRS = {
    "--nproc-per-node", "--no-deps", "--merge", "--continuous-batching", "--trust-remote-code",
    "--kv-cache-dtype", "--kv-cache-memory-bytes", "--tensor-parallel-size", "--force-download",
}  # fmt: skip


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def texts(file: Path) -> list[str]:
    """String literals that are no docstrings; what is filled in becomes X."""
    tree = parsed(file)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append(
                "".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
            )
        elif isinstance(getattr(node, "value", None), str) and id(node) not in docs | inner:
            found.append(node.value)
    return found


@functools.cache
def hints(file: Path) -> list[str]:
    """What is passed as `hint=`, wherever it is written out."""
    tree = parsed(file)
    return [
        "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "X"
            for part in (
                word.value.values if isinstance(word.value, ast.JoinedStr) else [word.value]
            )
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "hint"
    ]


@pytest.fixture(scope="module")
def verbs() -> dict[str, set[str]]:
    """Each verb's flags."""
    group = typer.main.get_command(app)
    found = {name: command for name, command in group.commands.items()}
    for name, command in list(found.items()):
        for below, inner in getattr(command, "commands", {}).items():
            found[f"{name} {below}"] = inner
    shared = {option for p in group.params for option in p.opts}
    return {
        name: shared | {"--help", "-h"} | {option for p in command.params for option in p.opts}
        for name, command in found.items()
    }


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key of every recipe, dotted and alone."""
    from pydantic import BaseModel

    from sparsek_cli.recipes.schema_convert import ConvertRecipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

    found: set[str] = set()

    def add(model: type[BaseModel], path: str) -> None:
        for name, field in model.model_fields.items():
            found.update({name, f"{path}{name}"})
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    add(part, f"{path}{name}.")

    for recipe in (ConvertRecipe, EvaluateRecipe, FinetuneRecipe):
        add(recipe, "")
    return found


def test_verbs_and_their_flags(verbs):
    named = 0
    for file in SOURCES:
        for text in texts(file):
            for line in re.findall(r"`sparsek ([^`]*)`", text):
                words = line.split()
                verb = " ".join(words[:2]) if " ".join(words[:2]) in verbs else words[0]
                assert verb in verbs or verb == "X", f"{file}: sparsek {line}"
                flags = {word for word in words if word.startswith("--")}
                assert verb == "X" or flags <= verbs[verb], f"{file}: sparsek {line}"
                named += 1
    assert named > 30


def test_flags(verbs):
    known, named = set().union(*verbs.values()) | THEIRS, 0
    for file in SOURCES:
        for hint in hints(file):
            flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", hint))
            assert flags <= known, f"{file}: {hint}"
            named += len(flags)
    assert named > 20


def test_keys(keys):
    """`set KEY=...`, "set 'KEY'" and dotted names."""
    named = 0
    for file in SOURCES:
        if "models" in file.parts or "benchmarks" in file.parts:
            continue  # these speak of transformers' configs and of PyTorch
        for hint in hints(file):
            found = re.findall(r"\bset ([a-z_.]+)=", hint) + re.findall(r"\bset '([a-z_.]+)'", hint)
            found += re.findall(r"\b((?:evaluation|objective|launch|method|lora)\.[a-z_]+)", hint)
            assert set(found) <= keys, f"{file}: {hint}"
            named += len(found)
    assert named > 10


def test_pages_and_files():
    for file in SOURCES:
        for hint in hints(file):
            for page in re.findall(r"\b(?:docs|sparsek_cli)/[\w/.-]+", hint):
                assert (ROOT / page.rstrip(".")).exists(), f"{file}: {hint}"


def test_every_refusal_has_a_hint():
    for file in SOURCES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "SparsekError", "UsageError",
            ):  # fmt: skip
                named = [word.arg for word in node.keywords]
                assert "hint" in named or None in named, f"{file}:{node.lineno}"
