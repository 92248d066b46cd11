"""What is fetched for a name, and what is said where the hub or its cache refuses."""

import errno
import json

import pytest

from sparsek_cli import hub
from sparsek_cli.errors import SparsekError, UsageError


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
    "name", ["../..", "a..b", "a b", "-x", "/a", "a/", "a//b", "a\0b", "a.lock", "a~1", "a" * 300]
)
@pytest.mark.parametrize("model", ["owner/model", "qwen3-0.6b"])
def test_what_is_no_name_of_a_revision_is_asked_of_nobody(monkeypatch, name, model):
    """The cache makes a path of it: `../..` was "the hub's cache cannot be used"."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UsageError, match="is no name of a revision"):
        hub.resolve(model, name)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_revision_is_a_variable_that_is_not_set(name):
    with pytest.raises(UsageError, match="the revision is empty"):
        hub.resolve("owner/model", name)


@pytest.mark.parametrize("name", ["main", "v1.0", "refs/pr/1", "a" * 40, "feature/x_y-z", "grün"])
def test_names_of_revisions_are_asked_for(checkpoint, monkeypatch, name):
    import huggingface_hub

    folder, asked = checkpoint(), []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **o: asked.append(o) or str(folder)
    )
    assert hub.resolve("owner/model", name).revision == asked[0]["revision"] == name


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`cached("dev", ...)`: the hub's cache has owner/model of these revisions; there is no way
    to the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(*revisions):
        for number, revision in enumerate(revisions):
            folder = tmp_path / "models--owner--model"
            (folder / "snapshots" / str(number)).mkdir(parents=True)
            file = folder / "refs" / revision
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(number))

    return make


@pytest.mark.parametrize("asked", [None, "v2"])
def test_other_revisions_in_the_cache_are_named(cached, asked):
    """It was said that the model is not in the cache."""
    cached("refs/pr/1", "dev")
    said = f"the cache has no {asked or 'main'} of 'owner/model'"
    with pytest.raises(SparsekError, match=said) as error:
        hub.resolve("owner/model", asked)
    assert error.value.hint == "unset it, or name what is there: --revision dev"


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _without_config(folder):
    (folder / "config.json").unlink()


def _dangling(folder):
    (folder / "tokenizer.json").symlink_to("../../blobs/gone")


def _without_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("cut", "lacking"),
    [
        (_without_weights, "its weights"),
        (_without_config, "config.json"),
        (_dangling, "tokenizer.json"),
        (_without_a_shard, "model-2.safetensors"),
    ],
)
def test_a_download_that_was_interrupted_is_told_as_that(
    checkpoint, monkeypatch, cached, cut, lacking
):
    """The hints were about a folder, which nobody had named: "fetch the model again"."""
    import huggingface_hub

    folder = checkpoint()
    cut(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    with pytest.raises(SparsekError, match=f"'owner/model' without {lacking}") as error:
        hub.resolve("owner/model")
    assert error.value.hint.startswith("unset it and run the same command again")
    # Where the hub answers, the repository itself lacks it.
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    try:
        hub.resolve("owner/model")
    except SparsekError as other:
        assert "the cache has" not in other.message


def test_a_damaged_file_of_the_cache_is_fetched_anew_by_what_the_hint_says(checkpoint, monkeypatch):
    """The same command would take it from the cache again, for ever."""
    import huggingface_hub

    folder = checkpoint()
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    cut = len(header).to_bytes(8, "little") + header + b"half of"
    (folder / "model.safetensors").write_bytes(cut)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    for revision, at in ((None, ""), ("v1", " --revision v1")):
        with pytest.raises(SparsekError, match="truncated shard") as error:
            hub.resolve("owner/model", revision)
        command = f"`hf download owner/model{at} --force-download`"
        assert error.value.hint == f"{command} fetches it anew"
