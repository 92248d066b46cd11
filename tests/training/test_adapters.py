"""LoRA adapters that stay apart: what PEFT makes of them is the model that merging gives."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from verbs import finetune

import sparsek_cli.models as models
from sparsek_cli.errors import UsageError
from sparsek_cli.hub import resolve

IDS = torch.arange(3, 60)[None]
LORA = ("train=lora", "lora.rank=2", "steps=2", "evaluation.held_out=0", "learning_rate=1e-2")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_them_onto_the_converted_model(family, recipe, sparse_checkpoint, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    model = sparse_checkpoint(family)
    finetune(recipe(*LORA, model=model, out="merged"))
    finetune(recipe(*LORA, "lora.merge=false", model=model, out="apart"))
    apart = tmp_path / "apart"
    assert {file.name for file in apart.glob("*.safetensors")} == {"adapter_model.safetensors"}
    names = load_file(apart / "adapter_model.safetensors")
    assert any(".lora_A." in name for name in names) and any(".scorer." in name for name in names)
    config = json.loads((apart / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model) and config["r"] == 2

    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    tuned = PeftModel.from_pretrained(base, apart)
    assert len(models.sparsek_attentions(tuned)) == 2
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-4, atol=1e-4)
    by_itself = AutoPeftModelForCausalLM.from_pretrained(apart)
    torch.testing.assert_close(logits(by_itself), expected, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(apart)
    assert tokenizer("a boat").input_ids == AutoTokenizer.from_pretrained(model)("a boat").input_ids

    # Other verbs say how to merge, and it works.
    with pytest.raises(UsageError, match="is a PEFT adapter of") as refusal:
        resolve(apart)
    assert "merge_and_unload().save_pretrained(OUT)" in refusal.value.hint
    tuned.merge_and_unload().save_pretrained(tmp_path / "by-hand")
    tokenizer.save_pretrained(tmp_path / "by-hand")
    found = AutoModelForCausalLM.from_pretrained(resolve(tmp_path / "by-hand").path)
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)


def test_without_scorers_only_adapters_are_written(recipe, sparse_checkpoint, tmp_path):
    words = (*LORA, "lora.merge=false", "lora.scorers=false")
    finetune(recipe(*words, model=sparse_checkpoint()))
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names and all(".lora_" in name for name in names)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] is None


def test_the_verb_ends_well_and_replaces_its_own(recipe, sparse_checkpoint, text_file, tmp_path):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    words = ["finetune", str(sparse_checkpoint()), str(tmp_path / "out"), "--data", str(text_file)]
    words += [*LORA, "lora.merge=false", "sequence_length=64", "batch_size=2", "device=cpu"]
    done = CliRunner().invoke(app, [*words, "micro_batch_size=2"])
    assert done.exit_code == 0, done.output
    assert "PeftModel.from_pretrained" in done.output
    refused = CliRunner().invoke(app, [*words, "micro_batch_size=2"])
    assert "exists" in refused.exception.message
    again = CliRunner().invoke(app, [*words, "micro_batch_size=2", "--overwrite"])
    assert again.exit_code == 0, again.output


def with_stand_ins(sparse_model, tokenizer, folder):
    model = sparse_model("llama", topk=8, window=8, stand_ins=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("how", ["gates", "concurrent", "frozen"])
def test_stand_ins_go_along(how, recipe, sparse_model, tokenizer, tmp_path):
    """They are trained with the adapters, and PEFT has those that merging gives."""
    from peft import PeftModel

    model = with_stand_ins(sparse_model, tokenizer, tmp_path / "sparse")
    words = (*LORA, f"scorer_training={how}")
    for name, more in {"merged": (), "apart": ("lora.merge=false",)}.items():
        finetune(recipe(*words, *more, model=tmp_path / "sparse", out=name))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for own, before in zip(*map(models.sparsek_attentions, (merged, model)), strict=True):
        moved = (own.scorer.stand_ins - before.scorer.stand_ins).abs().amax()
        assert bool(moved > 0) == (how != "frozen") and own.scorer.stand_ins.isfinite().all()
    expected = logits(merged)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    tuned = PeftModel.from_pretrained(base, tmp_path / "apart")
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-4, atol=1e-4)
