"""What a name means, or an error that says which name would have worked."""

import re

import pytest

from sparsek_cli import hub
from sparsek_cli.errors import UsageError
from sparsek_cli.model_folder.short_names import SHORT_NAMES
from sparsek_cli.scorers_alone import find


def test_every_short_name_is_a_hub_id_of_a_known_family():
    from sparsek_cli.models import FAMILIES

    for name, row in SHORT_NAMES.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.hub_id), name
        assert row.family in FAMILIES and name == name.lower()
    for name in ("llama-7b", "llama-3.1-8b", "qwen3-4b", "pythia-410m", "gpt2", "mistral-7b"):
        assert name in SHORT_NAMES


@pytest.mark.parametrize(
    "name",
    ["o/m", "o/m-1.5_b", "o1/m.gguf", "o/m--q3", "o/m..q3", "o--x/m", "o/m-", "o/m.", "o./m",
     "o-/m", "o/m.git", f"o/{'m' * 96}", f"o/{'m' * 97}", f"{'o' * 97}/m", "o/mé", "o/m\n",
     "_o/m", "o/_m", "_/_", "o_/m_", ".o/m", "o/.m", "-o/m", "o/-m", "_.o/m"],
)  # fmt: skip
def test_a_hub_id_is_what_the_hub_takes_for_one(name):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from sparsek_cli.data.text.find_files import is_hub_id as is_dataset

    try:
        validate_repo_id(name)
        valid = True
    except HFValidationError:
        valid = False
    assert hub.is_hub_id(name) is valid
    assert is_dataset(name) is valid


@pytest.mark.parametrize(
    ("name", "error", "hint"),
    [
        ("qwen3-4", "unknown model 'qwen3-4'", "did you mean 'qwen3-4b'?"),
        ("tinny", "unknown model 'tinny'", "did you mean 'tiny'?"),
        ("./nowhere", "no such folder: './nowhere'", "check the path"),
        ("/a/b/c", "no such folder", "check the path"),
        ("", "empty", "name a folder"),
        ("models/q4.gguf", "no such file: 'models/q4.gguf'", "check the path"),
        ("models/model.safetensors", "no such file", "check the path"),
        ("./deep/q4.gguf", "no such file: './deep/q4.gguf'", "check the path"),
        ("~/models/q4.GGUF", "no such file", "check the path"),
        ("a/b/q4.gguf", "no such file: 'a/b/q4.gguf'", "check the path"),
        ("what is this", "unknown model", "--list-models"),
        ("o/m.git", "no such folder: 'o/m.git'", "no .git at its end"),
        (f"o/{'m' * 97}", "no such folder", "at most 96 characters"),
    ],
)
def test_unknown_names(name, error, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(error)) as caught:
        hub.resolve(name)
    assert hint in caught.value.hint and caught.value.exit_code == 2


