"""Where scaled positions start from stands where the family reads it, or nothing is read at all."""

from __future__ import annotations

import json

import pytest
from tiny_families import TINY, tiny_config
from transformers import AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli import hub
from sparsek_cli.conversion.geometry import geometry
from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE
from sparsek_cli.families.original_length import check_original
from sparsek_cli.families.own_config import own_config

FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
LONG = {"type": "longrope", **FACTORS}
SU = {"type": "su", **FACTORS}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
AT = "original_max_position_embeddings"
WITHIN, BESIDE = {AT: 64}, {AT: 64}


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("phi3", {"rope_scaling": SU}, 'by "su", as longrope was called first'),
        ("phi3", {"rope_scaling": SU, **BESIDE}, 'by "su"'),
        ("phi3", {"rope_parameters": SU, **BESIDE}, 'by "su"'),
        ("phi3", {"rope_scaling": LONG | WITHIN}, f"{AT} is 64 within .* it would be 4096"),
        ("phi3", {"rope_scaling": LONG | WITHIN, AT: 32}, "is 64 within .* it would be 32"),
        ("sparsek_phi3", {"rope_parameters": LONG | WITHIN}, "is 64 within"),
        ("llama", {"rope_scaling": LONG, **BESIDE}, f"{AT} is 64 beside .* it would be 128"),
        ("qwen2", {"rope_parameters": YARN, **BESIDE}, "is 64 beside"),
        ("phi3", {"rope_scaling": LONG, **BESIDE}, None),
        ("phi3", {"rope_scaling": LONG | WITHIN, **BESIDE}, None),
        ("phi3", {"rope_scaling": SU | WITHIN}, None),
        ("llama", {"rope_scaling": LONG | WITHIN, **BESIDE}, None),
        ("qwen2", {"rope_parameters": YARN | WITHIN, AT: 32}, None),  # which nobody reads
    ],
)
def test_it_stands_where_the_family_reads_it(family, keys, says):
    config = {"model_type": family, "max_position_embeddings": 128, "hidden_size": 32, **keys}
    config["num_attention_heads"] = 4
    if says is None:
        check_original(config)
        read = own_config(TABLE[family], config).rope_parameters
        assert read[AT] == 64
        return
    with pytest.raises(UsageError, match=says) as refusal:
        check_original(config)
    assert "write" in refusal.value.hint


@pytest.mark.parametrize("family", TINY)
def test_what_the_classes_write_is_taken(family):
    for config in (tiny_config(family), models.FAMILIES[family].config()):
        check_original(config.to_dict())


@pytest.mark.parametrize("length", [BESIDE, {}])
def test_a_first_phi_3_is_refused_by_what_mends_it(make_checkpoint, tmp_path, length):
    """Its class raised a KeyError, and the hint was to fetch the model again."""
    base = make_checkpoint(tmp_path / "base", "phi3", max_position_embeddings=128)
    file = base / "config.json"
    fields = json.loads(file.read_text())
    del fields["rope_parameters"], fields[AT]
    file.write_text(json.dumps(fields | {"rope_scaling": SU} | length))
    for attempt in (
        lambda: hub.resolve(base),  # by which every verb goes
        lambda: sparsek.load(base, device="cpu"),
        lambda: sparsek.convert(base, tmp_path / "out", topk=8, window=8, calibrate="none"),
    ):
        with pytest.raises(UsageError, match='by "su"') as refusal:
            attempt()
    hint = refusal.value.hint
    assert hint.startswith('write "longrope" in place of "su"') and (AT in hint) == (not length)
    # As the hint says.
    file.write_text(json.dumps(fields | {"rope_scaling": SU | {"type": "longrope"}} | BESIDE))
    sparsek.convert(base, tmp_path / "out", topk=8, window=8, calibrate="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_parameters[AT] == 64
    # In a converted folder it may not part from the one that is read either.
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text())
    fields["rope_scaling"][AT] = 32
    file.write_text(json.dumps(fields))
    with pytest.raises(UsageError, match="is 32 within"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("rope", "says", "hint"),
    [
        (YARN, "without long_factor, short_factor", "has no such block, take it out"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "a way (linear) that the fam",
         "its one way is longrope"),
    ],
)  # fmt: skip
def test_ways_that_phi_3_does_not_have(rope, says, hint):
    """The hint was to fetch the model again."""
    config = tiny_config("phi3").to_dict() | {"rope_parameters": rope}
    with pytest.raises(UsageError) as refusal:
        own_config(TABLE["phi3"], config)
    assert says in refusal.value.message and hint in refusal.value.hint
    assert geometry(config | {"rope_parameters": None, "rope_theta": 1e4}, TABLE["phi3"])
