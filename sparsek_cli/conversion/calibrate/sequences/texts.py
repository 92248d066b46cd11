"""What calibration reads: a file, a data set, or prose that every machine has."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.text.documents import iterate_texts
from sparsek_cli.errors import UsageError

GENERATED_SENTENCES = 2000
PLENTY = 8  # times the characters that still lack, of one document's rest


def calibration_texts(spec: str, characters: int, most: int) -> Iterator[str]:
    """Documents of `spec` until there are enough characters.

    At most `most` of each, as long as there are others: scorers that are fitted on one book take
    its names for what matters in any.

    Raises:
        UsageError: there is no text.
    """
    documents = _library_prose() if spec == "auto" else iterate_texts(spec)
    taken, remains = 0, []
    for text in documents:
        yield text[:most]
        taken += len(text[:most])
        if taken >= characters:
            return
        remains.append(text[most:])
    for text in filter(None, remains):
        # All of it is tokenised: of a hundred million characters in one line that takes minutes.
        text = text[: PLENTY * (characters - taken)]
        yield text
        taken += len(text)
        if taken >= characters:
            return
    if spec == "auto" and taken < characters:
        rng = np.random.default_rng(0)
        for _ in range(max(1, (characters - taken) // 100_000)):
            yield generated_text(rng, GENERATED_SENTENCES)
    if not taken and spec != "auto":
        raise UsageError(f"no text in '{spec}'", hint="name a file with text, or use auto")


def _library_prose() -> Iterator[str]:
    """Docstrings of the Python standard library: English that every machine has.

    Modules in an order that mixes topics but is the same everywhere; one document per module.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names - {"this", "antigravity"})
    for name in sorted(names, key=lambda n: n[::-1]):
        files = [folder / f"{name}.py", *sorted((folder / name).glob("*.py"))]
        parts: list[str] = []
        for file in files:
            try:
                tree = ast.parse(file.read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
            parts += [text for node in nodes if (text := ast.get_docstring(node))]
        prose = "\n\n".join(" ".join(part.split()) for part in parts)
        if len(prose) > 2000:
            yield prose
