"""Names become checkpoints, or an error that says which name would have worked."""

import errno
import json
import re

import pytest
from bad_models import MODELS

from sparsek_cli import hub
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.model_folder.short_names import SHORT_NAMES
from sparsek_cli.scorers_alone import find


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(name, config, *files)` writes a folder that looks like one."""

    def make(name="base", config=None, *files):
        folder = tmp_path / name
        folder.mkdir()
        config = {"architectures": ["LlamaForCausalLM"]} if config is None else config
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        for file in files or ("model.safetensors",):
            # Of safetensors the shortest: a header that lists nothing.
            empty = (2).to_bytes(8, "little") + b"{}"
            (folder / file).write_bytes(empty if file.endswith(".safetensors") else b"")
        return folder

    return make


def test_folder(checkpoint):
    found = hub.resolve(checkpoint("my-model"))
    assert (found.name, found.source, found.revision) == ("my-model", "folder", None)
    assert found.config()["architectures"] == ["LlamaForCausalLM"]


def test_short_names_and_hub_ids_are_fetched_without_pickles(checkpoint, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(hub_id, **options):
        asked.update(hub_id=hub_id, **options)
        return str(folder)

    folder = checkpoint()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = hub.resolve("Qwen3-4B", "v1")
    assert (found.name, found.source) == ("qwen3-4b", "Qwen/Qwen3-4B")
    assert asked["hub_id"] == "Qwen/Qwen3-4B" and asked["revision"] == "v1"
    assert "*.bin" in asked["ignore_patterns"] and "*.safetensors" in asked["allow_patterns"]
    assert hub.resolve("owner/some-model").name == "some-model"


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".gguf", ".safetensors"])
def test_a_repository_may_be_called_as_a_file_is(checkpoint, monkeypatch, suffix):
    """Only where there is none of that name, it is a file that is missed."""
    import huggingface_hub

    folder = checkpoint()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert hub.is_hub_id(f"owner/name{suffix}")
    assert hub.resolve(f"owner/name{suffix}").source == f"owner/name{suffix}"

    def none(*args, **options):
        raise _hub_errors()[1][0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", none)
    with pytest.raises(UsageError, match=f"no such file: 'owner/name{suffix}'") as caught:
        hub.resolve(f"owner/name{suffix}")
    assert "the hub has no model of that name" in caught.value.hint


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


def test_of_a_tokenizer_no_weights_are_fetched(checkpoint, monkeypatch):
    import huggingface_hub

    asked = []

    def fetch(hub_id, **options):
        asked.append((hub_id, options["allow_patterns"]))
        return str(folder)

    folder = checkpoint()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.tokenizer_of("qwen3-4B").source == "Qwen/Qwen3-4B"
    assert hub.tokenizer_of("owner/some-model").name == "some-model"
    assert [name for name, _ in asked] == ["Qwen/Qwen3-4B", "owner/some-model"]
    assert all("tokenizer*" in p and "*.safetensors" not in p for _, p in asked)
    assert hub.tokenizer_of(str(folder)).path == folder and len(asked) == 2
    assert hub.tokenizer_of("tiny").source == "bundled"


def test_every_short_name_is_a_hub_id_of_a_known_family():
    from sparsek_cli.models import FAMILIES

    for name, row in SHORT_NAMES.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.hub_id), name
        assert row.family in FAMILIES and name == name.lower()
    for name in ("llama-7b", "llama-3.1-8b", "qwen3-4b", "pythia-410m", "gpt2", "mistral-7b"):
        assert name in SHORT_NAMES


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


def test_nearest_folder_is_named(checkpoint, tmp_path):
    folder = checkpoint("my-model")
    with pytest.raises(UsageError) as caught:
        hub.resolve(tmp_path / "my-modle")
    assert str(folder) in caught.value.hint


@pytest.mark.parametrize(
    ("config", "files", "error"),
    [
        ({"architectures": ["BertForMaskedLM"]}, (), "not a causal language model"),
        ({"architectures": ["LlamaForCausalLM"]}, ("pytorch_model.bin",), "pickled weights"),
        ({"architectures": ["LlamaForCausalLM"]}, ("notes.txt",), "no .safetensors"),
        ("{not json", (), "not valid JSON"),
        ("[1]", (), "no JSON object"),
    ],
)
def test_folders_that_are_no_causal_lm(checkpoint, config, files, error):
    with pytest.raises(UsageError, match=error):
        hub.resolve(checkpoint("base", config, *files))


def test_not_a_checkpoint_at_all(tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        hub.resolve(tmp_path)
    (tmp_path / "file.txt").touch()
    with pytest.raises(UsageError, match="is a file"):
        hub.resolve(tmp_path / "file.txt")


def test_revision_belongs_to_the_hub(checkpoint):
    with pytest.raises(UsageError, match="--revision"):
        hub.resolve(checkpoint(), "main")
    with pytest.raises(UsageError, match="--revision"):
        hub.resolve("tiny", "main")


def test_offline_says_how_to_place_the_files():
    with pytest.raises(SparsekError, match="not in the cache") as caught:
        hub.resolve("nobody/never-cached-model")
    assert "copy config.json" in caught.value.hint and caught.value.exit_code == 1


def _hub_errors():
    from huggingface_hub import errors

    def http(kind):
        error = kind.__new__(kind)
        Exception.__init__(error, "403 Client Error\nmore")
        return error

    return [
        (http(errors.GatedRepoError), "gated", "hf auth login"),
        (http(errors.RepositoryNotFoundError), "no model", "check the spelling"),
        (http(errors.RevisionNotFoundError), "no revision", "branches"),
        (http(errors.HfHubHTTPError), "refused", "try again"),
        (errors.HFValidationError("bad"), "no valid hub id", "owner/name"),
        (ConnectionError("no route"), "not in the cache", "copy config.json"),
        (TimeoutError("slow"), "not in the cache", "copy config.json"),
    ]


@pytest.mark.parametrize("case", range(7))
def test_what_the_hub_may_answer(monkeypatch, case):
    import huggingface_hub

    error, message, hint = _hub_errors()[case]

    def fetch(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(SparsekError, match=message) as caught:
        hub.resolve("owner/model")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "raised",
    [OSError(errno.ENOSPC, "No space left on device"),
     NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/file/token"),
     PermissionError(errno.EACCES, "Permission denied", "/locked/hub")],
)  # fmt: skip
def test_a_cache_that_cannot_be_written_is_not_called_a_network_error(monkeypatch, raised):
    import huggingface_hub

    def fetch(*args, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(SparsekError, match=raised.strerror) as caught:
        hub.resolve("owner/model")
    assert "cache" in caught.value.message and "HF_HOME" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("adapter-within", "holds adapter weights .base_model.model"),
        ("peft-wrapped", "from within PEFT's wrapper.*such as base_model."),
        ("peft-layers", "from within PEFT's wrapper.*q_proj.base_layer"),
        ("parallel-wrapped", "from within torch's DataParallel.*such as module."),
        ("compiled", "from within torch.compile.*such as _orig_mod."),
    ],
)
def test_tensors_within_a_wrapper_are_told_as_such(make_checkpoint, tmp_path, kind, says):
    """Names with a prefix were told as weights that are lacking."""
    MODELS[kind](make_checkpoint(tmp_path / "good"), tmp_path / "bad")
    with pytest.raises(UsageError, match=says) as refused:
        hub.resolve(tmp_path / "bad")
    assert "save_pretrained(OUT)" in refused.value.hint
