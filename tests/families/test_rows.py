"""Rows against transformers: classes, names of modules, and sizes that a config.json leaves out."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from tiny_families import TINY, tiny_config
from transformers import AutoModelForCausalLM
from verbs import convert

import sparsek_cli.models as models
from sparsek_cli.conversion.geometry import geometry
from sparsek_cli.conversion.plan import plan
from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE, table
from sparsek_cli.families.layers import idle_window_off, layer_types
from sparsek_cli.models.output import output_layer
from sparsek_cli.recipes.schema_convert import ConvertRecipe


@pytest.mark.parametrize("family", TINY)
def test_sizes_that_are_left_out_are_the_config_class_own(family):
    row = TABLE[family]
    given = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    small = {row.key(name): getattr(tiny_config(family), name) for name in given}
    small[row.key("num_attention_heads")] = 8  # KV heads that some classes assume must divide it
    if not row.mixed:
        small[row.key("hidden_size")] = 64  # so that a quarter of a head is two features
    if row.mixed:  # their sizes must fit each other
        left_out = ("num_key_value_heads", "head_dim")
        small |= {name: value for name, value in TINY[family].items() if name not in left_out}
    config = models.FAMILIES[family].config(**small)
    sizes = geometry(small, row)
    assert (sizes.layers, sizes.hidden, sizes.heads) == (2, 32 if row.mixed else 64, 8)
    assert sizes.kv_heads == models.kv_heads(config)
    assert sizes.head_dim == models.head_dim(config)
    # Files always name the context of a family whose sizes follow from each other.
    assert row.plain_sizes or sizes.context == config.max_position_embeddings
    if not row.mixed and set(getattr(config, "layer_types", None) or ()) != {"full_attention"}:
        assert row.window == getattr(config, "sliding_window", None)


def test_no_family_is_several_models_in_one():
    """So that a config.json with such a block within is none of the table's (model_folder)."""
    for family in TINY:
        config = models.FAMILIES[family].config()
        assert config.get_text_config() is config, family


@pytest.mark.parametrize("family", TINY)
def test_names_are_those_of_the_classes(family, make_dense):
    row, dense = TABLE[family], make_dense(family)
    own = models.FAMILIES[family]
    assert type(dense) is own.causal_lm and type(dense.base_model) is own.model
    assert dense.base_model_prefix == row.base
    base = dense.base_model
    base.get_submodule(row.norm)
    layers = base.get_submodule(row.layers)
    for layer in (layers[i] for i in models.sparse_layers(dense.config)):
        attention = layer.get_submodule(row.attention)
        assert type(attention) is own.attention
        assert all(hasattr(attention, name) for name in row.projections)
    assert row.dropout is None or hasattr(dense.config, row.dropout)
    assert tuple(cls.__name__ for cls in own.derived) == row.sparsek_names
    assert all(getattr(models, name).__name__ == name for name in row.sparsek_names)


@pytest.mark.parametrize("family", TINY)
def test_norms_that_have_weights_of_several_heads_are_known(family):
    row, config = TABLE[family], tiny_config(family)
    asked = [name for name in ("use_qk_norm", "qk_layernorm") if hasattr(config, name)]
    config = tiny_config(family, **dict.fromkeys(asked, True))
    with torch.device("meta"):
        base = models.FAMILIES[family].model(config)
    layer = base.get_submodule(row.layers)[models.sparse_layers(config)[0]]
    sizes: Counter[tuple[str, str]] = Counter()
    for name, parameter in layer.get_submodule(row.attention).named_parameters():
        parts = name.split(".")
        if parts[0] not in row.projections:
            sizes[parts[0], parts[-1]] += parameter.numel()
    assert row.joint_norm == (max(sizes.values(), default=0) > models.head_dim(config)), sizes


def test_a_family_that_transformers_is_too_old_for_is_refused_by_its_version(monkeypatch):
    kept = {name: row for name, row in table.TABLE.items() if name != "helium"}
    monkeypatch.setattr(table, "TABLE", kept)
    monkeypatch.setattr(table.installed, "transformers_version", lambda: "5.0.0")
    for model_type in ("helium", "sparsek_helium"):
        with pytest.raises(UsageError, match="transformers 5.0.0 has no models of type 'helium'"):
            table.row_of(model_type)
    assert not table.installed.has("no_such_family") and table.installed.has("helium")


STRAY = {"logit_scale": 3.0, "logits_scaling": 3.0, "lm_head_multiplier": 3.0,
         "final_logit_softcapping": 2.0}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "falcon_h1"])
