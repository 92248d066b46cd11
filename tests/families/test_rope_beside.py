"""Rotary positions said beside the block that counts: the same, or refused."""

from __future__ import annotations

import json

import pytest
from tiny_families import TINY, tiny_config
from transformers import AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli import hub
from sparsek_cli.errors import UsageError
from sparsek_cli.families.positions import check_one_rope
from sparsek_cli.families.rope_beside import check_beside

BLOCK = {"rope_type": "default", "rope_theta": 5e4}
HALF = BLOCK | {"partial_rotary_factor": 0.5}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
NESTED = {"rope_parameters": {"full_attention": BLOCK, "sliding_attention": SLIDING}}


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("llama", {"rope_parameters": BLOCK, "rope_theta": 5e5}, "rope_theta 500000.0, and its"),
        ("sparsek_llama", {"rope_parameters": BLOCK, "rope_theta": 5e5}, "rope_theta 50000.0: "),
        ("llama", {"rope_scaling": BLOCK, "rope_theta": 5e5}, "rope_theta 500000.0"),
        ("llama", {"rope_parameters": BLOCK, "rotary_emb_base": 5e5}, "rotary_emb_base 500000.0"),
        ("phi", {"rope_parameters": HALF, "partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ("gpt_neox", {"rope_parameters": HALF, "rotary_pct": 0.25}, "rotary_pct 0.25"),
        ("gemma3_text", NESTED | {"rope_theta": 1e6}, "rope_theta 1000000.0"),
        ("gemma3_text", NESTED | {"rope_local_base_freq": 1e3}, "rope_local_base_freq 1000.0"),
        ("cohere2_moe", {"rope_parameters": BLOCK, "rope_theta": 5e5}, "rope_theta 500000.0"),
        ("llama", {"rope_parameters": BLOCK, "rope_theta": 50000}, None),
        ("llama", {"rope_parameters": BLOCK, "rope_theta": None}, None),
        ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, None),
        ("llama", {"rope_theta": 5e5}, None),
        ("phi", {"rope_parameters": BLOCK, "partial_rotary_factor": 0.4}, None),  # it is taken
        ("gemma3_text", NESTED | {"rope_theta": 5e4, "rope_local_base_freq": 10000}, None),
        ("cohere2_moe", {"rope_parameters": BLOCK, "rope_theta": 1e4}, None),  # as its class writes
        ("unknown", {"rope_parameters": BLOCK, "rope_theta": 5e5}, None),
    ],
)  # fmt: skip
def test_what_stands_beside_a_block_is_what_the_block_says(family, keys, says):
    config = {"model_type": family, **keys}
    if says is None:
        check_beside(config)
        return
    with pytest.raises(UsageError) as refusal:
        check_beside(config)
    assert says in refusal.value.message and "take" in refusal.value.hint


@pytest.mark.parametrize("family", TINY)
def test_what_the_classes_write_is_taken(family):
    for config in (tiny_config(family), models.FAMILIES[family].config()):
        check_beside(json.loads(config.to_json_string()))


def test_another_way_of_scaling_is_not_lost_either():
    """Two blocks with the same numbers, and only one way of using them."""
    numbers = {"factor": 4.0, "rope_theta": 1e4}
    within = {"rope_parameters": numbers | {"rope_type": "yarn"}}
    check_one_rope(within | {"rope_scaling": numbers | {"type": "yarn"}})
    with pytest.raises(UsageError, match="rope_type yarn is lost"):
        check_one_rope(within | {"rope_scaling": numbers | {"type": "linear"}})


def test_no_loader_leaves_the_base_beside_the_block_unread(make_checkpoint, tmp_path):
    base = make_checkpoint(tmp_path / "base", "llama", rope_parameters=dict(BLOCK))
    out = tmp_path / "out"
    sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    for folder in (base, out):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"rope_theta": 5e5}))
    for read in (
        lambda: sparsek.convert(base, tmp_path / "next", topk=8, window=8, calibrate="none"),
        lambda: sparsek.load(base, device="cpu"),
        lambda: hub.resolve(out),
        lambda: AutoModelForCausalLM.from_pretrained(out),
    ):
        with pytest.raises(UsageError, match=r"rope_theta 500000\.0, and its block"):
            read()
