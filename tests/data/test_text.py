"""Reading documents: every file type, and what is said when a file is not what it seems."""

import json
import os

import pytest
import zstandard

from sparsek_cli.data.text.documents import iterate_texts
from sparsek_cli.data.text.find_files import find_files, is_hub_id
from sparsek_cli.errors import SparsekError, UsageError


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def zst(path):
    packed = path.with_name(path.name + ".zst")
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    return packed


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_every_type_gives_its_documents(tmp_path):
    rows = [{"text": "one"}, {"text": "  "}, {"text": "zwei ü"}]
    files = [jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "b.parquet", rows)]
    for name in ("c.txt", "d.md", "e.py"):
        (tmp_path / name).write_text(f"text of {name}\r\nline", encoding="utf-8")
        files.append(tmp_path / name)
    for file in files:
        assert list(iterate_texts(zst(file))) == list(iterate_texts(file))
    assert list(iterate_texts(files[0])) == ["one", "zwei ü"]
    assert list(iterate_texts(files[1])) == ["one", "zwei ü"]
    assert list(iterate_texts(files[2])) == ["text of c.txt\nline"]
    assert list(iterate_texts(str(files[0]))) == ["one", "zwei ü"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_packed_file_whose_end_is_missing_is_not_the_whole(tmp_path, name):
    """zstandard's own stream ends there without a word, and half a text was trained on."""
    rows = [{"text": f"row {number}, {os.urandom(60).hex()}"} for number in range(3000)]
    plain = tmp_path / name
    if name == "a.parquet":
        parquet(plain, rows)
    else:
        jsonl(plain, rows)
    packed = zst(plain)
    whole = packed.read_bytes()
    assert len(list(iterate_texts(packed))) == (1 if name == "a.txt" else 3000)
    for size in (len(whole) // 2, len(whole) - 1, 3):
        packed.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=f"{name}.zst is cut short"):
            list(iterate_texts(packed))
    packed.write_bytes(whole + whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=f"{name}.zst is cut short"):
        list(iterate_texts(packed))


def test_suffixes_may_be_in_capitals(tmp_path):
    """A folder's NOTES.TXT was left out, and named alone it was of an unknown type."""
    text = {"A.TXT": "one", "B.Jsonl": '{"text": "two"}\n'}
    for name, content in text.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "C.TXT.ZST").write_bytes(zstandard.compress(b"three"))
    assert list(iterate_texts(tmp_path)) == ["one", "two", "three"]
    assert not is_hub_id("owner/NOTES.TXT")


def test_what_a_folder_holds_beside_text_is_said(tmp_path, caplog):
    for name in ("a.txt", "b.csv", "c.csv", "d.json", ".hidden.csv", "LICENSE"):
        (tmp_path / name).write_text("text")
    assert [path.name for path in find_files(tmp_path)] == ["a.txt"]
    (line,) = caplog.messages
    assert line.endswith("2 .csv, 1 LICENSE, 1 .json")
    caplog.clear()
    assert find_files(tmp_path / "a.txt") and not caplog.messages


def test_folders_and_globs_are_sorted_and_counted_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    names = [file.name for file in find_files([tmp_path, str(tmp_path / "*.txt")])]
    assert names == ["a.txt", "b.txt", "c.txt"]