def test_logits_are_scaled_by_the_family_s_own_keys_alone(family, make_dense):
    """transformers keeps any key of a file; calibration and losses took those of other families."""
    own = tiny_config(family).to_dict()
    model = make_dense(family, **{k: v for k, v in STRAY.items() if k not in own})
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(output_layer(model)(states), model(ids).logits)


@pytest.mark.parametrize(
    ("family", "keys", "slides"),
    [
        ("mistral", {"use_sliding_window": False}, True),  # it has no such switch
        ("mistral", {"layer_types": ["full_attention"] * 2}, True),
        ("qwen2", {"use_sliding_window": False}, False),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, False),
        ("llama", {}, True),  # it has no window: which of the two is meant?
        ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, True),
        ("llama", {"use_sliding_window": False}, False),
    ],
)
def test_a_window_slides_by_the_family_s_own_keys_alone(family, keys, slides):
    """A switch that only the file has left Mistral's window out: another model, in silence."""
    config = tiny_config(family).to_dict() | {"sliding_window": 5} | keys
    row, context = TABLE[family], config["max_position_embeddings"]
    if slides:
        with pytest.raises(UsageError, match="sliding window of 5 tokens") as refusal:
            idle_window_off(row, config, context)
        assert '"sliding_window": null' in refusal.value.hint
        assert ("and llama models have none" in refusal.value.message) == (family == "llama")
    else:
        off = idle_window_off(row, config, context)
        assert off["sliding_window"] is None
        assert layer_types(row, config | off) == ["full_attention"] * 2


@pytest.mark.parametrize("window", [0, -1])
@pytest.mark.parametrize("family", ["mistral", "phi3", "mixtral", "qwen2", "qwen3"])
def test_a_window_without_width_is_what_transformers_makes_of_it(family, window, make_dense):
    """Where it would slide, transformers computes nothing; where no layer does, nobody asks."""
    config = tiny_config(family).to_dict() | {"sliding_window": window, "use_sliding_window": True}
    config.pop("layer_types", None)
    row, context = TABLE[family], config["max_position_embeddings"]
    model = make_dense(family, **{k: config[k] for k in ("sliding_window", "use_sliding_window")})
    ids = torch.arange(3, 20)[None]
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ["sliding_attention"]):
        with pytest.raises(RuntimeError, match="size of tensor"):
            model(ids)
        with pytest.raises(UsageError, match=f"is {window}, and layers of the model") as refusal:
            idle_window_off(row, config, context)
        assert '"sliding_window": null' in refusal.value.hint
    else:
        model(ids)
        assert idle_window_off(row, config, context)["sliding_window"] is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_file_may_count_the_layers_that_do_not_slide(tmp_path, make_checkpoint, family):
    """They were refused as if every layer slid."""
    base = make_checkpoint(tmp_path / "base", family)
    config = json.loads((base / "config.json").read_text())
    del config["layer_types"]
    config |= {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    recipe = {"model": str(base), "out": str(tmp_path / "out"), "calibrate": "none"}
    done = convert(ConvertRecipe(**recipe, topk=6, window=4))
    assert done.plan.types == ("full_attention", "sliding_attention") and done.verified


@pytest.mark.parametrize("window", [0, -1, None])
def test_layers_that_slide_have_a_window(tmp_path, make_checkpoint, window):
    """Of models whose layers differ the plan passed, and the logits of the base failed."""
    base = make_checkpoint(tmp_path / "base", "gemma2")
    config = json.loads((base / "config.json").read_text()) | {"sliding_window": window}
    (base / "config.json").write_text(json.dumps(config))
    recipe = ConvertRecipe(model=str(base), out=str(tmp_path / "out"), calibrate="none")
    said = f"sliding_window in config.json is {json.dumps(window)}"
    with pytest.raises(UsageError, match=said) as refusal:
        plan(recipe)
    assert "null" not in refusal.value.hint and "layer_types" in refusal.value.hint
    config["layer_types"] = ["full_attention"] * len(config["layer_types"])  # as the hint says
    (base / "config.json").write_text(json.dumps(config))
    assert set(plan(recipe).types) == {"full_attention"}


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "opt", "persimmon", "biogpt"])
def test_heads_that_a_family_has_no_key_for_are_refused(family, key):
    """They ended in a kernel's ValueError, or scorers and caches had another size than keys."""
    config = tiny_config(family)
    setattr(config, key, 1 if key == "num_key_value_heads" else 2 * models.head_dim(config))
    sparse = models.sparsek_config_from(config, {"topk": 3, "window": 4})
    with pytest.raises(UsageError, match="the config says . KV heads") as refusal:
        AutoModelForCausalLM.from_config(sparse)
    assert key in refusal.value.hint
