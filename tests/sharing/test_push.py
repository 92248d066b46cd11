"""`sparsek push`, against a hub that only writes down what it was sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import sparsek_cli as sparsek
from sparsek_cli.app import app
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.sharing import push
from sparsek_cli.sharing.hub_card import split


class Hub:
    """What a hub was asked for, and the files it holds."""

    def __init__(self):
        self.made, self.files, self.refuses = None, {}, None

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.refuses:
            raise self.refuses
        self.made = (repo_id, private, exist_ok)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, **_):
        from huggingface_hub.utils import filter_repo_objects

        names = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*")]
        names = [name for name in names if (folder_path / name).is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            self.files[name] = (folder_path / name).read_bytes()

    def create_commit(self, repo_id, operations, **_):
        self.files.update({op.path_in_repo: op.path_or_fileobj for op in operations})


@pytest.fixture
def online(monkeypatch) -> Hub:
    import huggingface_hub

    hub = Hub()
    for name in ("create_repo", "upload_folder", "create_commit"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


@pytest.fixture
def model(llama, tmp_path, convert) -> Path:
    """A conversion of a base whose card names a licence."""
    base = tmp_path / "base"
    shutil.copytree(llama[0], base)
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: some/else\n---\nA base.\n")
    return convert(base, tmp_path / "model")


def test_a_folder_goes_to_the_hub_with_its_card(model, online):
    done = CliRunner().invoke(app, ["push", str(model), "me/model", "--json", "-q"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"].endswith("me/model")
    assert online.made == ("me/model", True, True)  # private, unless told
    assert set(online.files) == {file.name for file in model.iterdir()}
    assert online.files["config.json"] == (model / "config.json").read_bytes()
    matter, text = split(online.files["README.md"].decode())
    assert matter["license"] == "mit" and "sparsek" in matter["tags"]
    assert "base_model" not in matter  # a folder is no name on the hub
    assert "SparseK attention" in text
    # Recipes name no folder of this machine.
    assert str(model.parent).encode() not in online.files["sparsek.yaml"]
    assert yaml.safe_load(online.files["sparsek.yaml"])["model"] == "base"


def test_a_dry_run_shows_everything_and_sends_nothing(model, online):
    words = ["push", str(model), "me/model", "--public", "--licence", "apache-2.0", "--dry-run"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    for word in ("me/model (public", "base-00001.safetensors", "license: apache-2.0", "nothing"):
        assert word in shown.stdout
    assert online.made is None and not online.files
    data = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert set(data["files"]) == {file.name for file in model.iterdir()} and not data["private"]


@pytest.mark.parametrize(
    ("licence", "says", "typed"),
    [
        ("", "the licence is empty", "mit"),
        (" ", "the licence is empty", "other"),
        ("Apache 2.0", "'Apache 2.0' is no name of a licence", "apache-2.0"),
        ("MIT", "'MIT' is no name of a licence", "mit"),
        ("mit\nx: y", "is no name of a licence", "mit-x-y"),
        ("--", "is no name of a licence", "apache-2.0"),
    ],
)
@pytest.mark.parametrize("option", ["--licence", "--license"])
def test_a_licence_that_is_none_is_refused(model, online, licence, says, typed, option):
    """An empty one, of a variable that is not set, was the base's; the hub refuses the others."""
    for dry in ([], ["--dry-run"]):
        with pytest.raises(UsageError, match=says) as refusal:
            CliRunner().invoke(
                app, ["push", str(model), "me/model", f"{option}={licence}", *dry],
                catch_exceptions=False,
            )  # fmt: skip
        assert typed in refusal.value.hint
        assert online.made is None and not online.files
    # As the hint says.
    words = ["push", str(model), "me/model", f"{option}={typed}", "--dry-run"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and f"license: {typed}" in shown.stdout
    left_out = CliRunner().invoke(app, [*words[:3], "--dry-run"])
    assert left_out.exit_code == 0 and "license: mit" in left_out.stdout  # the base's


def test_names_of_variables_that_are_not_set_are_no_folder(model, online, monkeypatch):
    """It was the folder that one is in."""
    monkeypatch.chdir(model)
    for words in (("", "me/model"), (str(model), "me/model", "--evaluation", "")):
        with pytest.raises(UsageError, match="name of a file or folder is empty"):
            CliRunner().invoke(app, ["push", *words, "--dry-run"], catch_exceptions=False)


def test_what_was_measured_is_in_the_card(model, online, tmp_path):
    (tmp_path / "text.txt").write_text("A boat and a house and a garden. " * 60)
    report = sparsek.evaluate(
        model, tmp_path / "report", tasks="ppl", text=[str(tmp_path / "text.txt")], lengths=[96],
        limit=1, baselines=["dense"], device="cpu", dtype="float32",
    )  # fmt: skip
    push.run(push.plan(model, "me/model", evaluation=tmp_path / "report"))
    matter, text = split(online.files["README.md"].decode())
    (found,) = [r for r in matter["model-index"][0]["results"] if r["dataset"]["type"] == "ppl"][:1]
    assert found["metrics"][0]["value"] == pytest.approx(report.score("ppl", "sparsek"))
    assert "dense" in text and "ppl" in text
    other = shutil.copytree(model, tmp_path / "other")
    with pytest.raises(UsageError, match="are of .*, not of") as refusal:
        push.plan(other, "me/other", evaluation=tmp_path / "report")
    assert "sparsek evaluate" in refusal.value.hint


def test_bases_of_the_hub_are_named(model, online, monkeypatch, tmp_path):
    """By the recipe of the folder, or of the one it was made from; licences are in the cache."""
    import huggingface_hub

    cached = tmp_path / "cached.md"
    cached.write_text("---\nlicense: llama3.2\n---\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: str(cached))
    recipe = model / "sparsek.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"model": "meta/llama"}))
    tuned = shutil.copytree(model, tmp_path / "tuned")
    (tuned / "sparsek.yaml").unlink()
    (tuned / "finetune.yaml").write_text(f"model: {model}\n")
    for folder in (model, tuned):
        matter = push.plan(folder, "me/x").matter
        assert (matter["base_model"], matter["license"]) == ("meta/llama", "llama3.2")


def test_a_damaged_base_is_not_sent(model, tmp_path):
    file = model / "base-00001.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-300] ^= 1  # where no sample is taken
    file.unlink()  # it may be the base's own
    file.write_bytes(flipped)
    with pytest.raises(SparsekError, match="is not what was written"):
        push.plan(model, "me/toy")
    # Its scorers would fit no base that anybody has.
    with pytest.raises(SparsekError, match="is not what was written"):
        sparsek.export_scorers(model, tmp_path / "scorers")
    with pytest.raises(SparsekError, match="is not what was written"):
        sparsek.export(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_checksum_of_other_programs_is_not_ours_to_compare(llama, tmp_path):
    base = shutil.copytree(llama[0], tmp_path / "base")
    file = sorted(base.glob("*.safetensors"))[0]
    tensors = load_file(file)
    file.unlink()  # it may be another's
    save_file(tensors, file, metadata={"format": "pt", "sha256": "of the file it was made from"})
    push.plan(sparsek.convert(base, tmp_path / "toy", calibrate="none").out, "me/toy")


def test_a_base_that_is_no_name_on_the_hub_is_not_named(model, online):
    """Its card was looked for in the cache, whose functions raise for such a name."""
    recipe = model / "sparsek.yaml"
    base = {"model": "models/llama--mine"}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | base))
    assert "base_model" not in push.plan(model, "me/x").matter


def test_scorers_alone_and_dense_models_go_too(model, online, tmp_path):
    for made in (
        sparsek.export_scorers(model, tmp_path / "scorers").out,
        sparsek.export(model, tmp_path / "dense").out,
    ):
        online.files.clear()
        push.run(push.plan(made, "me/other"))
        assert set(online.files) == {file.name for file in Path(made).iterdir()}


@pytest.mark.parametrize(
    ("repo", "words"), [("model", "no name on the hub"), ("./a/b", "no name"), ("", "no name")]
)
def test_names_are_checked(repo, words, model):
    with pytest.raises(UsageError, match=words):
        push.plan(model, repo)


def test_what_is_not_ours_is_not_sent(model, online, tmp_path):
    (model / "secret.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds 'secret.txt', which sparsek did not write"):
        push.plan(model, "me/model")
    for place in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError):
            push.plan(place, "me/model")
    (model / "secret.txt").unlink()
    (model / "base-00001.safetensors").unlink()
    with pytest.raises(SparsekError, match="missing"):
        push.plan(model, "me/model")


def test_adapters_beside_a_model_are_why_it_is_not_sent(model, tmp_path):
    """The model's own files were: 'model.safetensors, which sparsek did not write'."""
    mixed = shutil.copytree(model, tmp_path / "mixed")
    (mixed / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (mixed / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="holds a PEFT adapter beside a base model") as error:
        push.plan(mixed, "me/toy")
    assert "move adapter_config.json and adapter_model.* away" in error.value.hint
    for file in mixed.glob("adapter_*"):
        file.unlink()
    assert push.plan(mixed, "me/toy").files


def test_refusals_of_the_hub_are_readable(model, online, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    made = push.plan(model, "me/model")
    online.refuses = errors.LocalTokenNotFoundError("no token")
    with pytest.raises(SparsekError, match="does not let you write") as refusal:
        push.run(made)
    assert "hf auth login" in refusal.value.hint
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SparsekError, match="nothing was sent"):
        push.run(made)
