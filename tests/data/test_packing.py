"""Packing and mixing: nothing lost, nothing seen twice, and item i depends on the seed and i."""

import numpy as np
import pytest

from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.data.copy_source import CopySource
from sparsek_cli.data.corpus import Corpus, load_corpus
from sparsek_cli.data.mixture import Mixture
from sparsek_cli.data.packing import PackedDocuments, PackedText, collate


def corpus(*lengths):
    """Documents of these lengths whose tokens are all different."""
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1], dtype=np.uint32)
    return Corpus(tokens, ends - np.asarray(lengths), ends)


def test_an_epoch_covers_the_text_once():
    data = corpus(5, 17, 40, 1, 33)
    packed = PackedText(data, 16, seed=(3,))
    assert packed.per_epoch == 6
    for epoch in range(3):
        rows = [packed(epoch * 6 + i).ids for i in range(6)]
        seen = np.concatenate(rows)
        assert len(np.unique(seen)) == len(seen) == 96
    orders = [tuple(packed(epoch * 6).ids) for epoch in range(3)]
    assert len(set(orders)) == 3


def test_starts_are_where_documents_begin():
    data = corpus(5, 17, 40, 1, 33)
    begins = set(data.starts.tolist())
    packed = PackedText(data, 16, seed=(0,))
    for i in range(12):
        row = packed(i)
        for at in range(1, 16):
            fresh = row.ids[at] != row.ids[at - 1] + 1
            assert (at in row.starts) == (fresh or int(row.ids[at]) in begins)
        assert (row.roles[list(row.starts)] == IGNORED).all()
        assert (np.delete(row.roles, row.starts) == TEXT).all()


def test_a_text_shorter_than_a_sequence_repeats():
    row = PackedText(corpus(3, 4), 16, seed=(0,))(5)
    assert len(row.ids) == 16 and set(row.ids) == set(range(7))


def test_generated_documents_fill_a_sequence():
    def source(rng, length):
        size = min(length, int(rng.integers(20, 30)))
        return np.full(size, 7), np.full(size, ANSWER)

    packed = PackedDocuments(source, 100, (1, 2), document_length=32, pad_id=9)
    row = packed(4)
    assert len(row.ids) == 100 and len(row.starts) >= 3
    assert (row.roles[row.ids == 9] == IGNORED).all()
    assert (row.ids == packed(4).ids).all()
    one = PackedDocuments(source, 100, (1, 2), pad_id=9)(0)
    assert one.starts[0] == 0 and len(one.starts) == 2 and one.ids[-1] == 9


def test_copies_come_back():
    rng = np.random.default_rng(0)
    ids, roles = CopySource(corpus(500), (8, 20))(rng, 100)
    repeated = np.flatnonzero(roles == ANSWER)
    assert 4 <= len(repeated) <= 16
    first = int(np.flatnonzero(ids == ids[repeated[0]])[0])
    assert (ids[first : first + len(repeated)] == ids[repeated]).all()


def test_the_mixture_is_a_function_of_seed_and_index():
    sources = {"a": PackedText(corpus(300), 8, (0,)), "b": PackedText(corpus(500), 8, (1,))}
    long = Mixture(sources, {"a": 3.0, "b": 1.0}, 2000, seed=5)
    short = Mixture(sources, {"a": 3.0, "b": 1.0}, 40, seed=5)
    for i in reversed(range(40)):
        assert (short[i]["input_ids"] == long[i]["input_ids"]).all()
    share = np.mean([long.name_of(i) == "a" for i in range(2000)])
    assert share == pytest.approx(0.75, abs=0.03)


def test_collate_marks_bounds_over_the_whole_batch():
    rows = [
        {"input_ids": np.arange(6), "roles": np.ones(6, np.int8), "starts": s, "index": i}
        for i, s in enumerate([(0, 4), (0,)])
    ]
    batch = collate(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert batch["cu_seq_lens"].tolist() == [0, 4, 6, 12]
    assert "cu_seq_lens" not in collate(rows[1:])


def test_held_out_documents_are_not_trained_on():
    kept, held = corpus(*[50] * 20).split(0.1, seed=1)
    assert len(kept) == 18 and len(held) == 2
    assert not set(kept.starts) & set(held.starts)
    kept, held = corpus(100).split(0.1, seed=1)
    assert kept.total == 90 and held.total == 10


def test_the_cache_is_used_until_text_or_tokenizer_change(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "a.txt"
    file.write_text("hello world")
    said = []
    first = load_corpus(str(file), tokenizer, say=said.append)
    again = load_corpus(str(file), tokenizer, say=said.append)
    assert len(said) == 1 and (first.tokens == again.tokens).all()
    assert tokenizer.decode(first.document(0)[:-1]) == "hello world"
    assert first.document(0)[-1] == tokenizer.eos_token_id
    file.write_text("hello again")
    assert len(load_corpus(str(file), tokenizer, say=said.append)) == 1
    assert len(said) == 2
