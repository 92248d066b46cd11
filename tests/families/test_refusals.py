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


def test_heads_that_differ_among_the_layers_that_would_be_converted(dense_config):
    """Scorers and budgets have one number of KV heads, slots one width."""
    from sparsek_cli.conversion.geometry import geometry
    from sparsek_cli.models import sparsek_config_from

    types = {"layer_types": ["full_attention"] * 2}
    config = dense_config("gemma4_text", **types, per_layer_config={"1": {"head_dim": 16}})
    row = TABLE["gemma4_text"]
    for attempt in (
        lambda: sparsek_config_from(config, {}),
        lambda: geometry(json.loads(config.to_json_string()), row),
    ):
        with pytest.raises(UsageError, match="different numbers or widths .* 2 of 8, 2 of 16"):
            attempt()


@pytest.mark.parametrize(
    "shared",
    [{"num_kv_shared_layers": 2}, {"num_kv_shared_layers": -1}, {"num_kv_shared_layers": 1}],
    ids=["all of them", "fewer than none", "of a kind before them that no layer is"],
)
def test_keys_that_no_layer_has_to_share(shared, dense_config):
    from sparsek_cli.conversion.geometry import geometry
    from sparsek_cli.models import sparsek_config_from

    config = dense_config("gemma4_text", **shared)
    row = TABLE["gemma4_text"]
    for attempt in (
        lambda: sparsek_config_from(config, {}),
        lambda: geometry(json.loads(config.to_json_string()), row),
    ):
        with pytest.raises(UsageError, match="of 2 layers share keys .num_kv_shared_layers"):
            attempt()


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


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "is_encoder_decoder", True),
        ("gpt2", "is_encoder_decoder", "true"),
        ("gpt2", "add_cross_attention", True),
        ("llama", "add_cross_attention", True),
    ],
)
def test_decoders_that_read_an_encoder(family, key, value, make_checkpoint, tmp_path):
    """One converted and chatted, and `generate` failed; GPT-2's weights were said to be missing."""
    import torch
    from bad_models import config as with_keys
    from transformers import AutoModelForCausalLM

    import sparsek_cli as sparsek
    from sparsek_cli import hub
    from sparsek_cli.models import sparsek_config_from

    base, out = make_checkpoint(tmp_path / "base", family), tmp_path / "out"
    sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    for folder in (base, out):
        with_keys(**{key: value})(folder, tmp_path / f"{folder.name}-edited")
    edited = tmp_path / "base-edited", tmp_path / "out-edited"
    given = AutoModelForCausalLM.from_pretrained(base).config
    setattr(given, key, True)
    for attempt in (
        lambda: sparsek.convert(edited[0], tmp_path / "next", calibrate="none"),
        lambda: hub.resolve(edited[0]),  # by which every verb goes, doctor too
        lambda: hub.resolve(edited[1]),
        lambda: AutoModelForCausalLM.from_pretrained(edited[1]),
        lambda: AutoModelForCausalLM.from_pretrained(out, **{key: True}),
        lambda: sparsek_config_from(given, {}),
    ):
        with pytest.raises(UsageError, match=f"says {key} .*true.*only decoder-only") as refusal:
            attempt()
        assert f"take {key} out of config.json" in refusal.value.hint
    with_keys(**{key: None})(edited[0], tmp_path / "mended")  # as hinted
    sparsek.convert(tmp_path / "mended", tmp_path / "next", topk=8, window=8, calibrate="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "next")
    assert model.generate(torch.arange(5, 25)[None], max_new_tokens=2).shape == (1, 22)


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
    assert not set(REFUSED) & set(TABLE)
    assert types == set(REFUSED) | set(TABLE)
