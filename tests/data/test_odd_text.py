"""Text that is not what it seems: accepted properly, or refused with its file and row."""

import json

import pytest

from sparsek_cli.data import corpus
from sparsek_cli.data.text.documents import iterate_texts
from sparsek_cli.errors import UsageError


def test_half_a_surrogate_pair_is_refused_by_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(UsageError, match=r"rows.jsonl:2: the text is not valid Unicode"):
        list(iterate_texts(file))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhello".encode())
    (tmp_path / "b.jsonl").write_bytes(("\ufeff" + json.dumps({"text": "hello"})).encode())
    assert list(iterate_texts(tmp_path)) == ["hello", "hello"]


def test_utf_16_is_refused_with_a_hint_that_works(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("hello".encode("utf-16"))
    with pytest.raises(UsageError, match="UTF-16") as caught:
        list(iterate_texts(file))
    assert "iconv -f utf-16 -t utf-8" in caught.value.hint


def test_nulls_are_blank_and_parquet_rows_have_numbers(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(texts, tmp_path / "a.parquet")
    assert list(iterate_texts(tmp_path / "a.parquet")) == ["one", "two"]
    with pytest.raises(UsageError, match="a.parquet: row 1: column 'n' holds int"):
        list(iterate_texts(tmp_path / "a.parquet", column="n"))


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize(("column", "turns"), [("messages", TURNS), ("conversations", SHARED)])
@pytest.mark.parametrize("asked", [None, "named"])
def test_conversations_are_refused_by_row_and_the_hint_works(
    tmp_path, tokenizer, column, turns, asked
):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "chats.jsonl"
    file.write_text("\n" + json.dumps({column: turns}) + "\n")
    table = pyarrow.Table.from_pylist([{column: turns}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for path, where in ((file, "chats.jsonl:2"), (tmp_path / "a.parquet", "a.parquet")):
        with pytest.raises(UsageError, match=f"{where}.*: column '{column}' holds convers") as no:
            list(iterate_texts(path, column=asked and column))
    assert "tokenizer.apply_chat_template(" in no.value.hint
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    file.write_text(json.dumps({"text": text}) + "\n")
    assert list(iterate_texts(file)) == [text]


def test_a_null_under_a_name_of_conversations_is_only_a_null(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"dialogue": null, "id": 1}\n{"dialogue": "a play", "id": 2}\n')
    assert list(iterate_texts(file, column="dialogue")) == ["a play"]


def test_what_has_no_end_is_refused(tmp_path, monkeypatch):
    import zstandard

    from sparsek_cli.data.text import read_files

    monkeypatch.setattr(read_files, "LARGEST", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "' + "x" * 100 + '"}\n')
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"x" * 101))
    for file, where in (("a.jsonl", "a.jsonl:2"), ("b.txt.zst", "b.txt.zst")):
        with pytest.raises(UsageError, match=f"{where}: a document of more than"):
            list(iterate_texts(tmp_path / file))


def test_a_long_document_is_read_in_pieces_and_says_how_far_it_is(tokenizer, monkeypatch):
    """The same ids as at once, where there are spaces to cut at."""
    from sparsek_cli.data import corpus

    said = []
    prose = "\n".join(f"Line {i}: the harbour  master counted {7 * i} crates." for i in range(60))
    documents = ["short one", prose, "another short one", "x" * 999]
    whole, ends = corpus.build_corpus(documents, tokenizer)
    monkeypatch.setattr(corpus, "PIECE", 300)
    monkeypatch.setattr(corpus, "SILENCE", 0.0)
    pieces, ends_of_pieces = corpus.build_corpus(documents, tokenizer, say=said.append)
    assert whole.tolist() == pieces.tolist() and ends.tolist() == ends_of_pieces.tolist()
    assert len(said) > 10 and said[0].startswith("tokenised 0 million")


def test_a_text_of_unknown_tokens_is_told(tokenizer, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "crates": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    knows = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    told = {"crates crates crates": False, "who counted crates": True}
    for number, (text, expected) in enumerate(told.items()):
        file = tmp_path / f"{number}.txt"
        file.write_text(text)
        for _ in range(2):  # and once it is in the cache
            said = []
            corpus.load_corpus(str(file), knows, say=said.append)
            assert any("50% of the text's tokens are <unk>" in line for line in said) is expected
    said = []
    corpus.load_corpus(str(file), tokenizer, say=said.append)
    assert not any("tokens are" in line for line in said)


@pytest.mark.parametrize(
    ("content", "says", "hint"),
    [
        ("words ".encode("utf-16-le"), "a null byte at position 1", "iconv -f utf-16le"),
        ("words ".encode("utf-16-be"), "a null byte at position 0", "iconv"),
        ("words ".encode("utf-32"), "begins as UTF-32 does", "iconv -f utf-32 "),
        (b"words\x00words", "a null byte at position 5", "clean it"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_only_seems_to_be_utf_8(tmp_path, content, says, hint, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says) as refusal:
        list(iterate_texts(tmp_path / name))
    assert hint in refusal.value.hint


@pytest.mark.parametrize(
    "kind", ["binary", "numbers", "lists", "all null", "nothing", "dictionary"]
)
def test_columns_of_parquet(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    values = {
        "binary": pyarrow.array([b"words"]), "numbers": pyarrow.array([1.5]),
        "lists": pyarrow.array([["words"]]), "all null": pyarrow.array([None, None]),
        "nothing": pyarrow.array([], pyarrow.string()),
        "dictionary": pyarrow.array(["words"]).dictionary_encode(),
    }[kind]  # fmt: skip
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), file)
    if kind == "dictionary":  # text, written another way
        assert list(iterate_texts(file)) == ["words"]
        return
    with pytest.raises(UsageError, match=r"row 1: column 'text' holds|no text in") as refusal:
        list(iterate_texts(file))
    assert "a.parquet" in refusal.value.message
