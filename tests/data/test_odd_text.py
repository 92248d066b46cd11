"""Text that is not what it seems: accepted properly, or refused with its file and row."""

import json

import pytest

from sparsek_cli.data.text import iterate_texts
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
