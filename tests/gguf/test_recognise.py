"""Which files are taken for GGUF files."""

import subprocess
import sys

import pytest

from sparsek_cli.gguf.recognise import begins_as_gguf, gguf_files, is_gguf


@pytest.mark.parametrize(
    ("name", "content", "begins", "is_one"),
    [
        ("model.gguf", b"GGUF and more", True, True),
        ("blob", b"GGUF and more", True, True),  # as caches call them
        ("MODEL.GGUF", b"<html>", False, True),  # a download that failed: refused by its header
        ("model.safetensors", b"GGU", False, False),
    ],
)
def test_names_and_first_bytes_count(tmp_path, name, content, begins, is_one):
    file = tmp_path / name
    file.write_bytes(content)
    assert (begins_as_gguf(file), is_gguf(file)) == (begins, is_one)
    assert gguf_files(tmp_path) == ([file] if file.suffix.lower() == ".gguf" else [])


def test_what_cannot_be_read_does_not_begin_as_one(tmp_path):
    assert not begins_as_gguf(tmp_path) and not begins_as_gguf(tmp_path / "nowhere")


def test_recognising_one_is_cheap():
    code = (
        "import sys, sparsek_cli.gguf.recognise; sys.exit(any(m in sys.modules for m in "
        "('numpy', 'torch', 'transformers', 'gguf')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
