"""Checkpoints people have that are no plain dense model: refused by name, and the hint works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsek_cli as sparsek
from sparsek_cli.errors import UsageError


def refusal(base: Path, out: Path) -> UsageError:
    """What converting says; nothing may be written."""
    with pytest.raises(UsageError) as refused:
        sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    assert not out.exists()
    return refused.value


def converts(base: Path, out: Path) -> None:
    sparsek.convert(base, out, topk=8, window=8, calibrate="none")


def test_pickled_weights(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    error = refusal(base, tmp_path / "out")
    assert "pickled weights (.bin, .pt) are refused" in error.message
    assert "from_pretrained(...).save_pretrained(FOLDER) writes safetensors" in error.hint
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "saved")
    converts(tmp_path / "saved", tmp_path / "out")


def test_adapters_alone_and_beside_their_base(llama, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapters = tmp_path / "adapters"
    base = AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(adapters)
    beside = shutil.copytree(llama, tmp_path / "beside")
    for file in adapters.glob("adapter_*"):
        shutil.copy(file, beside)
    assert "is a PEFT adapter" in refusal(adapters, tmp_path / "out").message
    error = refusal(beside, tmp_path / "out")
    assert "holds a PEFT adapter beside a base model" in error.message
    assert "PeftModel.from_pretrained(base, FOLDER).merge_and_unload()" in error.hint
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapters)
    whole.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "merged")
    converts(tmp_path / "merged", tmp_path / "out")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_that_no_weights_can_hold(llama, tmp_path, kind):
    """They have no merge_and_unload, which the hint asked for."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(llama)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted = peft.get_peft_model(base, config)
    assert not hasattr(adapted, "merge_and_unload")
    adapted.save_pretrained(tmp_path / "adapters")
    beside = shutil.copytree(llama, tmp_path / "beside")
    for file in (tmp_path / "adapters").glob("adapter_*"):
        shutil.copy(file, beside)
    for folder in (tmp_path / "adapters", beside):
        hint = refusal(folder, tmp_path / "out").hint
        assert "cannot be merged" in hint and "merge_and_unload" not in hint


def test_models_that_also_see(llama, dense_config, tmp_path):
    """Refused, and their language model converts once it is saved on its own."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    eye = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(vision_config=eye, text_config=dense_config("llama"), image_token_index=5)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    error = refusal(tmp_path / "base", tmp_path / "out")
    assert "LlavaForConditionalGeneration (it also has a vision tower)" in error.message
    assert "save its language model on its own" in error.hint
    text = AutoModelForCausalLM.from_config(config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(tmp_path / "text")
    converts(tmp_path / "text", tmp_path / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory, make_checkpoint) -> Path:
    """A plain base in one file."""
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "base")
