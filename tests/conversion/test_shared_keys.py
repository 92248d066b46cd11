"""Calibration of a layer whose keys others read: by the queries of all of them."""

from __future__ import annotations

import pytest
import torch
from verbs import convert

from sparsek_cli.conversion import verify
from sparsek_cli.conversion.calibrate.layer_search import _errors
from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.method import Method
from sparsek_cli.conversion.calibrate.recorded import dense_attention
from sparsek_cli.conversion.calibrate.scorers.targets import future_attention
from sparsek_cli.conversion.calibrate.sensitivity.output_error import Slots, output_errors
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.recipes.schema_convert import ConvertRecipe

KIND, STREAMS = "gemma4_text-shared", "gemma3n_text-shared"
# Of 6 layers the last 3 share: 1 stores what 3 and 5 read.
SIZES = {"num_hidden_layers": 6, "num_kv_shared_layers": 3,
         "layer_types": 3 * ["sliding_attention", "full_attention"]}  # fmt: skip
# Of Gemma 3n layers have sizes of their own, too.
MORE = {KIND: {}, STREAMS: {"intermediate_size": 48, "activation_sparsity_pattern": 6 * [0.5]}}
TOKENS, TURNS, LENGTH = 48, 2, 5


@pytest.fixture(params=[KIND, STREAMS])
def base_and_recordings(request, make_checkpoint, tmp_path):
    """The base as layers, and the recording of two sequences; the second one ends in turns."""
    folder = make_checkpoint(tmp_path / "base", request.param, **SIZES, **MORE[request.param])
    plan = make_plan(ConvertRecipe(model=str(folder), out=str(tmp_path / "out")))
    ids = [torch.arange(3, 3 + TOKENS), torch.arange(4, 4 + TOKENS + TURNS * LENGTH)]
    recorded = {}
    with torch.no_grad():
        base = LayerwiseBase(
            plan, ids, [(0, 0), (TURNS, LENGTH)], torch.device("cpu"), torch.float32
        )
        base.pass_layer(0)
        base.run_layer(1, range(2), recorded.__setitem__, advance=True)
    return base, recorded, folder, ids


def test_all_that_read_are_recorded(base_and_recordings):
    """Their queries are those of the model itself, in one pass over the sequence."""
    from transformers import AutoModelForCausalLM

    base, recorded, folder, ids = base_and_recordings
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    queries, hooks = {}, []
    for layer in (1, 3, 5):
        attention = model.base_model.layers[layer].self_attn
        hooks.append(
            attention.o_proj.register_forward_pre_hook(
                lambda module, args, n=layer: queries.__setitem__(n, args[0])
            )
        )
    with torch.no_grad():
        model(ids[0][None])
    for number in recorded:
        streams = base.stream(base.hidden[number])
        assert streams.shape == recorded[number].key.shape[1:2]
        assert [reader.layer for reader in recorded[number].readers] == [3, 5]
    for layer, one in zip((1, 3, 5), recorded[0].by_reader(), strict=True):
        mine = dense_attention(one).transpose(0, 1).flatten(1)
        torch.testing.assert_close(mine, queries[layer][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [0, 1], ids=["plain", "in turns"])
def test_targets_are_the_largest_of_all_that_read(base_and_recordings, number):
    recorded = base_and_recordings[1][number]
    tokens = recorded.key.shape[1]
    rows, answer = torch.arange(tokens), torch.zeros(tokens, dtype=torch.bool)
    answer[-3:] = True
    together = future_attention(recorded, rows, answer, 4)
    alone = [future_attention(one, rows, answer, 4) for one in recorded.by_reader()]
    assert len(alone) == 3 and not torch.equal(alone[0][0], together[0])
    for kind in (0, 1):
        largest = torch.stack([each[kind] for each in alone]).amax(0)
        assert torch.equal(together[kind], largest)


@pytest.mark.parametrize("number", [0, 1], ids=["plain", "in turns"])
def test_errors_of_all_that_read_count(base_and_recordings, number):
    base, recorded = base_and_recordings[0], base_and_recordings[1][number]
    tokens = recorded.key.shape[1]
    slots, rows = Slots(4, 1, (2, 5)), torch.arange(tokens - 6, tokens)
    effective = torch.randn(3, recorded.key.shape[0], tokens, dtype=torch.float64)
    weights = [base.output_weight(layer) for layer in (1, 3, 5)]
    shares = [1.0, 0.5, 2.0]
    for reading in recorded.readings(rows):
        mine = reading.of(effective)
        together = _errors(reading, mine, slots, weights, shares)
        alone = [
            output_errors(one, mine, reading.rows, slots, weight)
            for one, weight in zip(reading.recorded.by_reader(), weights, strict=True)
        ]
        expected = sum(s * x for s, x in zip(shares, alone, strict=True))
        torch.testing.assert_close(together, expected)
        assert all(float(x.max()) > 0 for x in alone)


@pytest.mark.parametrize(
    ("kind", "more", "compared"),
    [
        (KIND, SIZES, "not compared"),
        (STREAMS, {}, "not compared"),  # parts of all layers in one tensor
        ("gemma4_text-routed", {"num_hidden_layers": 4, "layer_types": 4 * ["full_attention"]},
         "first 2 layers"),
    ],
)  # fmt: skip
def test_a_large_model_is_compared_in_part_where_it_can_be(
    kind, more, compared, make_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(verify, "SMALL_MODEL", 0)
    recipe = ConvertRecipe(
        model=str(make_checkpoint(tmp_path / "base", kind, **more)),
        out=str(tmp_path / "out"),
        topk=8,
        window=8,
        calibrate_tokens=512,
        calibrate_length=64,
        budgets="uniform",
    )
    assert convert(recipe, method=Method(documents="none")).verified.logits == compared


def test_keys_that_files_hold_for_layers_that_share_are_nobodys(make_checkpoint, tmp_path):
    """Checkpoints come with projections of layers that read others' keys: no model takes them."""
    from safetensors.torch import load_file, save_file

    base = make_checkpoint(tmp_path / "base", KIND)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if ".layers.1.self_attn." in name]:
        if name.split(".")[-2] in ("k_proj", "v_proj", "k_norm"):
            tensors[name.replace("layers.1.", "layers.3.")] = torch.randn_like(tensors[name])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    recipe = ConvertRecipe(
        model=str(base), out=str(tmp_path / "out"), topk=8, window=8, calibrate="none"
    )
    assert convert(recipe).verified.logits == "all layers"
