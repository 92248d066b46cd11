"""Inputs that look right and are not: each is refused, said, or the same as in the base.

The refusals of whole kinds are in cli/test_hostile_input.py; here is what would pass for good.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bad_models import TEXT_PARTS, config, file, linked, tensors
from safetensors.torch import load_file, save_file
from sparse_path import assert_sparse
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
from verbs import convert

from sparsek_cli import hub, models, quantised
from sparsek_cli.data import corpus
from sparsek_cli.data.text.documents import iterate_texts
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.loading import load_model, load_weights, weights
from sparsek_cli.recipes.schema_convert import ConvertRecipe

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_checkpoint) -> SimpleNamespace:
    """A dense llama with tied embeddings, `.base`, and its conversion, `.out`."""
    root = tmp_path_factory.mktemp("further")
    base = make_checkpoint(root / "base", tie_word_embeddings=True)
    out = root / "out"
    convert(recipe(base, out))
    return SimpleNamespace(base=base, out=out)


def recipe(base: Path, out: Path) -> ConvertRecipe:
    return ConvertRecipe(model=str(base), out=str(out), calibrate="none", topk=6, window=4)


def loaded(folder: Path) -> torch.nn.Module:
    return load_model(hub.resolve(folder), device=torch.device("cpu"), dtype=torch.float32)


def scorers_with(folder: Path, out: Path, value: float) -> Path:
    """The converted folder with one weight of a scorer changed."""
    linked(folder, out, "sparsek.safetensors")
    found = load_file(folder / "sparsek.safetensors")
    next(tensor for name, tensor in found.items() if name.endswith("weight"))[0, 0] = value
    save_file(found, out / "sparsek.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scorers_that_are_no_numbers(made, tmp_path, value):
    damaged = scorers_with(made.out, tmp_path / "damaged", value)
    with pytest.raises(SparsekError, match="values that are not finite") as refusal:
        loaded(damaged)
    assert "sparsek export" in refusal.value.hint
    from sparsek_cli.sharing import dense

    dense.run(dense.plan(str(damaged), tmp_path / "dense"))  # as hinted
    convert(recipe(tmp_path / "dense", tmp_path / "again"))
    assert_sparse(loaded(tmp_path / "again"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "language_model."),  # the text part of a model that sees
        ("", "_forward_module."),  # a trainer's strategy
        ("model.layers.0.", "model.layers.0._fsdp_wrapped_module."),
        ("model.layers.0.", "model.layers.0._checkpoint_wrapped_module."),
    ],
)
def test_weights_under_the_names_of_what_wraps_the_model(made, tmp_path, old, new):
    """They were told as missing, and to be fetched again, which changes nothing."""

    def renamed(found):
        for name in [name for name in found if name.startswith(old)]:
            found[new + name.removeprefix(old)] = found.pop(name)

    tensors(renamed)(made.base, tmp_path / "wrapped")
    load = [
        lambda: loaded(tmp_path / "wrapped"),
        lambda: convert(recipe(tmp_path / "wrapped", tmp_path / "out")),
    ]
    for attempt in load:
        with pytest.raises(SparsekError, match=f"lacks .*; it holds {new}") as refusal:
            attempt()
        assert "something that wraps the model" in refusal.value.hint


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb"
    "8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
     "generation_config.json", "chat_template.jinja", "model.gguf", "text.txt", "rows.jsonl",
     "sparsek.safetensors"],
)  # fmt: skip
def test_what_git_leaves_in_place_of_a_large_file_is_told(made, tmp_path, name):
    """A clone without LFS: each was damaged in its own way, and a template was rendered."""
    from sparsek_cli.scorers_alone.find import read

    linked(made.base, tmp_path / "cloned", name)
    pointer = tmp_path / "cloned" / name
    pointer.write_text(POINTER)
    attempt = {
        "model.gguf": lambda: convert(recipe(pointer, tmp_path / "out")),
        "text.txt": lambda: list(iterate_texts(pointer)),
        "rows.jsonl": lambda: list(iterate_texts(pointer)),
        "sparsek.safetensors": lambda: read(pointer),
    }.get(name, lambda: hub.resolve(tmp_path / "cloned"))
    with pytest.raises(UsageError, match=f"{name} is a pointer of Git LFS") as refusal:
        attempt()
    assert "git lfs pull" in refusal.value.hint


OURS = {"model_type": "sparsek_llama"}


@pytest.mark.parametrize(
    "changes", [{"sparsek": {"topk": 3}}, OURS, OURS | {"sparsek": "yes"}, OURS | {"sparsek": []}]
)
def test_a_type_without_its_settings(made, tmp_path, changes):
    config(**changes)(made.base, tmp_path / "half")
    with pytest.raises(UsageError, match="is it converted or not"):
        hub.resolve(tmp_path / "half")


@pytest.mark.parametrize(
    ("family", "keys", "says"),
    [
        ("gpt2", {"head_dim": 4}, "4 KV heads of 4 features"),  # its bytes would be counted wrong
        ("opt", {"head_dim": 4}, "4 KV heads of 4 features"),
        ("gpt_neox", {"num_key_value_heads": 2}, "2 KV heads of 8 features"),
        ("gpt_bigcode", {"num_key_value_heads": 2}, "2 KV heads of 8 features"),
        ("llama", {"num_key_value_heads": 4}, "4 KV heads of 8 features"),
    ],
)
def test_heads_that_the_weights_do_not_have(make_checkpoint, tmp_path, family, keys, says):
    """Of families that go by other keys, or by none: nothing else looks at these."""
    base = make_checkpoint(tmp_path / "base", family)
    config(**keys)(base, tmp_path / "edited")
    with pytest.raises(SparsekError, match=f"has shape .*, and config.json says {says}") as refusal:
        convert(recipe(tmp_path / "edited", tmp_path / "out"))
    assert "or take them out" in refusal.value.hint
    assert convert(recipe(base, tmp_path / "out")).verified  # as hinted


@pytest.mark.parametrize("which", ["base", "out"])
@pytest.mark.parametrize("key", TEXT_PARTS)
def test_a_second_model_within_config_json(made, tmp_path, key, which):
    """transformers asks the block within for sizes: that failed as damage, or nothing was said."""
    config(**{key: {"num_hidden_layers": 9}})(getattr(made, which), tmp_path / "nested")
    with pytest.raises(UsageError, match=f"config.json holds a {key} within") as refusal:
        loaded(tmp_path / "nested")
    assert f"take {key} out" in refusal.value.hint
    config(**{key: None})(tmp_path / "nested", tmp_path / "mended")
    assert loaded(tmp_path / "mended").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"topk": [6]}, "topk has 1 entries for 2 layers"),
        ({"topk": -1}, "topk is -1"),
        ({"windw": 4}, "no key `windw`"),
        ({"gate": "soft"}, "gate is 'soft'"),
        ({"scorer": {"type": "deep"}}, "scorer is"),
        ({"scorer": {"type": "linear"}}, "which its config.json has no place for"),
        ({"window": 2.5}, "window is 2.5"),
    ],
)
def test_settings_that_do_not_fit(made, tmp_path, block, says):
    whole = json.loads((made.out / "config.json").read_text())["sparsek"]
    config(sparsek=whole | block)(made.out, tmp_path / "edited")
    with pytest.raises(SparsekError, match=says):
        loaded(tmp_path / "edited")


@pytest.mark.parametrize(
    "sizes",
    [{"num_key_value_heads": 10**6}, {"head_dim": 10**6}, {"intermediate_size": 10**7},
     {"hidden_size": 32 * 10**5}],
)  # fmt: skip
@pytest.mark.parametrize("which", ["base", "out"])
def test_absurd_sizes_are_found_before_anything_is_drawn(made, tmp_path, monkeypatch, sizes, which):
    places, load = [], quantised.load

    def watched(kind, path, config, dtype, device="cpu", **options):
        places.append(str(device))
        return load(kind, path, config, dtype, device, **options)

    monkeypatch.setattr(quantised, "load", watched)
    config(**sizes)(getattr(made, which), tmp_path / "model")
    with pytest.raises(SparsekError, match=r"has shape .*, config.json asks for"):
        loaded(tmp_path / "model")
    assert places == ["meta"]


def test_a_package_that_does_not_fit_is_not_the_folder_s_damage(made, monkeypatch):
    """An old gptqmodel beside a new transformers ends so."""

    def load(*args, **kwargs):
        raise ImportError("cannot import name 'no_init_weights' from 'transformers'")

    monkeypatch.setattr(quantised, "load", load)
    with pytest.raises(SparsekError, match="'no_init_weights'") as refusal:
        loaded(made.base)
    assert "damaged" not in refusal.value.hint and "upgrade" in refusal.value.hint


@pytest.mark.parametrize("content", ['{"eos_token_id": ', "[]", "3", ""])
def test_a_generation_config_that_would_be_dropped(made, tmp_path, content):
    file("generation_config.json", content)(made.base, tmp_path / "model")
    with pytest.raises(UsageError, match="generation_config.json holds no JSON object") as refusal:
        hub.resolve(tmp_path / "model")
    assert "remove it" in refusal.value.hint
    (tmp_path / "model" / "generation_config.json").unlink()
    assert hub.resolve(tmp_path / "model").path


def test_a_tensor_in_two_files(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m", max_shard_size="20KB")
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = max(set(places.values()) - {places[UP]})
    found = load_file(folder / other) | {UP: torch.zeros(48, 32)}
    save_file(found, folder / other, metadata={"format": "pt"})
    with pytest.raises(SparsekError, match=f"{UP} is both in .* and in .*: it is not clear"):
        hub.resolve(folder)


@pytest.mark.parametrize("other", ["another head", "no embedding"])
def test_tied_weights_are_read_as_the_base_s_are(made, tmp_path, other):
    """Where embedding and head are one by config.json, and the file holds two, or the other."""

    def change(found):
        embedding = found["model.embed_tokens.weight"]
        if other == "another head":
            found["lm_head.weight"] = torch.randn_like(embedding)
        else:
            found["lm_head.weight"] = found.pop("model.embed_tokens.weight")

    tensors(change)(made.base, tmp_path / "tied")
    convert(recipe(tmp_path / "tied", tmp_path / "out"))
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad(), models.budget(sparse, topk=64):
        torch.testing.assert_close(sparse(ids).logits, base(ids).logits, atol=2e-4, rtol=2e-4)


def test_a_tokenizer_without_an_end_says_so(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("words")
    tokenizer.eos_token, said = None, []
    corpus.load_corpus(str(tmp_path / "a.txt"), tokenizer, say=said.append)
    assert any("no end-of-text token: documents end without one" in line for line in said)


def test_every_other_way_to_name_an_attention(made):
    """Also through pipelines, parts of models, and models made from a config."""
    refused = [
        lambda name: AutoModel.from_pretrained(made.out, attn_implementation=name),
        lambda name: AutoModel.from_config(
            AutoConfig.from_pretrained(made.out), attn_implementation=name
        ),
        lambda name: pipeline(
            "text-generation", str(made.out), model_kwargs={"attn_implementation": name}
        ),
        lambda name: AutoConfig.from_pretrained(made.out, attn_implementation={"": name}),
        lambda name: load_weights(
            made.out, "m", dtype=torch.float32, attn_implementation=name
        ),
    ]  # fmt: skip
    for attempt in refused:
        for name in ("sdpa", "eager"):
            with pytest.raises(UsageError, match="would switch SparseK off"):
                attempt(name)


def test_adapters_keep_it_sparse_and_one_of_another_base_fails(made, tmp_path, dense_model):
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(made.out)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_sparse(again.merge_and_unload().eval())
    wide = dense_model("llama", hidden_size=48)
    get_peft_model(wide, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "wide")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.out), tmp_path / "wide")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-300}},
        {"rms_norm_eps": -10.0},
    ],
)
def test_numbers_of_a_config_that_make_none(made, tmp_path, changes):
    """The base itself is at fault, and nobody is asked to report it."""
    config(**changes)(made.base, tmp_path / "base")
    with pytest.raises(SparsekError, match="the logits of base itself are not finite") as refusal:
        convert(recipe(tmp_path / "base", tmp_path / "out"))
    assert "fetch the model again" in refusal.value.hint
    assert not (tmp_path / "out").exists()


def test_what_a_library_says_of_a_field_is_told_whole(made, tmp_path):
    config(eos_token_id="</s>")(made.base, tmp_path / "base")
    with pytest.raises(SparsekError, match="field 'eos_token_id': .*expected") as refusal:
        convert(recipe(tmp_path / "base", tmp_path / "out"))
    assert "Strict" not in refusal.value.message


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sliding_window": 6}, "names a sliding window of 6 tokens, and llama models have none"),
        ({"attention_chunk_size": 6}, "names an attention chunk size of 6 tokens"),
        (
            {"layer_types": ["linear_attention", "full_attention"]},
            "some layers are linear_attention",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "some layers are sliding_attention"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "attention from the hub"),
        ({"_attn_implementation": "paged|owner/kernel"}, "attention from the hub"),
        ({"output_attentions": True}, "has output_attentions true"),  # the tokenizer was blamed
    ],
)
def test_keys_that_no_layer_heeds_and_something_else_does(make_checkpoint, tmp_path, keys, says):
    """A cache that slides under attention that does not; code of a kernel from the hub."""
    base = make_checkpoint(tmp_path / "base", "llama")
    config(**keys)(base, tmp_path / "edited")
    with pytest.raises(UsageError, match=says) as refusal:
        loaded(tmp_path / "edited")
    assert "take" in refusal.value.hint or "null" in refusal.value.hint
    with pytest.raises(UsageError, match=says):
        convert(recipe(tmp_path / "edited", tmp_path / "out"))
    config(**dict.fromkeys(keys))(tmp_path / "edited", tmp_path / "mended")  # as hinted
    assert convert(recipe(tmp_path / "mended", tmp_path / "out")).verified


@pytest.mark.parametrize(
    "keys", [{"sliding_window": 10**6}, {"sliding_window": 6, "use_sliding_window": False}]
)
def test_a_window_that_is_no_use_of_is_forgotten(make_checkpoint, tmp_path, keys):
    """transformers' cache would heed it all the same."""
    base = make_checkpoint(tmp_path / "base", "llama")
    config(**keys)(base, tmp_path / "edited")
    assert loaded(tmp_path / "edited").config.sliding_window is None


