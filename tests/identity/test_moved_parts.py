"""Weights elsewhere, other dtypes, other processes: the same numbers."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import accelerate
import pytest
import torch
from sparse_path import assert_sparse, counted_attention
from tiny_families import tiny_config
from transformers import AutoModelForCausalLM

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "mixtral")
IDS = torch.arange(3, 40)[None]


def parts_on_disk(model) -> dict[str, str]:
    """A device map with the second layer, the final norm and the head on disk."""
    names = {
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    late = {"norm", "final_layer_norm", "ln_f", "embed_out"}
    if not model.config.tie_word_embeddings:  # a tied head is where the embedding is
        late.add("lm_head")
    layers = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    places = {}
    for name in names:
        if name.startswith(f"{layers}."):
            layer = ".".join(name.split(".")[: layers.count(".") + 2])
            places[layer] = "disk" if layer.endswith(".1") else "cpu"
        else:
            places[name] = "disk" if name.split(".")[-1] in late else "cpu"
    return places


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_offloading_gives_the_same_logits(family, scorer, sparse_model, tmp_path):
    model = sparse_model(family)
    if scorer == "mlp":
        config = model.config.to_dict()
        config["sparsek"] = {**config["sparsek"], "scorer": {"type": "mlp", "width": 4}}
        model = AutoModelForCausalLM.from_config(type(model.config)(**config)).eval()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(IDS).logits
        offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        accelerate.cpu_offload(offloaded, execution_device="cpu")
        torch.testing.assert_close(offloaded(IDS).logits, expected, rtol=0, atol=0)
        on_disk = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            device_map=parts_on_disk(model),
            offload_folder=str(tmp_path / "offload"),
        )
        assert any(parameter.is_meta for parameter in on_disk.parameters())
        torch.testing.assert_close(on_disk(IDS).logits, expected, rtol=0, atol=0)
    assert_sparse(on_disk)


def test_generating_under_autocast_with_float32_weights(family, sparse_model):
    model = sparse_model(family)
    with torch.autocast("cpu", dtype=torch.bfloat16), counted_attention() as layers:
        out = model.generate(
            IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert len(layers) == 2 * 4  # the prompt and three tokens, in each layer
    cache = out.past_key_values
    assert type(cache) is models.SparseKCache
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    # Fed at once, under autocast too, the same tokens have the same logits.
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        whole = model(out.sequences[:, :-1]).logits[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1).float(), whole.float(), atol=0.1, rtol=0)


@pytest.mark.parametrize("how", ["sparsek", "dense"])
def test_training_under_autocast_keeps_what_attention_reads_once(how, sparse_model, monkeypatch):
    """In bf16, for all projections and the scorer: else each kept a copy, the scorer in float32."""
    from sparsek_cli.models import scorer

    # The scorer's product as on a GPU.
    monkeypatch.setattr(scorer, "_splits", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(
        scorer, "_split_product", lambda x, w: torch.nn.functional.linear(x.float(), w)
    )
    model = sparse_model("llama", head_dim=12).train()  # what W_o reads is no hidden state then
    attention, size, kept = model.model.layers[0].self_attn, IDS.numel(), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1] == model.config.hidden_size == tensor.numel() // size:
            kept[tensor.data_ptr()] = tensor  # alive, so that no other one lies there
        return tensor

    own = attention.forward

    def forward(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return own(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    dense = models.dense_attention(model) if how == "dense" else nullcontext()
    with dense, torch.autocast("cpu", dtype=torch.bfloat16), counted_attention() as layers:
        model(IDS, labels=IDS)
    assert [tensor.dtype for tensor in kept.values()] == [torch.bfloat16]
    assert bool(layers) == (how == "sparsek")


def test_a_cache_stays_inside_of_autocast_or_outside(sparse_model):
    model = sparse_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(SparsekError, match="bfloat16") as refusal:
        model(IDS[:, :1], past_key_values=cache)
    assert "autocast" in refusal.value.hint


def test_configs_and_models_pickle_into_a_fresh_process(sparse_model, tmp_path, clean_program):
    expected = {}
    for family in FAMILIES:
        model = sparse_model(family)
        expected[family] = model(IDS).logits.detach()
        parts = (model.config, model, models.SparseKCache(model.config))
        (tmp_path / f"{family}.pickle").write_bytes(pickle.dumps(parts))
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import pickle, torch
expected = torch.load({str(tmp_path / "expected.pt")!r})
for family, logits in expected.items():
    with open({str(tmp_path)!r} + f"/{{family}}.pickle", "rb") as file:
        config, model, cache = pickle.load(file)
    assert type(config) is type(model.config) and config.sparsek == model.config.sparsek
    assert config._attn_implementation == "sparsek"
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids, past_key_values=cache).logits, logits)
    print(family)
"""
    done = clean_program(code)
    assert done.stdout.split() == list(FAMILIES), done.stderr


def test_every_family_s_config_pickles():
    for family, row in models.FAMILIES.items():
        config = models.sparsek_config_from(tiny_config(family), {"topk": 3})
        again = pickle.loads(pickle.dumps(config))
        assert type(again) is row.sparsek_config and again.sparsek == config.sparsek
        assert again._attn_implementation == "sparsek"
