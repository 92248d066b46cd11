"""The cache of tokenised text: made once, and its lock outlives nobody."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from filelock import FileLock, Timeout

from sparsek_cli.data import corpus

# Holds the lock until it is killed.
HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """(text file, what its cache entry is called)."""
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "LOCK_PATIENCE", 5.0)
    file = tmp_path / "a.txt"
    file.write_text("a few words")
    key = corpus._key(str(file), tokenizer, {"name": None, "split": "train", "column": None,
                                             "max_tokens": None})  # fmt: skip
    corpus.cache_folder().mkdir(parents=True)
    return file, corpus.cache_folder() / key


def test_a_killed_holder_blocks_nobody(place, tokenizer):
    file, entry = place
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"{entry}.lock"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Timeout):  # it does hold it
        FileLock(f"{entry}.lock", timeout=0).acquire()
    holder.kill()
    holder.wait()
    assert os.path.exists(f"{entry}.lock")
    assert len(corpus.load_corpus(str(file), tokenizer)) == 1


def test_an_empty_lock_that_a_full_disk_left_blocks_nobody(place, tokenizer):
    file, entry = place
    open(f"{entry}.lock", "w").close()
    assert len(corpus.load_corpus(str(file), tokenizer)) == 1


def test_half_an_entry_is_made_again(place, tokenizer, monkeypatch):
    """As after a disk that became full while it was written, or a kill."""
    file, _ = place
    save = np.save

    def full(path, array):
        if "ends" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(path, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        corpus.load_corpus(str(file), tokenizer)
    monkeypatch.setattr(np, "save", save)
    made = corpus.load_corpus(str(file), tokenizer)
    assert made.total == len(tokenizer("a few words").input_ids) + 1
    monkeypatch.setattr(corpus, "build_corpus", None)  # read from the cache from now on
    assert corpus.load_corpus(str(file), tokenizer).total == made.total
    assert not list(corpus.cache_folder().glob("*.part"))
