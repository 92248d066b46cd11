"""Families that cannot be converted are refused by name and reason, before anything is written."""

from __future__ import annotations

import json

import pytest

from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE, row_of
from sparsek_cli.families.refusals import REFUSED, SOMETIMES, why_not


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("falcon", "written out in its own block"),
        ("gptj", "written out in its own block"),
        ("bloom", "written out in its own block"),
        ("gemma3n_text", "its last layers have no keys and values of their own"),
        ("gemma4_text", "KV heads in a number or width of their own"),
        ("gemma4", "one part of a model that also sees or hears"),
        ("bert", "only decoder-only models"),
        ("mamba2", "bounded already"),
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


SAME = {"global_head_dim": 256}  # as the class's head_dim
OTHERS = (
    "no keys and values of their own", "number or width of their own", "no values but their keys",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config", "says"),
    [
        ("gemma3n_text", {}, OTHERS[:1]),
        ("gemma3n_text", {"num_kv_shared_layers": 0}, ()),
        ("gemma4_text", {}, OTHERS[1:2]),
        ("gemma4_text", SAME, ()),
        ("gemma4_text", SAME | {"num_global_key_value_heads": 2}, ()),  # attention_k_eq_v's alone
        (
            "gemma4_text",
            SAME | {"num_global_key_value_heads": 2, "attention_k_eq_v": True},
            OTHERS[1:],
        ),
        ("gemma4_text", SAME | {"per_layer_config": {"1": {"head_dim": 512}}}, OTHERS[1:2]),
        ("gemma4_text", SAME | {"per_layer_config": {}}, ()),
        ("gemma4_text", SAME | {"attention_k_eq_v": True}, OTHERS[2:]),
        ("gemma4_unified_text", SAME | {"num_kv_shared_layers": 2}, OTHERS[:1]),
    ],
)
def test_what_is_said_is_true_of_the_config(model_type, config, says):
    found, general = why_not(model_type, config), {**REFUSED, **SOMETIMES}[model_type]
    assert [text for text in OTHERS if text in (found or "")] == list(says)
    assert all(text in general for text in says)
    if model_type in SOMETIMES:
        assert (found is None) == (not says)
    else:
        assert found.split("; ")[-1] in general  # what holds for all of them


@pytest.mark.parametrize("given", [{}, {"attention_k_eq_v": True, "num_global_key_value_heads": 2}])
def test_gemma_4s_defaults_are_those_of_its_class(given):
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma4_text", **given)
    assert why_not("gemma4_text", config.to_dict()) == why_not("gemma4_text", given)
    with pytest.raises(UsageError, match="number or width of their own"):
        row_of(config)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "is_causal", False),  # every family's, by transformers' masks
        ("gpt2", "is_causal", False),
        ("gemma", "use_bidirectional_attention", True),
        ("gemma3_text", "use_bidirectional_attention", True),
    ],
)
def test_models_that_see_ahead(family, key, value, dense_config):
    """As embedders made of decoders: converted they were causal, and nobody was told."""
    from sparsek_cli.conversion.base_config import convertible
    from sparsek_cli.models import sparsek_config_from

    config = dense_config(family, **{key: value})
    for attempt in (lambda: sparsek_config_from(config, {}), lambda: convertible(config.to_dict())):
        with pytest.raises(UsageError, match=f"{key} {str(value).lower()}: tokens see") as refusal:
            attempt()
        assert "take the key out" in refusal.value.hint
    for taken in ({key: not value}, {}):
        assert convertible(dense_config(family, **taken).to_dict()) is TABLE[family]
        assert sparsek_config_from(dense_config(family, **taken), {}).sparsek


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    from sparsek_cli.conversion.base_config import convertible

    config = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    with pytest.raises(UsageError, match="is not supported"):
        convertible(config)
    with pytest.raises(UsageError, match=r"needs code of its own \(auto_map in config.json\)"):
        convertible({**config, "auto_map": {"AutoConfig": "x.Y"}})


def test_every_causal_model_of_transformers_converts_or_is_refused_with_a_reason():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    types = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith("sparsek_")}
    assert not set(REFUSED) & set(TABLE) and set(SOMETIMES) <= set(TABLE)
    assert types == set(REFUSED) | set(TABLE)
