"""What calibration reads: a file, a data set, or prose that every machine has."""

import ast
import re
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
# Sentences of prose have so many words, of which so few are no plain ones.
_WORDS = (5, 80)
_STRANGE = 0.1
_PLAIN_WORD = re.compile(r"[(\"“]?[A-Za-z][a-z]*(?:['’-][a-z]+)*[)\"”]?[.,;:!?]*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


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
    """Sentences of the Python standard library's docstrings: English that every machine has.

    Modules in an order that mixes topics but is the same everywhere; one document per module.
    Code, tables and what was said before are left out: of text full of names and numbers
    calibration learns that these are nothing to keep.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names - {"this", "antigravity"})
    said: set[str] = set()
    for name in sorted(names, key=lambda n: n[::-1]):
        files = [folder / f"{name}.py", *sorted((folder / name).glob("*.py"))]
        sentences: list[str] = []
        for file in files:
            try:
                tree = ast.parse(file.read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
            for sentence in (one for text in _strings(tree) for one in _sentences(text)):
                if sentence not in said and _is_prose(sentence):
                    said.add(sentence)
                    sentences.append(sentence)
        prose = " ".join(sentences)
        if len(prose) > 2000:
            yield prose


def _strings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, and the topics of the interpreter's own help."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def _sentences(text: str) -> list[str]:
    return _SENTENCE_END.split(" ".join(text.split()))


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if not _WORDS[0] <= len(words) <= _WORDS[1] or not sentence[0].isupper():
        return False
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    return plain >= (1 - _STRANGE) * len(words)
