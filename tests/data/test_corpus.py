"""The cache of tokenised text: made once, and its lock outlives nobody."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from sparsek_cli.data import corpus
from sparsek_cli.errors import SparsekError
from sparsek_cli.recipes.schema_finetune import Architecture
from sparsek_cli.training.model import random_config

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
    file, entry = place
    save = np.save

    def full(path, array):
        if "ends" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(path, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        corpus.load_corpus(str(file), tokenizer)
    assert not list(corpus.cache_folder().glob("*.part"))
    monkeypatch.setattr(np, "save", save)
    (entry.parent / f"{entry.name}.7.part").mkdir()  # of a run that was killed
    made = corpus.load_corpus(str(file), tokenizer)
    assert made.total == len(tokenizer("a few words").input_ids) + 1
    monkeypatch.setattr(corpus, "build_corpus", None)  # read from the cache from now on
    assert corpus.load_corpus(str(file), tokenizer).total == made.total
    assert not list(corpus.cache_folder().glob("*.part"))


def test_what_was_kept_by_another_way_of_reading_is_not_taken(place, tokenizer, monkeypatch):
    file, _ = place
    corpus.load_corpus(str(file), tokenizer)
    monkeypatch.setattr(corpus, "build_corpus", None)
    corpus.load_corpus(str(file), tokenizer)  # kept
    monkeypatch.setattr(corpus, "READING", corpus.READING + 1)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        corpus.load_corpus(str(file), tokenizer)


def test_a_cache_that_cannot_be_written_names_the_setting(place, tokenizer, monkeypatch):
    file, entry = place
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(file))  # as a home that is read-only
    with pytest.raises(SparsekError, match="cannot be kept") as caught:
        corpus.load_corpus(str(file), tokenizer)
    assert "SPARSEK_CACHE_DIR" in caught.value.hint
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(file.parent / "another"))  # as hinted
    assert len(corpus.load_corpus(str(file), tokenizer)) == 1


def test_another_process_that_takes_too_long_is_named(place, tokenizer, monkeypatch):
    file, entry = place
    monkeypatch.setattr(corpus, "LOCK_PATIENCE", 0.1)
    with FileLock(f"{entry}.lock"), pytest.raises(SparsekError, match="another process") as caught:
        corpus.load_corpus(str(file), tokenizer)
    assert "wait" in caught.value.hint


@pytest.mark.parametrize("name", ["tokens.npy", "ends.npy"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other bytes", "another's"])
def test_a_damaged_entry_is_made_anew_and_told(place, tokenizer, name, damage):
    """It ended as a ValueError; an empty file as Ctrl-C."""
    file, entry = place
    made = corpus.load_corpus(str(file), tokenizer)
    tokens, ends = np.array(made.tokens), made.ends  # a copy: the file is mapped
    content = (entry / name).read_bytes()
    if damage == "gone":
        (entry / name).unlink()
    elif damage == "another's":
        np.save(entry / name, np.arange(3, dtype=np.uint16 if name == "tokens.npy" else np.int64))
    else:
        bad = {"empty": b"", "cut": content[:-4], "other bytes": b"\xff" * len(content)}[damage]
        (entry / name).write_bytes(bad)
    said: list[str] = []
    again = corpus.load_corpus(str(file), tokenizer, say=said.append)
    assert "is damaged: it is made anew" in said[0]
    assert np.array_equal(again.tokens, tokens) and np.array_equal(again.ends, ends)
    said.clear()
    corpus.load_corpus(str(file), tokenizer, say=said.append)
    assert not said


def test_ids_may_have_gaps():
    """An end of text at 70,000 behind three words was an OverflowError."""
    words = {"a": 0, "b": 1, "<unk>": 2, "</s>": 70_000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokens, ends = corpus.build_corpus(["a b a"], gaps)
    assert (tokens.tolist(), ends.tolist()) == ([0, 1, 0, 70_000], [4])
    shape = Architecture(type="llama", settings={"hidden_size": 8, "num_attention_heads": 1})
    assert random_config(shape, None, 8, gaps).vocab_size == 70_001
