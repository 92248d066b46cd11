"""The base of rotary positions is said where the family reads it, or nothing is read at all."""

from __future__ import annotations

import json

import pytest
from tiny_families import TINY, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli import hub
from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE
from sparsek_cli.families.own_config import own_config
from sparsek_cli.families.rotary_base import check_base

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
BASE = {"rope_theta": 5e4}
PLAIN = {"rope_type": "default", **BASE}
BOTH = ("full_attention", "sliding_attention")


def each(block):
    return {"rope_parameters": {kind: dict(block) for kind in BOTH}}


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("llama", {"rope_parameters": YARN}, "rope_parameters (yarn) name no rope_theta"),
        ("llama", {"rope_parameters": {"rope_type": "default"}}, "(default) name no rope_theta"),
        ("llama", {"rope_parameters": {"type": "linear", "factor": 2.0}}, "(linear) name no"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": None}}, "name no rope_theta"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": None}, **BASE}, "name no rope_theta"),
        ("sparsek_llama", {"rope_parameters": YARN}, "name no rope_theta"),
        ("llama", {"rope_parameters": YARN, "rotary_emb_base": 5e4}, "name no rope_theta"),
        ("phi", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "name no rope_theta"),
        ("mixtral", {"rope_parameters": YARN}, "name no rope_theta"),
        ("gpt_neox", {"rope_parameters": YARN, **BASE}, "name no rope_theta"),
        ("gemma3_text", each(YARN), ".full_attention (yarn) name no rope_theta"),
        ("gemma3_text", each(YARN) | BASE, ".sliding_attention (yarn) name no rope_theta"),
        ("olmo3", each(YARN) | BASE, ".sliding_attention (yarn) name no rope_theta"),
        ("unknown", {"rope_parameters": YARN}, "name no rope_theta"),
        ("cohere2_moe", {"rope_parameters": YARN}, "name no rope_theta"),
        ("gpt2", {"rope_parameters": YARN}, "and gpt2 has no rotary positions"),
        ("llama", each(PLAIN), "a block for full_attention, and llama reads one block for all"),
        ("llama", {"rope_parameters": PLAIN | each(YARN)["rope_parameters"]}, "none would heed"),
        ("gemma3_text", {"rope_parameters": YARN | BASE}, "reads one for each type of layer"),
        (
            "gemma3_text",
            {"rope_parameters": YARN | each(PLAIN)["rope_parameters"]},
            "reads one for each type of layer",
        ),
        ("llama", {"rotary_emb_base": 5e4}, "rotary_emb_base, which llama does not read: it would"),
        ("llama", {"rope_base": 5e4, "rope_scaling": YARN}, "it would be 10000.0, not 50000.0"),
        ("gpt_neox", BASE, "rope_theta, which gpt_neox does not read"),
        ("llama", {"rope_theta": None}, "rope_theta is null, and rotary positions need a number"),
        ("llama", {"rope_theta": None, "rope_parameters": {}}, "rope_theta is null"),
        ("llama", {"rope_theta": None, "rope_scaling": YARN}, "rope_theta is null"),
        ("gpt_neox", {"rotary_emb_base": None}, "rotary_emb_base is null"),
        ("gemma3_text", {"rope_theta": None}, "rope_theta is null"),
        # What is said is taken, wherever the class reads it.
        ("llama", {"rope_parameters": YARN | BASE}, None),
        ("llama", {"rope_parameters": YARN, **BASE}, None),
        ("llama", {"rope_parameters": YARN | BASE, "rope_theta": None}, None),
        ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN | BASE}, None),
        ("gpt_neox", {"rope_parameters": YARN, "rotary_emb_base": 5e4}, None),
        ("gpt_neox", {"rotary_emb_base": 5e4, "rope_theta": 1e4}, None),
        ("gemma3_text", each(YARN | BASE), None),
        ("gemma3_text", each(YARN) | BASE | {"rope_local_base_freq": 5e4}, None),
        ("unknown", {"rope_parameters": YARN, **BASE}, None),
        ("unknown", each(YARN | BASE), None),
    ],
)  # fmt: skip
def test_a_block_names_its_base_in_the_family_s_shape(family, keys, says):
    config = {"model_type": family, **keys}
    kept = json.dumps(config)
    if says is None:
        check_base(config)
        assert json.dumps(config) == kept
        if family in TABLE:
            rope = own_config(TABLE[family], config).rope_parameters
            blocks = [rope[kind] for kind in BOTH] if TABLE[family].rope_by_type else [rope]
            assert {block["rope_theta"] for block in blocks} == {5e4}
        return
    with pytest.raises(UsageError) as refusal:
        check_base(config)
    assert says in refusal.value.message and refusal.value.hint


