"""Scorers alone: megabytes that go onto the base they were made for, and onto no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.output import scorers_file
from sparsek_cli.scorers_alone.find import read
from sparsek_cli.sharing import push

IDS = torch.arange(3, 60)[None]
# What differs in names and shapes: a prefix in files, fused maps, layers of other kinds.
KINDS = ("gpt2", "gemma3_text", "nemotron_h")


def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS, use_cache=False).logits


def give_scores(folder: Path, topk) -> None:
    """Scorers that choose, in place of the neutral ones of a conversion without calibration."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    tensors = load_file(folder / "sparsek.safetensors")
    for name, array in tensors.items():
        tensors[name] = torch.randn(array.shape).numpy()
        if name.endswith("slopes"):
            tensors[name] = 0 * tensors[name]
    file = folder / "sparsek.safetensors"
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    sparse = models.sparse_layers(model.config)
    heads = models.kv_heads(model.config)
    rows = [[topk + 1] + [topk] * (heads - 1) if i in sparse else None for i in range(2)]
    config["sparsek"] |= {"topk": rows, "cache_dtype": "int8"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def scored(tmp_path_factory, make_checkpoint):
    """A base, its conversion with scorers that choose, and those alone in a folder."""
    home = tmp_path_factory.mktemp("scored")
    base = make_checkpoint(home / "base", "llama", max_shard_size="20KB")
    out = sparsek.convert(base, home / "out", topk=8, window=8, calibrate="none").out
    give_scores(Path(out), 5)
    return base, Path(out), Path(sparsek.export_scorers(out, home / "scorers").out)


def test_a_base_and_its_scorers_are_the_converted_model(scored, tmp_path):
    base, out, scorers = scored
    alone = load_file(scorers / "sparsek.safetensors")
    assert {array.dtype.name for array in alone.values()} == {"float32"}
    own = load_file(out / "sparsek.safetensors")
    assert sum(a.nbytes for a in alone.values()) == sum(a.nbytes for a in own.values())
    done = sparsek.merge(base, scorers, tmp_path / "merged")
    assert "copy" not in done.converted.written.means
    assert torch.equal(logits(done.out), logits(out))
    made, merged = (json.loads((Path(x) / "config.json").read_text()) for x in (out, done.out))
    assert made == merged
    assert "put onto" in (tmp_path / "merged/README.md").read_text()
    recipe = (tmp_path / "merged/sparsek.yaml").read_text()
    assert "model: base\n" in recipe and str(base.parent) not in recipe
    # One file says as much as the folder.
    single = sparsek.export_scorers(out, tmp_path / "one.safetensors").out
    model, tokenizer = sparsek.load(base, scorers=single, device="cpu", dtype="float32")
    assert torch.equal(model(IDS, use_cache=False).logits, logits(out))
    assert tokenizer("a").input_ids


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_family(family, make_checkpoint, tmp_path):
    base = make_checkpoint(tmp_path / "base", family)
    out = Path(sparsek.convert(base, tmp_path / "out", topk=8, window=8, calibrate="none").out)
    give_scores(out, 5)
    scorers = sparsek.export_scorers(out, tmp_path / "scorers").out
    model, _ = sparsek.load(base, scorers=scorers, device="cpu", dtype="float32")
    assert torch.equal(model(IDS, use_cache=False).logits, logits(out))
    merged = sparsek.merge(base, scorers, tmp_path / "merged").out
    assert torch.equal(logits(merged), logits(out))


def test_converting_can_write_scorers_alone(llama, tmp_path):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    base, out = llama
    words = ["convert", str(base), str(tmp_path / "s"), "--scorers-only", "topk=8", "window=8"]
    words += ["calibrate=none", "--json", "-q"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout)["base_bytes_copied"] == 0
    assert {f.name for f in (tmp_path / "s").iterdir()} == {
        "README.md", "sparsek.safetensors", "sparsek.yaml"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["s"]  # nothing beside it is left
    merged = CliRunner().invoke(app, ["merge", str(base), str(tmp_path / "s"), str(tmp_path / "m")])
    assert merged.exit_code == 0, merged.output
    assert torch.equal(logits(tmp_path / "m"), logits(out))
    again = CliRunner().invoke(app, [*words[:-2], "--overwrite"])
    assert again.exit_code == 0, again.output
    assert "scorers, nothing of the base" in again.stdout
    assert "tokenizer " not in again.stdout and "hard link" not in again.stdout
    shown = CliRunner().invoke(app, [*words[:2], str(tmp_path / "x"), *words[3:], "--dry-run"])
    assert json.loads(shown.stdout)["scorers_only"] and not (tmp_path / "x").exists()


def test_calibrated_scorers_keep_their_report(llama, tmp_path):
    from verbs import convert

    from sparsek_cli.conversion.calibrate.method import Method
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    recipe = ConvertRecipe(
        model=str(llama[0]), out=str(tmp_path / "s"), scorers_only=True, topk=24, window=16,
        device="cpu", calibrate_tokens=512, calibrate_length=64,
    )  # fmt: skip
    method = Method(scorer="linear", documents="none", slopes=(0.3,), sizes=(0.5,))
    done = convert(recipe, method=method)
    merged = Path(sparsek.merge(llama[0], done.out, tmp_path / "m").out)
    assert json.loads((merged / "calibration.json").read_text()) == done.calibration


def changed(base: Path, folder: Path, **settings) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_another_base_is_refused_by_name(scored, make_checkpoint, dense_config, tmp_path):
    base, _, scorers = scored
    other = make_checkpoint(tmp_path / "other", "llama", seed=1)
    cases = [
        (other, "the weights of 'other' are others"),
        (make_checkpoint(tmp_path / "half", "llama", dtype="bfloat16"), "weights of 'half'"),
        (make_checkpoint(tmp_path / "qwen", "qwen2"), "is a qwen2 model, theirs a llama"),
        (changed(base, tmp_path / "eps", rms_norm_eps=1e-3), "rms_norm_eps of 'eps' is 0.001"),
    ]
    for folder, words in cases:
        for attempt in (
            lambda at=folder: sparsek.merge(at, scorers, tmp_path / "m"),
            lambda at=folder: sparsek.load(at, scorers=scorers, device="cpu"),
        ):
            with pytest.raises(UsageError, match="made for another base, 'base'") as refusal:
                attempt()
            assert words in refusal.value.message
    assert not (tmp_path / "m").exists()
    # What differs by name only is the same base.
    same = changed(base, tmp_path / "same", transformers_version="4.40.0", use_cache=False)
    sparsek.load(same, scorers=scorers, device="cpu")


def test_a_tuned_model_s_scorers_do_not_fit_its_base(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama[1])
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path / "tuned")
    scorers = sparsek.export_scorers(tmp_path / "tuned", tmp_path / "s.safetensors").out
    with pytest.raises(UsageError, match="the weights of 'base' are others"):
        sparsek.merge(llama[0], scorers, tmp_path / "m")
    dense = sparsek.export(tmp_path / "tuned", tmp_path / "dense").out
    merged = sparsek.merge(dense, scorers, tmp_path / "m").out
    assert torch.equal(logits(merged), logits(tmp_path / "tuned"))


def test_every_verb_says_how_to_merge(scored, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    base, _, scorers = scored
    single = tmp_path / "s.safetensors"
    shutil.copy(scorers / "sparsek.safetensors", single)
    for place in (scorers, single):
        for verb in (
            ["chat", "--prompt", "hi"],
            ["evaluate"],
            ["doctor"],
            ["finetune"],
            ["convert"],
            ["export"],
        ):
            done = CliRunner().invoke(app, [verb[0], str(place), *verb[1:]])
            assert isinstance(done.exception, UsageError), (verb, done.output)
            assert "holds scorers alone, made for base" in done.exception.message
            assert f"sparsek merge base {place} OUT" in done.exception.hint
    # The hint, followed where the base lies.
    monkeypatch.chdir(base.parent)
    assert (
        CliRunner().invoke(app, ["merge", "base", str(single), str(tmp_path / "m")]).exit_code == 0
    )


def test_what_is_not_scorers_is_refused(scored, llama, tmp_path):
    base, out, scorers = scored
    for place, words in [
        (out, "a whole model"),
        (base, "a whole model"),
        (tmp_path, "there are no scorers at"),
        (tmp_path / "absent", "there are no scorers at"),
        (out / "sparsek.safetensors", "holds no scorers of a base"),
        (out / "config.json", "holds no scorers of a base"),
    ]:
        with pytest.raises(UsageError, match=words):
            sparsek.merge(base, place, tmp_path / "m")
    with pytest.raises(UsageError, match="has scorers of its own"):
        sparsek.merge(out, scorers, tmp_path / "m")
    with pytest.raises(UsageError, match="is a dense model"):
        sparsek.export_scorers(base, tmp_path / "s")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((out / "base-00001.safetensors").read_bytes())
    with pytest.raises(UsageError, match="is not a file of scorers"):
        sparsek.export_scorers(out, weights, overwrite=True)
    with pytest.raises(UsageError, match="is not a folder of scorers and is not replaced"):
        sparsek.export_scorers(llama[1], out, overwrite=True)


def test_damaged_scorers_are_refused(scored, tmp_path):
    base, _, scorers = scored
    found = read(scorers)
    tensors = found.tensors()
    for name, change in [
        ("missing", lambda t: t.pop("layers.1.bias")),
        ("shape", lambda t: t.update({"layers.0.weight": t["layers.0.weight"][:1]})),
        ("more", lambda t: t.update({"layers.7.bias": t["layers.0.bias"]})),
    ]:
        own = dict(tensors)
        change(own)
        file = tmp_path / f"{name}.safetensors"
        scorers_file.write(file, own, found.block, found.base, {})
        with pytest.raises(SparsekError, match="are damaged"):
            sparsek.merge(base, file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_that_never_evicts_goes_back_to_its_base(scored, tmp_path):
    """By a number that no text has: the way back to the dense model must stay open."""
    base, out, _ = scored
    wide = tmp_path / "wide"
    shutil.copytree(out, wide)
    config = json.loads((wide / "config.json").read_text())
    config["sparsek"]["topk"] = 10**9
    (wide / "config.json").write_text(json.dumps(config))
    sparsek.export(wide, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
    scorers = sparsek.export_scorers(wide, tmp_path / "scorers").out
    assert Path(scorers).is_dir()
    # What is written anew is verified with a cache of its own.
    for write in (
        lambda out: sparsek.merge(base, scorers, out),
        lambda out: sparsek.convert(wide, out, again=True, calibrate="none"),
    ):
        with pytest.raises(UsageError, match="topk is 1,000,000,000, more than the 16,777,216"):
            write(tmp_path / "out")


def test_a_recipe_that_makes_other_scorers_says_so(scored, tmp_path):
    """Scorers that bring no recipe of their own are merged by settings alone."""
    base, out, scorers = scored
    found = read(scorers)
    file = tmp_path / "s.safetensors"
    scorers_file.write(file, found.tensors(), found.block, found.base, {})
    merged = Path(sparsek.merge(base, file, tmp_path / "merged").out)
    said = (merged / "sparsek.yaml").read_text()
    assert "converting\n# with them gives others" in said and "makes it again" not in said
    assert "makes it again" in (out / "sparsek.yaml").read_text()


def test_a_header_that_is_nested_deeply_is_none(tmp_path):
    parts = {"format": scorers_file.FORMAT, "sparsek": "[" * 10**5, "base": "{}", "texts": "{}"}
    save_file({"a": torch.zeros(1).numpy()}, tmp_path / "deep.safetensors", metadata=parts)
    with pytest.raises(SparsekError, match="deep.safetensors"):
        read(tmp_path / "deep.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"sinks": 10**12},
        {"sinks": "4"},
        {"topk": None},
        {"topk": [8]},
        {"window": -1},
        {"gate": "no"},
        {"scorer": "linear"},
        {"scorer": {"type": "mlp", "width": 10**9}},
    ],
)
def test_settings_that_are_none_are_refused(scored, tmp_path, change):
    base, _, scorers = scored
    found = read(scorers)
    file = tmp_path / "s.safetensors"
    scorers_file.write(file, found.tensors(), found.block | change, found.base, {})
    with pytest.raises(SparsekError, match=f"are damaged: .*{next(iter(change))}"):
        sparsek.merge(base, file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 1}, {"model_type": "sparsek_qwen2"}, {"intermediate_size": 8}]
)
def test_a_model_that_no_verb_could_load_is_not_sent_nor_its_scorers_taken(
    scored, tmp_path, change
):
    """Its files were sent as they lay there."""
    bad = tmp_path / "bad"
    shutil.copytree(scored[1], bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SparsekError, match="(lacks|holds|has shape|topk has)"):
        push.plan(bad, "someone/else")
    with pytest.raises(SparsekError):
        sparsek.export_scorers(bad, tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_scorers_are_not_taken_with_settings_that_are_none(scored, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(scored[1], bad)
    config = json.loads((bad / "config.json").read_text())
    config["sparsek"]["window"] = 10**12
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsekError, match="window is 1,000,000,000,000"):
        sparsek.export_scorers(bad, tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_scorers_that_are_no_numbers_go_nowhere(scored, tmp_path):
    base, out, scorers = scored
    found = read(scorers)
    tensors = found.tensors()
    tensors["layers.0.weight"][0, 0] = float("nan")
    file = tmp_path / "nan.safetensors"
    scorers_file.write(file, tensors, found.block, found.base, {})
    with pytest.raises(SparsekError, match=r"layers\.0\.weight holds values that are not finite"):
        sparsek.merge(base, file, tmp_path / "m")
    with pytest.raises(SparsekError, match="not finite"):
        sparsek.load(base, scorers=file, device="cpu", dtype="float32")
    bad = tmp_path / "bad"
    shutil.copytree(out, bad)
    own = load_file(bad / "sparsek.safetensors")
    next(iter(own.values())).flat[0] = float("inf")
    save_file(own, bad / "sparsek.safetensors")
    for place in ("s", "s.safetensors"):
        with pytest.raises(SparsekError, match="not finite"):
            sparsek.export_scorers(bad, tmp_path / place)
    with pytest.raises(SparsekError, match="not finite"):
        push.plan(bad, "someone/else")
    # As training of more than scorers leaves them: among the other weights.
    (bad / "sparsek.safetensors").rename(bad / "model.safetensors")
    with pytest.raises(SparsekError, match="not finite"):
        push._check_scorers(bad)
    assert {path.name for path in tmp_path.iterdir()} == {"nan.safetensors", "bad"}


def test_both_may_come_from_the_hub(scored, tmp_path, monkeypatch):
    import huggingface_hub

    base, out, scorers = scored
    asked = []

    def fetch(hub_id, **options):
        asked.append(hub_id)
        return str({"me/base": base, "me/scorers": scorers}[hub_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    done = sparsek.merge("me/base", "me/scorers", tmp_path / "m")
    assert set(asked) == {"me/base", "me/scorers"}
    assert torch.equal(logits(done.out), logits(out))


def test_gguf_bases_are_refused(tmp_path):
    from sparsek_cli.conversion.plan import _check_scorers_only
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    with pytest.raises(UsageError, match="a GGUF file is no base"):
        _check_scorers_only(ConvertRecipe(), packed=True)
    with pytest.raises(UsageError, match="both given"):
        _check_scorers_only(ConvertRecipe(copy=True), packed=False)


DAMAGED = {"cut": b'{"a": ', "number": b"3", "deep": b"[" * 100_000, "binary": b"\xff\xfe\x00"}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_texts_beside_the_weights_are_named(scored, tmp_path, damage):
    """A recipe, a report or a card that is none: errors of libraries, from export and push."""
    binary = damage == "binary"
    for name, exported, pushed in (
        ("sparsek.yaml", True, True),
        ("calibration.json", binary, False),  # copied as it is
        ("README.md", False, binary),  # scorers get a card of their own
    ):
        folder = tmp_path / name
        shutil.copytree(scored[1], folder)
        (folder / name).write_bytes(DAMAGED[damage])
        for verb, refused in (
            (lambda at: sparsek.export_scorers(at, f"{at}-alone"), exported),
            (lambda at: push.plan(at, "owner/name"), pushed),
        ):
            if not refused:
                verb(folder)
                continue
            with pytest.raises(UsageError, match=name) as error:
                verb(folder)
            assert error.value.hint


@pytest.mark.parametrize("tags", ["3", "word", "[1, word]", "{a: 1}"])
def test_a_card_with_odd_tags_is_sent(scored, tmp_path, tags):
    shutil.copytree(scored[1], tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text(f"---\ntags: {tags}\n---\ntext")
    found = push.plan(tmp_path / "out", "owner/name").matter["tags"]
    assert "sparsek" in found and "w" not in found