@pytest.mark.parametrize("none", [0, -1, False])
@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_no_window_is_written_in_many_ways(make_checkpoint, tmp_path, key, none):
    base = make_checkpoint(tmp_path / "base", "llama")
    config(**{key: none})(base, tmp_path / "edited")
    assert getattr(loaded(tmp_path / "edited").config, key) is None
    assert convert(recipe(tmp_path / "edited", tmp_path / "out")).verified


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_a_window_in_quotes_is_named(make_checkpoint, tmp_path, key):
    """It was a TypeError."""
    base = make_checkpoint(tmp_path / "base", "llama")
    config(**{key: "4096"})(base, tmp_path / "edited")
    for read in (loaded, lambda path: convert(recipe(path, tmp_path / "out"))):
        with pytest.raises(UsageError, match=f"{key} in config.json is '4096', no number") as error:
            read(tmp_path / "edited")
        assert "quotes" in error.value.hint


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """What loading warns of."""
    said: list[str] = []
    monkeypatch.setattr(weights._LOG, "warning", lambda text, *of: said.append(text % of))
    weights._warn_untied.cache_clear()
    return said


def test_embeddings_that_are_tied_by_the_config_alone_are_told(make_checkpoint, tmp_path, warned):
    """transformers unties them and says so where nobody hears it."""
    config(tie_word_embeddings=True)(make_checkpoint(tmp_path / "base"), tmp_path / "tied")
    loaded(tmp_path / "base")
    assert not warned
    loaded(tmp_path / "tied")
    assert len(warned) == 1 and "input and output embeddings differ" in warned[0]


def test_convert_tells_of_embeddings_that_are_not_tied(make_checkpoint, tmp_path, warned):
    """It looks at names and shapes alone, and of these all was well."""
    base = make_checkpoint(tmp_path / "base", max_shard_size="20KB")
    config(tie_word_embeddings=True)(base, tmp_path / "tied")
    convert(recipe(tmp_path / "tied", tmp_path / "out"))
    assert len(warned) == 1 and "'tied': config.json says tie_word_embeddings" in warned[0]


def test_one_matrix_that_is_stored_twice_is_tied(made, tmp_path, warned):
    ends = {"lm_head.weight": "model.embed_tokens.weight"}
    tensors(lambda t: t.update({a: t[b].clone() for a, b in ends.items()}))(
        made.base, tmp_path / "twice"
    )
    convert(recipe(tmp_path / "twice", tmp_path / "out"))
    assert not warned