@pytest.mark.parametrize(
    ("family", "keys", "theta"),
    [
        ("llama", {}, 1e4),  # Llama 2
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4),  # and what it became
        ("llama", {"rope_parameters": None}, 1e4),
        ("llama", {"rope_parameters": {}}, 1e4),
        ("llama", BASE, 5e4),
        ("llama", {"rotary_emb_base": 1e4}, 1e4),  # of a file that means the same
        ("cohere", {}, 5e5),
        ("gpt_neox", {"rotary_pct": 0.25}, 1e4),
        ("gemma3_text", {}, 1e6),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": PLAIN}}, 1e6),
        ("gemma3_text", {"rope_parameters": {"full_attention": None}}, 1e6),
        ("gpt_neox", {"rope_theta": None}, 1e4),  # which it does not read
        ("olmo3", {"rope_scaling": YARN}, 5e5),
    ],
)  # fmt: skip
def test_files_older_than_the_block_mean_the_class_s_own(family, keys, theta):
    config = {"model_type": family, **keys}
    check_base(config)
    rope = own_config(TABLE[family], config).rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == theta


@pytest.mark.parametrize("family", TINY)
def test_what_the_classes_write_is_taken_and_shaped_as_the_table_says(family):
    for config in (tiny_config(family), models.FAMILIES[family].config()):
        check_base(config.to_dict())
        check_base(json.loads(config.to_json_string()))
        rope = getattr(config, "rope_parameters", None) or {}
        nested = any(isinstance(block, dict) for block in rope.values())
        assert nested == TABLE[family].rope_by_type


def rewrite(folder, **keys):
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    for key, value in keys.items():
        fields[key] = value
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(("family", "shape"), [("llama", dict), ("gemma3_text", each)])
def test_no_loader_takes_another_base(family, shape, make_checkpoint, tmp_path):
    """A block rewritten by hand lost the base, and what loaded computed with the class's own."""
    given = PLAIN if shape is dict else each(PLAIN)["rope_parameters"]
    base = make_checkpoint(tmp_path / "base", family, rope_parameters=given)
    out = tmp_path / "out"
    sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    lost = YARN if shape is dict else each(YARN)["rope_parameters"]
    for folder in (base, out):
        rewrite(folder, rope_parameters=lost)
    for read in (
        lambda: sparsek.convert(base, tmp_path / "next", topk=8, window=8, calibrate="none"),
        lambda: sparsek.load(base, device="cpu"),
        lambda: sparsek.load(out, device="cpu"),
        lambda: hub.resolve(out),  # by which every verb goes
        lambda: AutoConfig.from_pretrained(out),
        lambda: AutoModelForCausalLM.from_pretrained(out),
        lambda: models.FAMILIES[family].sparsek_causal_lm.from_pretrained(out),
    ):
        with pytest.raises(UsageError, match=r"\(yarn\) name no rope_theta") as refusal:
            read()
    assert '"rope_theta": NUMBER' in refusal.value.hint
    told = {"llama": "10000.0", "gemma3_text": "1000000.0"}[family]
    assert refusal.value.hint.endswith(f"where it names none, {told}")
    # As the hint says.
    said = YARN | BASE if shape is dict else each(YARN | BASE)["rope_parameters"]
    for folder in (base, out):
        rewrite(folder, rope_parameters=said)
    sparsek.convert(base, tmp_path / "next", topk=8, window=8, calibrate="none")
    for folder in (tmp_path / "next", out):
        rope = AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters
        assert rope.get("full_attention", rope)["rope_theta"] == 5e4


def test_a_block_that_is_handed_over_in_python_names_it_too(sparse_model, tmp_path):
    sparse_model("llama", rope_parameters=dict(PLAIN)).save_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match="name no rope_theta"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", rope_parameters=dict(YARN))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", rope_parameters=YARN | BASE)
    assert model.config.rope_parameters["rope_theta"] == 5e4
    # A second block beside it takes it away, as in a folder that verbs read.
    rewrite(tmp_path / "out", rope_scaling=YARN)
    with pytest.raises(UsageError, match="is lost"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
