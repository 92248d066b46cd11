"""Families that cannot be converted are refused by name and reason, before anything is written."""

from __future__ import annotations

import json

import pytest

from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE
from sparsek_cli.families.refusals import REFUSED


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("falcon", "written out in its own block"),
        ("gptj", "written out in its own block"),
        ("bloom", "written out in its own block"),
        ("gemma3n_text", "reuse the keys and values of others"),
        ("gemma4_text", "reuse the keys and values of others"),
        ("internlm3", "transformers runs it by Llama's classes"),
    ],
)
def test_the_reason_is_said(model_type, why, tmp_path):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    base = tmp_path / "base"
    base.mkdir()
    config = {"model_type": model_type, "architectures": ["SomethingForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file({}, base / "model.safetensors")
    done = CliRunner().invoke(app, ["convert", str(base), str(tmp_path / "out")])
    assert isinstance(done.exception, UsageError)
    assert f"'{model_type}' cannot be converted" in str(done.exception)
    assert why in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_internlm3_converts_as_the_llama_that_it_is(tmp_path, tokenizer):
    """What its refusal says, followed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import sparsek_cli as sparsek

    config = AutoConfig.for_model(
        "internlm3", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True,
        mlp_bias=True, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    changes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    done = sparsek.convert(tmp_path / "base", tmp_path / "out", topk=8, window=8, calibrate="none")
    ids = torch.arange(3, 15)[None]  # all of it is kept
    found = AutoModelForCausalLM.from_pretrained(done.out)(ids, use_cache=False).logits
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    from sparsek_cli.conversion.base_config import convertible

    config = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    with pytest.raises(UsageError, match="is not supported"):
        convertible(config)
    with pytest.raises(UsageError, match=r"needs code of its own \(auto_map in config.json\)"):
        convertible({**config, "auto_map": {"AutoConfig": "x.Y"}})


def test_refused_families_are_in_no_row():
    assert not set(REFUSED) & set(TABLE)