def test_hidden_folders_are_left_out_as_hidden_files_are(tmp_path, caplog):
    """.git, .venv and .ipynb_checkpoints were read: somebody's text twice, and programs."""
    for name in ("a.txt", ".venv/lib/pip.py", "sub/.ipynb_checkpoints/a.txt", ".git/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in find_files(tmp_path)] == ["a.txt"]
    assert not caplog.messages
    # Asked for by name, they are.
    assert [f.name for f in find_files(tmp_path / ".venv")] == ["pip.py"]
    assert [f.name for f in find_files(str(tmp_path / "sub/../.venv/*/*.py"))] == ["pip.py"]


def test_another_column(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"id": 1, "input": "story"}])
    assert list(iterate_texts(file, column="input")) == ["story"]
    with pytest.raises(UsageError, match=r"no column 'text'; it has: id, input"):
        list(iterate_texts(file))
    file = parquet(tmp_path / "a.parquet", [{"id": 1, "input": "story"}])
    with pytest.raises(UsageError, match=r"no column 'text'; it has: id, input"):
        list(iterate_texts(file))
    with pytest.raises(UsageError, match="column 'id' holds int"):
        list(iterate_texts(file, column="id"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a.txt is not UTF-8 text: byte 0xff at position 5"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"position 24"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b"[1, 2]\n", r"a.jsonl:1: not a JSON object"),
        ("a.txt", b"  \n", r"no text in .*a.txt"),
        ("a.txt", b"", r"no text in .*a.txt"),
        ("a.txt.zst", b"no zstandard frame", r"a.txt.zst is not a readable .zst file"),
        ("a.parquet", b"no parquet", r"a.parquet is not a readable parquet file"),
        ("a.doc", b"text", r"unknown file type"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(iterate_texts(tmp_path / name))


@pytest.mark.parametrize("make", [os.mkfifo, None])
def test_devices_and_pipes_are_called_so(tmp_path, make):
    """A shell's <(command) is one; it exists, and is read more than once."""
    file = tmp_path / "pipe" if make else os.devnull
    if make:
        make(file)
    with pytest.raises(UsageError, match="is no plain file") as refused:
        find_files(file)
    assert "write its text into a file" in refused.value.hint


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder"):
        find_files(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="holds no text files"):
        find_files(tmp_path)
    with pytest.raises(UsageError, match="no text file matches"):
        find_files(str(tmp_path / "*.txt"))
    with pytest.raises(SparsekError, match="HF_HUB_OFFLINE is set and dataset 'nobody/nothing-h"):
        next(iterate_texts("nobody/nothing-here"))


def test_an_unreachable_hub_is_asked_once_and_what_is_cached_is_read(monkeypatch):
    """It was asked for half a minute, again and again."""
    import datasets
    import huggingface_hub

    asked = []

    def unreachable(api, repo, **options):
        asked.append((repo, options["repo_type"]))
        raise ConnectionError("nobody answers")

    def load(hub_id, *rest, **options):
        assert datasets.config.HF_HUB_OFFLINE, "or it would ask the hub itself"
        if hub_id == "owner/cached":
            return [{"text": "a"}]
        raise ConnectionError("it is not there")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(iterate_texts("owner/cached")) == ["a"]
    with pytest.raises(
        SparsekError, match="hub cannot be reached and dataset 'owner/none'"
    ) as told:
        next(iterate_texts("owner/none"))
    assert "connect, or name a local file" in told.value.hint
    assert asked == [("owner/cached", "dataset"), ("owner/none", "dataset")]
    assert not datasets.config.HF_HUB_OFFLINE
    # Of a hub that answers nothing is read either where datasets are told not to ask it.
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(SparsekError, match="HF_DATASETS_OFFLINE is set and dataset") as told:
        next(iterate_texts("owner/none"))
    assert told.value.hint.startswith("unset it, or name a local file")


def test_what_a_shell_hands_over_as_a_file_is_a_pipe():
    """<(zcat a.gz) is a link to one: there was "no such file or folder", and it was there."""
    reader, writer = os.pipe()
    try:
        with pytest.raises(UsageError, match="is no plain file: it cannot be read twice"):
            find_files(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)


def test_a_message_names_some_columns_of_many(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({f"k{i}": i for i in range(10_000)}) + "\n")
    with pytest.raises(UsageError, match="no column 'text'; it has: k0, k1, .*, k11, [.]{3}"):
        list(iterate_texts(file))


def test_a_file_missed_in_a_folder_here_is_no_dataset(tmp_path, monkeypatch):
    """data/trian.csv was asked of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert not is_hub_id("data/trian.csv") and not is_hub_id("data/corpus.json")
    assert is_hub_id("data/news.en")  # of wmt, say
    assert is_hub_id("data/corpus-v1.1") and is_hub_id("owner/corpus.json")
    with pytest.raises(UsageError, match="no such file or folder: 'data/trian.csv'"):
        find_files("data/trian.csv")
