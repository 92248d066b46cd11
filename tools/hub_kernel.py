"""Lays `sparsek_kernels` out as a Hugging Face kernel: pure Python, for any version of torch.

    python tools/hub_kernel.py OUT

OUT/build.toml and OUT/torch-ext are what kernel-builder builds from; OUT/build/torch-<backend> is
what comes of it, and what `kernels.get_local_kernel(OUT)` loads. A kernel is loaded from anywhere,
under a name of its own, and beside other versions of itself: imports become relative, and
operators stand in a namespace that holds a hash of the sources.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kernels" / "sparsek_kernels"
NAME = "sparsek"
VERSION = 1
BACKENDS = ("cuda", "cpu")
BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
_ABSOLUTE = re.compile(r"^(\s*)from sparsek_kernels(?:\.([\w.]+))? import ", re.MULTILINE)


def files() -> dict[Path, str]:
    """Path within the package and text of every file of it."""
    found = (file for kind in ("*.py", "*.json") for file in PACKAGE.rglob(kind))
    return {file.relative_to(PACKAGE): file.read_text(encoding="utf-8") for file in sorted(found)}


def relative(path: Path, text: str, namespace: str) -> str:
    """A source without the package's own name in it."""
    dots = "." * len(path.parts)
    text = _ABSOLUTE.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", text)
    # Data is read from beside the module that asks for it.
    text = re.sub(
        r'resources\.files\("sparsek_kernels[\w.]*"\)', "resources.files(__package__)", text
    )
    return text.replace('"sparsek::', f'"{namespace}::')


def lay_out(out: Path) -> None:
    """Writes the kernel project into the folder `out`, which must be empty or not there.

    Raises:
        FileExistsError: something is there.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    sources = files()
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:10]
    namespace = f"_{NAME}_{digest}"
    sources = {
        path: relative(path, text, namespace) if path.suffix == ".py" else text
        for path, text in sources.items()
    }
    places = {backend: out / "build" / f"torch-{backend}" for backend in BACKENDS}
    for folder in (out / "torch-ext" / NAME, *places.values()):
        for path, text in sources.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    for backend, folder in places.items():
        metadata = {
            "name": NAME, "id": f"{namespace}_{backend}", "version": VERSION,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "build.toml").write_text(BUILD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty folder, or none yet")
    lay_out(parser.parse_args().out)


if __name__ == "__main__":
    main()
