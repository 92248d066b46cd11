"""A converted model's tokenizer and logits are its base's, for every shape, family and loader."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparse_path import assert_sparse, counted_attention
from tiny_families import tiny_config
from tokenizer_shapes import SHAPES, VOCABULARY, described
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE
from sparsek_cli.hub import resolve


def base_tokenizer(folder: Path):
    """The base's tokenizer, or None where transformers has none for it."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except ValueError:
        return None


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_logits_and_attention_are_as_they_should_be(family, shape, pair):
    made = pair(family, shape)
    tokenizer = base_tokenizer(made.base)
    if tokenizer is None:
        assert made.out is None and "does not load" in made.said
        return
    assert described(AutoTokenizer.from_pretrained(made.out)) == described(tokenizer)
    text = "The harbour master counted 1234 crates and wrote them down."
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :48]
    dense = AutoModelForCausalLM.from_pretrained(made.base)
    sparse = AutoModelForCausalLM.from_pretrained(made.out)
    with torch.no_grad(), models.budget(sparse, topk=64), counted_attention() as layers:
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, atol=2e-4, rtol=2e-4)
    assert layers == [0, 1]
    assert_sparse(sparse)


# Families whose entries in transformers' tables are of other kinds than the six's.
KINDS = ("gemma", "cohere", "phi3", "phi", "olmo", "smollm3")
ALL = pytest.param(tuple(TABLE), marks=pytest.mark.slow, id="all")


@pytest.mark.parametrize("families", [pytest.param(KINDS, id="kinds"), ALL])
@pytest.mark.parametrize("shape", SHAPES)
def test_families_are_known_to_auto_tokenizer(shape, families, tmp_path):
    worked = 0
    for family in families:
        dense = tiny_config(family, vocab_size=VOCABULARY)
        configs = {"base": dense, "sparse": models.sparsek_config_from(dense, {})}
        found = []
        for name, config in configs.items():
            folder = tmp_path / f"{family}-{name}"
            folder.mkdir()
            SHAPES[shape](folder)
            (folder / "config.json").write_text(config.to_json_string())
            try:
                found.append(described(AutoTokenizer.from_pretrained(folder)))
            except Exception as error:  # a class that does not fit the files fails for both
                found.append((type(error), str(error).splitlines()[0]))
        assert found[0] == found[1], family
        worked += isinstance(found[0], dict)
    assert worked


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_program_without_this_package_gets_the_same_tokenizers(
    every, shapes_in_turn, pair, tmp_path, clean_program
):
    expected = {}
    for shape, own in shapes_in_turn.items():
        for family in sorted({*shapes_in_turn.values()}) if every else (own,):
            made = pair(family, shape)
            if (tokenizer := base_tokenizer(made.base)) is not None:
                expected[str(made.out)] = described(tokenizer)
    assert len(expected) > (80 if every else 12)
    (tmp_path / "expected").write_bytes(pickle.dumps(expected))
    code = f"""
import pickle, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from tokenizer_shapes import described
from transformers import AutoTokenizer
with open({str(tmp_path / "expected")!r}, "rb") as file:
    expected = pickle.load(file)
for folder, wanted in expected.items():
    found = described(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    for key in wanted:
        assert found[key] == wanted[key], (folder, key)
assert not any(name.startswith("sparsek") for name in sys.modules)
"""
    done = clean_program(code)
    assert done.returncode == 0, done.stderr


def loaded_by_chat(made):
    from sparsek_cli.loading import load_tokenizer

    return load_tokenizer(resolve(made.out))


def loaded_by_evaluate(made):
    from sparsek_cli.evaluation.measured_model import load_measured
    from sparsek_cli.evaluation.settings import Loading

    model, tokenizer, own = load_measured(
        resolve(made.out), Loading("cpu", "float32", None), sparse=False
    )
    assert own
    assert_sparse(model)
    return tokenizer


def loaded_by_finetune(made):
    from sparsek_cli.loading import load_tokenizer

    return load_tokenizer(made.out)


def written_by_finetune(made):
    from sparsek_cli.loading import load_tokenizer
    from sparsek_cli.output.tokenizer_files import bring

    again = made.out.with_name(made.out.name + "-again")
    again.mkdir()
    (again / "config.json").write_text((made.out / "config.json").read_text())
    assert bring(load_tokenizer(made.out), again)
    return AutoTokenizer.from_pretrained(again)


def loaded_by_pipeline(made):
    runner = pipeline("text-generation", str(made.out), device="cpu", torch_dtype=torch.float32)
    with counted_attention() as layers:
        runner("The harbour", max_new_tokens=2, do_sample=False)
    assert set(layers) == {0, 1}
    # A pipeline that generates pads on the left, whatever the tokenizer says.
    runner.tokenizer.padding_side = base_tokenizer(made.base).padding_side
    return runner.tokenizer


@pytest.mark.parametrize(
    "load",
    [
        loaded_by_chat,
        loaded_by_evaluate,
        loaded_by_finetune,
        written_by_finetune,
        loaded_by_pipeline,
    ],
)
def test_every_loader_has_the_base_s_tokenizer(load, any_pair):
    base = base_tokenizer(any_pair.base)
    if load is loaded_by_evaluate and base.bos_token is None and base.eos_token is None:
        with pytest.raises(UsageError, match="neither a bos nor an eos token"):
            load(any_pair)
        return
    wanted = described(base)
    found = described(load(any_pair))
    for key in wanted:
        assert found[key] == wanted[key], key


