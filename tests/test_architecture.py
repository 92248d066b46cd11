"""The house as a whole: imports point one way and never in a circle; folders stay small."""

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"sparsek_cli": ROOT, "sparsek_kernels": ROOT / "kernels", "experiments": ROOT}
FILES = sorted(file for top, base in SOURCES.items() for file in (base / top).rglob("*.py"))
# Lower floors import nothing of higher ones.
FLOORS = (
    {"sparsek_kernels"},
    {"sparsek_cli.errors", "sparsek_cli.reporter", "sparsek_cli.disk", "sparsek_cli.plain_files",
     "sparsek_cli.silence", "sparsek_cli.converted",
     "sparsek_cli.byte_units", "sparsek_cli.console", "sparsek_cli.devices",
     "sparsek_cli.termination"},
    {"sparsek_cli.families", "sparsek_cli.models", "sparsek_cli.recipes", "sparsek_cli.data",
     "sparsek_cli.checkpoint_files", "sparsek_cli.quantised", "sparsek_cli.output",
     "sparsek_cli.model_folder", "sparsek_cli.hub", "sparsek_cli.loading", "sparsek_cli.gguf"},
    {"sparsek_cli.conversion", "sparsek_cli.training", "sparsek_cli.evaluation",
     "sparsek_cli.dialogue", "sparsek_cli.serving", "sparsek_cli.sharing",
     "sparsek_cli.scorers_alone", "sparsek_cli.diagnosis", "sparsek_cli.benchmarks"},
    {"sparsek_cli.api", "sparsek_cli.commands"},
    {"sparsek_cli.app", "experiments"},
)  # fmt: skip
# The package and its module: they lead up to the API and to the command line.
ENTRANCES = ("sparsek_cli", "sparsek_cli.__main__")
MOST_FILES = 15


def name_of(file: Path) -> str:
    base = ROOT / "kernels" if "kernels" in file.relative_to(ROOT).parts else ROOT
    return ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def nodes(file: Path) -> list[ast.AST]:
    return [*ast.walk(parsed(file))]


@functools.cache
def imports(file: Path, *, anywhere: bool = True) -> set[str]:
    """Modules of ours that a file imports; not what only type checkers see."""
    found: set[str] = set()
    hidden = {
        id(inner)
        for node in nodes(file)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in nodes(file) if anywhere else parsed(file).body:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def floor_of(module: str) -> int | None:
    for number, places in enumerate(FLOORS):
        if any(module == place or module.startswith(f"{place}.") for place in places):
            return number
    return None


def test_imports_point_down():
    wrong = []
    for module in sorted(MODULES.keys() - {*ENTRANCES}):
        here = floor_of(module)
        assert here is not None, f"{module} stands on no floor"
        floors = {other: floor_of(other) for other in imports(MODULES[module])}
        wrong += [f"{module} imports {n}" for n, there in floors.items() if (there or 0) > here]
    assert not wrong


def test_no_file_imports_in_a_circle():
    graph = {module: imports(file, anywhere=False) - {module} for module, file in MODULES.items()}
    assert_no_circle(graph)


def test_no_part_imports_in_a_circle():
    """Nor do the folders and files of sparsek_cli, wherever in a file the import stands."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        part = part_of(module)
        graph.setdefault(part, set()).update(part_of(other) for other in imports(file))
    # The package itself has the version, and finds the API when it is first used.
    graph = {part: others - {part, "sparsek_cli"} for part, others in graph.items()}
    assert_no_circle(graph)


def part_of(module: str) -> str:
    """sparsek_cli.<part>; other packages are one part each."""
    package, _, rest = module.partition(".")
    return f"{package}.{rest.split('.')[0]}" if rest and package == "sparsek_cli" else package


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_backend_imports_the_other():
    for module, file in MODULES.items():
        for one, other in (("pytorch", "triton"), ("triton", "pytorch")):
            if module.startswith(f"sparsek_kernels.{one}"):
                theirs = f"sparsek_kernels.{other}"
                assert not [name for name in imports(file) if name.startswith(theirs)], module


def test_a_name_has_one_home():
    """Packages offer what their files hold; a file offers nothing of another's."""
    for module, file in MODULES.items():
        body = () if file.name == "__init__.py" else parsed(file).body
        offered: set[str] = set()
        for node in body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                offered.update(ast.literal_eval(node.value))
        taken = {
            alias.asname or alias.name
            for node in body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert not taken & offered, f"{module} re-exports"


def test_folders_hold_few_files():
    crowded = {}
    tests = {file.parent for file in (ROOT / "tests").rglob("*.py")}
    for folder in {file.parent for file in FILES} | tests:
        count = sum(file.name != "__init__.py" for file in folder.glob("*.py"))
        if count > MOST_FILES:
            crowded[str(folder.relative_to(ROOT))] = count
    assert not crowded


def test_files_stay_short():
    assert not [f for f in FILES if len(f.read_text(encoding="utf-8").splitlines()) > 400]


def test_functions_stay_short():
    """Gluon kernels are exempt: a warp-specialised program is one function."""
    long = []
    for file in FILES:
        if "hopper" in file.parts:
            continue
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 100:
                    long.append(f"{file.relative_to(ROOT)}:{node.name} {lines}")
    assert not long


@pytest.mark.parametrize(
    ("here", "text"),
    [
        ("sparsek_cli.errors", "from sparsek_cli.models import SparseKCache"),
        ("sparsek_kernels.state", "import sparsek_cli.errors"),
        ("sparsek_cli.data.corpus", "def f():\n    from sparsek_cli.training.plan import plan"),
    ],
)
def test_an_import_that_points_up_is_seen(here, text, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(text)
    assert any(floor_of(other) > floor_of(here) for other in imports(file))


def test_an_import_from_backend_to_backend_is_seen(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("from sparsek_kernels.triton import decode")
    assert imports(file) == {"sparsek_kernels.triton.decode"}


def test_recipes_end_at_the_door():
    """Below plans a verb knows small settings; nobody hands the whole recipe on."""
    doors = {"plan", "settings", "default_sizes", "api"}
    for module, file in MODULES.items():
        if module.split(".")[1:2] in (["recipes"], ["commands"]) or file.stem in doors:
            continue
        for node in nodes(file):
            if isinstance(node, ast.arg) and node.annotation is not None:
                said = ast.unparse(node.annotation)
                assert not any(
                    name in said for name in ("ConvertRecipe", "FinetuneRecipe", "EvaluateRecipe")
                ), f"{module}: {node.arg}"


def test_every_mark_is_run_by_one_command():
    """What `make test` leaves out, `make slow-test` or `make gpu-test` runs."""
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = r"^\t(TRITON_INTERPRET=1 )?\$\(BIN\)/python -m pytest .*-m '?([a-z ]+)"
    chosen = re.findall(line, make, re.M)
    assert len(chosen) == 3
    for marks in itertools.product((False, True), repeat=3):
        given = dict(zip(("gpu", "interpret", "slow"), marks, strict=True))
        if given["gpu"] and given["interpret"]:
            continue
        runs = [bool(how) for how, words in chosen if eval(words, {}, given)]
        assert runs == [not given["gpu"]], (given, runs)  # whether kernels are interpreted