ELSEWHERE = {
    "https://huggingface.co/Qwen/Qwen3-0.6B": "on the hub it is Qwen/Qwen3-0.6B",
    "https://huggingface.co/Qwen/Qwen3-0.6B/": "on the hub it is Qwen/Qwen3-0.6B",
    "https://huggingface.co/Qwen/Qwen3-0.6B/tree/main": "on the hub it is Qwen/Qwen3-0.6B",
    "huggingface.co/Qwen/Qwen3-0.6B?x=1": "on the hub it is Qwen/Qwen3-0.6B",
    "hf.co/Qwen/Qwen3-0.6B": "on the hub it is Qwen/Qwen3-0.6B",
    "hf://Qwen/Qwen3-0.6B@v1": "on the hub it is Qwen/Qwen3-0.6B --revision v1",
    "hf://models/Qwen/Qwen3-0.6B": "on the hub it is Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-0.6B@refs%2Fpr%2F1": "--revision refs%2Fpr%2F1",
    "Qwen/Qwen3-0.6B/": "on the hub it is Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-0.6B/tree/v1": "on the hub it is Qwen/Qwen3-0.6B --revision v1",
    "Qwen/Qwen3-0.6B/model.safetensors": "on the hub it is Qwen/Qwen3-0.6B",
    "o/m-GGUF:Q4_K_M": "`hf download o/m-GGUF --include '*Q4_K_M*.gguf' --local-dir DIR`",
    "hf.co/o/m-GGUF:Q4_K_M": "`hf download o/m-GGUF --include '*Q4_K_M*.gguf' --local-dir DIR`",
    "o/m-GGUF/m.q4.gguf": "`hf download o/m-GGUF m.q4.gguf --local-dir DIR`",
    "https://huggingface.co/o/m-GGUF/blob/main/a/m.gguf": "`hf download o/m-GGUF a/m.gguf",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_as_pages_and_other_programs_write_them(name, tmp_path, monkeypatch):
    """All were folders that are not there, and the path was to be checked."""
    monkeypatch.chdir(tmp_path)
    for read in (hub.resolve, hub.tokenizer_of, find.read):
        with pytest.raises(UsageError) as caught:
            read(name)
        assert ELSEWHERE[name] in caught.value.hint


@pytest.mark.parametrize(
    "name", ["./o/m/", "/o/m@v1", "a/b/c", "../o/m", "here/m/", "here/m@v1", "s3://b/x", "~/o/m/x",
             "o/m/c/d.txt", "https://example.org/o/m"],
)  # fmt: skip
def test_a_path_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UsageError) as caught:
        hub.resolve(name)
    assert "hub" not in caught.value.hint


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("https://huggingface.co/datasets/o/d", "on the hub it is o/d"),
        ("hf://datasets/o/d", "on the hub it is o/d"),
        ("https://example.org/a.txt", "fetch it into a file first"),
        ("s3://bucket/a.jsonl", "fetch it into a file first"),
    ],
)
def test_addresses_of_data_are_shown_as_they_were_given(place, hint):
    from sparsek_cli.data.text.find_files import find_files

    with pytest.raises(UsageError, match=re.escape(f"no such file or folder: '{place}'")) as caught:
        find_files(place)
    assert hint in caught.value.hint


def test_nearest_folder_is_named(checkpoint, tmp_path):
    folder = checkpoint("my-model")
    with pytest.raises(UsageError) as caught:
        hub.resolve(tmp_path / "my-modle")
    assert str(folder) in caught.value.hint


@pytest.mark.parametrize("read", [hub.resolve, hub.tokenizer_of, find.read])
def test_a_file_that_is_missed_in_a_folder_here_is_not_asked_of_the_hub(
    checkpoint, tmp_path, monkeypatch, read
):
    """It took up to eight seconds; a revision, or the hub's cache, says that it is a name there."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    folder = checkpoint("owner")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    asked = []

    def fetch(hub_id, **options):
        asked.append(hub_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(UsageError, match="no such file: 'owner/model-q3.gguf'|no scorers") as error:
        read("owner/model-q3.gguf")
    assert "owner/model-q4.gguf" in error.value.hint or read is find.read
    assert not asked
    assert hub.resolve("owner/model-q3.gguf", "main").source == "owner/model-q3.gguf"
    assert hub.resolve("owner/model-q3").source == "owner/model-q3"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    fetched = tmp_path / "cache" / "models--owner--model-q3.gguf" / "snapshots" / "0"
    fetched.mkdir(parents=True)
    (fetched / "model-q3.gguf").write_bytes(b"")  # of such a repository there is no config.json
    assert hub.resolve("owner/model-q3.gguf").source == "owner/model-q3.gguf"


@pytest.mark.parametrize("read", [hub.resolve, hub.tokenizer_of, find.read])
@pytest.mark.parametrize("name", ["owner/model--q3.gguf", "owner/model..gguf"])
def test_what_is_no_name_on_the_hub_is_a_file_that_is_missed(tmp_path, monkeypatch, read, name):
    """The hub's library ended in its own HFValidationError."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        read(name)
    (tmp_path / "owner").mkdir()
    with pytest.raises(UsageError, match=f"no such file: '{name}'|no scorers"):
        read(name)
