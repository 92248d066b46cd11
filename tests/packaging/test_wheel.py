"""What a user installs: the wheel holds everything, and nothing of ours is called `kernels`."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("sparsek_cli", "kernels", "recipes")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the source archive of a copy of the tree; the checkout stays as it is."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for file in FILES:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tree / file)
    (tree / "README.md").touch()
    # Without --wheel it goes by way of the sdist, which so is known to hold everything. What it is
    # built with (-x) is looked up by whoever installs this checkout.
    command = [sys.executable, "-m", "build", "--no-isolation", "-x", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(list((tree / "dist").glob("*.tar.gz"))) == 1
    [built] = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def shipped(folder: str, *patterns: str) -> set[str]:
    found = {file for pattern in patterns for file in (ROOT / folder).rglob(pattern)}
    return {str(file.relative_to(ROOT)) for file in found if "__pycache__" not in file.parts}


def test_wheel_holds_every_module(names):
    expected = shipped("sparsek_cli", "*.py", "py.typed")
    expected |= {
        name.removeprefix("kernels/") for name in shipped("kernels/sparsek_kernels", "*.py")
    }
    assert expected <= names, sorted(expected - names)


def test_wheel_holds_the_data(names):
    expected = shipped("sparsek_cli/evaluation", "*.yaml", "*.j2")
    expected |= {name for name in shipped("sparsek_cli/bundled", "*") if (ROOT / name).is_file()}
    expected |= {n.removeprefix("kernels/") for n in shipped("kernels/sparsek_kernels", "*.json")}
    assert expected <= names, sorted(expected - names)
    recipes = {Path(name).name for name in names if "/data/share/sparsek/recipes/" in name}
    assert recipes == {file.name for file in (ROOT / "recipes").glob("*.yaml")}


def test_wheel_stays_small(wheel):
    assert wheel.stat().st_size <= 20e6


def test_wheel_holds_nothing_else(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.startswith("sparsek-")} == {
        "sparsek_cli",
        "sparsek_kernels",
    }
    assert not [name for name in names if name.startswith(("kernels", "tests"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


# Both packages are found without importing one, which imports torch.
FOUND = (
    "import importlib.util; find = importlib.util.find_spec\n"
    "assert all(find(n).origin.startswith(sys.path[0]) for n in ('sparsek_cli', 'sparsek_kernels'))"
)


@pytest.mark.parametrize(
    "look", [FOUND, pytest.param("import sparsek_cli.models", marks=pytest.mark.slow)]
)
def test_unpacked_wheel_runs_and_finds_its_recipes(wheel, tmp_path, look):
    """As pip lays it out: the package beside share/, no checkout in sight."""
    site = tmp_path / "lib" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for data in site.glob("*.data/data/share"):
        shutil.copytree(data, tmp_path / "share")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        f"{look}\nimport sparsek_cli\n"
        "from sparsek_cli.recipes.shipped import recipe_names\n"
        "from sparsek_cli.app import run\n"
        "assert sparsek_cli.__file__.startswith(sys.path[0]), sparsek_cli.__file__\n"
        "print(*recipe_names()); sys.exit(run(['--version']))"
    )
    # -S -E would lose the dependencies; the path entry in front is enough to win.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    assert done.stdout.splitlines()[0].split() == expected


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "first",
    ["", pytest.param("from transformers import LlamaForCausalLM", marks=pytest.mark.slow)],
)
def test_transformers_imports_with_our_tree_on_the_path(first):
    """Hugging Face's package `kernels` must never be looked for, and found, in our tree."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
        f"{first}\n"
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        f"ours = spec is not None and (spec.origin or '').startswith({str(ROOT / 'kernels')!r})\n"
        "sys.exit('kernels resolves to ' + spec.origin if ours else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pip_installs_it_where_nothing_is(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", str(tmp_path / "site"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "bin" / "sparsek").is_file()
    assert (tmp_path / "site" / "sparsek_kernels" / "pytorch" / "ops.py").is_file()


def test_the_image_is_built_of_what_is_there():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt", "sparsek_cli", "kernels"} <= set(copied)
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in allowed
    assert 'ENTRYPOINT ["sparsek"]' in lines