def test_converting_again_keeps_it(pair, tmp_path):
    """Also of a folder that an earlier version wrote, which did not name the class."""
    from verbs import convert

    from sparsek_cli.conversion.calibrate.method import Method
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    made = pair("gpt2", "gpt2_bare")
    old = tmp_path / "old"
    old.mkdir()
    for file in made.out.iterdir():
        os.link(file, old / file.name)
    (old / "tokenizer_config.json").unlink()
    (old / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    recipe = ConvertRecipe(
        model=str(old), out=str(tmp_path / "new"), again=True, topk=6, window=4,
        calibrate_tokens=2048, calibrate_length=256,
    )  # fmt: skip
    convert(recipe, method=Method(scorer="linear"))
    assert json.loads((tmp_path / "new/tokenizer_config.json").read_text())["tokenizer_class"]
    wanted = described(base_tokenizer(made.base))
    assert described(AutoTokenizer.from_pretrained(tmp_path / "new")) == wanted


def test_files_that_would_load_otherwise_are_written_anew(pair, tmp_path, monkeypatch):
    """Settings that transformers applies to a type by name end up in the files themselves."""
    from sparsek_cli.conversion import tokenizer as settling

    made = pair("llama", "llama3")
    base = PreTrainedTokenizerFast.from_pretrained(made.base)
    base.backend_tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(settling, "_load_base", lambda plan: base)
    folder = tmp_path / "out"
    folder.mkdir()
    for file in made.out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    named = SimpleNamespace(name="base")
    plan = SimpleNamespace(tokenizer=named, own_tokenizer=True, config={"vocab_size": len(base)})
    assert settling.settle(plan, folder).endswith("as of the base")
    found = AutoTokenizer.from_pretrained(folder)
    assert found("HELLO").input_ids == base("HELLO").input_ids
    assert found("HELLO").input_ids != base_tokenizer(made.base)("HELLO").input_ids


def files_of(folder: Path) -> set[str]:
    from sparsek_cli.output.tokenizer_files import files_in

    return {file.relative_to(folder).as_posix() for file in files_in(folder)}


@pytest.mark.parametrize("own", ["none", "another, with a template"])
@pytest.mark.parametrize("shape", ["unigram", "gpt2_bare", "llama3", "qwen2"])
def test_another_tokenizer_takes_the_place_of_the_base_s(pair, tmp_path, shape, own):
    """Whole: no file of the base's own is left, none of the model beside the other comes along."""
    from verbs import convert

    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    made, other = pair("llama", "mistral_plain"), tmp_path / "other"
    base, out = tmp_path / "base", tmp_path / "out"
    for folder in (base, other):
        folder.mkdir()
    SHAPES[shape](other)
    named = {"model_type": "gpt2" if shape == "gpt2_bare" else "qwen2"}
    if shape != "unigram":  # a folder of the tokenizer alone is enough where its class is named
        (other / "config.json").write_text(json.dumps(named))
    for file in made.base.iterdir():
        if own != "none" or file.name not in files_of(made.base):
            os.link(file, base / file.name)
    if own != "none":
        (base / "chat_template.jinja").write_text("{{ messages }}")
    recipe = ConvertRecipe(
        model=str(base), out=str(out), tokenizer=str(other), topk=6, window=4, sinks=2,
        calibrate="none",
    )  # fmt: skip
    done = convert(recipe)
    assert done.tokenizer.endswith("as of other")
    found = AutoTokenizer.from_pretrained(out)
    assert described(found) == described(AutoTokenizer.from_pretrained(other))
    assert files_of(out) - files_of(other) <= {"tokenizer_config.json"}
    again = {**done.plan.resolved(), "out": str(tmp_path / "again")}
    convert(ConvertRecipe.model_validate(again))
    assert described(AutoTokenizer.from_pretrained(tmp_path / "again")) == described(found)


def test_calibration_reads_with_the_tokenizer_that_is_named(pair, tmp_path):
    from sparsek_cli.conversion.calibrate.run import _tokenizer
    from sparsek_cli.conversion.plan import plan
    from sparsek_cli.errors import SparsekError
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    made, base = pair("llama", "mistral_plain"), tmp_path / "base"
    base.mkdir()
    for file in made.base.iterdir():
        if file.name not in files_of(made.base):
            os.link(file, base / file.name)
    with pytest.raises(SparsekError, match="calibration needs a tokenizer") as refusal:
        _tokenizer(plan(ConvertRecipe(model=str(base), out=str(tmp_path / "out"))))
    assert "name a tokenizer with --tokenizer" in refusal.value.hint
    named = ConvertRecipe(model=str(base), out=str(tmp_path / "out"), tokenizer=str(made.base))
    assert described(_tokenizer(plan(named))) == described(base_tokenizer(made.base))


def test_a_chat_template_alone_is_no_tokenizer(make_checkpoint, tmp_path, capsys):
    """It was "Qwen2Tokenizer, as of the base", without a token, and chat was what came next."""
    from bad_models import both, file

    from sparsek_cli.app import run

    good = make_checkpoint(tmp_path / "good")
    template = file("chat_template.jinja", "{{ messages[0].content }}")
    gone = [file(name, None) for name in ("tokenizer.json", "tokenizer_config.json")]
    both(template, *gone)(good, tmp_path / "base")
    line = ["convert", tmp_path / "base", tmp_path / "out", "--calibrate", "none", "--topk", "6"]
    assert run([str(word) for word in [*line, "--window", "4"]]) == 0
    shown = capsys.readouterr()
    assert "tokenizer   none beside the weights" in shown.out
    assert "next:" not in shown.err and "convert with --tokenizer NAME" in shown.err
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert not list((tmp_path / "out").glob("tokenizer*"))
    dense = sparsek.export(tmp_path / "out", tmp_path / "dense")
    assert "none beside the weights" in dense.text()
