"""Whoever loads a converted model gets SparseK, unless dense attention is asked for by our name."""

from __future__ import annotations

import json

import pytest
import torch
from sparse_path import assert_dense, assert_sparse
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError, UsageError

FOREIGN = ("sdpa", "eager", "flash_attention_2", "flex_attention", "paged|sdpa", "kernels-x/y")


def test_every_loader_runs_sparse(family, saved):
    folder = saved(family)
    row = models.FAMILIES[family]
    loaded = [
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=None),
        row.sparsek_causal_lm.from_pretrained(folder),
        row.sparsek_causal_lm.from_pretrained(folder, attn_implementation=None),
        AutoModelForCausalLM.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder, attn_implementation=None)
        ),
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), attn_implementation=None
        ),
        pipeline("text-generation", str(folder), device="cpu").model,
        AutoModel.from_pretrained(folder, attn_implementation=None),
    ]
    for model in loaded:
        assert_sparse(model.eval())


@pytest.mark.parametrize("name", FOREIGN)
def test_names_that_are_not_ours_are_refused_everywhere(name, saved):
    folder = saved()
    model = AutoModelForCausalLM.from_pretrained(folder)
    attempts = [
        lambda: AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name),
        lambda: models.SparseKLlamaForCausalLM.from_pretrained(folder, attn_implementation=name),
        lambda: AutoConfig.from_pretrained(folder, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_config(model.config, attn_implementation=name),
        lambda: AutoModelForCausalLM.from_pretrained(folder, attn_implementation={"": name}),
        lambda: model.set_attn_implementation(name),
        lambda: model.model.set_attn_implementation({"": name}),
        lambda: setattr(model.config, "_attn_implementation", name),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match="would switch SparseK off") as refusal:
            attempt()
        assert "leave attn_implementation out" in refusal.value.hint
    assert_sparse(model)


def test_the_hint_works(saved):
    folder = saved()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sparsek_dense")
    assert_dense(model)
    model.set_attn_implementation("sparsek")
    assert_sparse(model)
    model.set_attn_implementation("sparsek_dense")
    assert_dense(model)
    model.set_attn_implementation(None)
    assert_sparse(model)
    with models.dense_attention(model):
        assert_dense(model)
    assert_sparse(model)


def test_dense_attention_is_not_saved_with_the_model(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved(), attn_implementation="sparsek_dense")
    model.save_pretrained(tmp_path / "again")
    assert_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_file_cannot_switch_it_off(key, saved):
    file = saved() / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "sdpa"}))
    with pytest.raises(UsageError, match="would switch SparseK off"):
        AutoModelForCausalLM.from_pretrained(file.parent)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "opt", "mixtral"]
)
def test_attention_weights_are_refused_and_hidden_states_are_not(family, sparse_model):
    model, ids = sparse_model(family), torch.arange(3, 20)[None]
    with pytest.raises(SparsekError, match="no attention weights"):
        model(ids, output_attentions=True)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        base = model.base_model(ids, output_hidden_states=True)
        with models.dense_attention(model):
            dense = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(dense.hidden_states) == 3
    assert len(base.hidden_states) == 3
    # The first is the embedding, the same for both; the last feeds the head.
    torch.testing.assert_close(output.hidden_states[0], dense.hidden_states[0])
    assert not torch.allclose(output.hidden_states[-1], dense.hidden_states[-1])
    head = model.get_output_embeddings()(output.hidden_states[-1])
    torch.testing.assert_close(head, output.logits)


def test_the_base_s_own_class_refuses_a_converted_folder(family, saved):
    """It would drop the scorers, attend densely, and only note it in a loading report."""
    folder = saved(family)
    own = type(models.FAMILIES[family].sparsek_causal_lm.from_pretrained(folder)).__mro__
    base = next(cls for cls in own if not cls.__name__.startswith("SparseK"))
    assert base.__module__.startswith("transformers.")
    with pytest.raises(SparsekError, match="loaded with the class of its base") as refusal:
        base.from_pretrained(folder)(torch.arange(3, 9)[None])
    assert "AutoModelForCausalLM" in refusal.value.hint
    assert_sparse(AutoModelForCausalLM.from_pretrained(folder))


def test_so_it_does_in_a_program_without_this_package(pair, saved, clean_program):
    folders = [str(pair("llama", "llama3").out), str(saved("llama"))]
    code = f"""
from transformers import LlamaForCausalLM, LlamaModel
for folder in {folders}:
    for kind in (LlamaForCausalLM, LlamaModel):
        try:
            kind.from_pretrained(folder)
        except ValueError as error:
            assert 'attn_implementation="sparsek"` is not supported' in str(error), error
            print("refused")
"""
    done = clean_program(code)
    assert done.stdout.split() == ["refused"] * 4, done.stderr


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_base_that_names_flash_attention_is_read_without_it(key, make_checkpoint, tmp_path):
    """It was an ImportError, with the advice to upgrade packages."""
    from verbs import convert

    from sparsek_cli.hub import resolve
    from sparsek_cli.loading import load_model
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    base, out = make_checkpoint(tmp_path / "base"), tmp_path / "out"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: "flash_attention_2"}))
    convert(ConvertRecipe(model=str(base), out=str(out), calibrate="none", topk=6, window=4))
    places = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert load_model(resolve(base), **places).config._attn_implementation == "sdpa"
    assert_sparse(load_model(resolve(out), **places))
