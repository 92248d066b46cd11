"""Saving and loading: a converted model is an ordinary transformers checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli.converted import SETTINGS
from sparsek_cli.errors import SparsekError, UsageError


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, 14))


@torch.no_grad()
def test_save_and_plain_load_give_the_same_logits(family, sparse_model, ids, tmp_path):
    model = sparse_model(family, topk=[2, 4], gate="log")
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.sparsek == model.config.sparsek
    assert again.config._attn_implementation == "sparsek"
    assert torch.equal(again(ids).logits, expected)
    assert again._no_split_modules == model._no_split_modules != []
    base = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(ids).last_hidden_state, model.base_model(ids)[0])
    # And once more from there: a save of a load is the same checkpoint.
    again.save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["model_type"] == f"sparsek_{family}"
    assert config["sparsek"]["topk"] == [2, 4] and config["sparsek"]["gate"] == "log"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (tmp_path / "second" / models.REMOTE_CODE_FILE).is_file()
    assert not list(tmp_path.glob("families.py"))


@pytest.mark.parametrize("key", [*SETTINGS, None])
def test_files_that_lack_settings_are_refused_whoever_loads_them(key, sparse_model, tmp_path):
    """Their defaults are another model's; `None`: the whole block."""
    model = sparse_model("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del (config["sparsek"] if key else config)[key or "sparsek"]
    file.write_text(json.dumps(config))
    kinds = type(model.config), type(model)
    loaders = [kind.from_pretrained for kind in (AutoConfig, AutoModelForCausalLM, *kinds)]
    for load in loaders:
        with pytest.raises(UsageError, match=f"lacks {key or 'topk, window'}"):
            load(tmp_path)
    with pytest.raises(UsageError, match="lacks"):
        kinds[0].from_json_file(file)
    with pytest.raises(UsageError, match=f"'{tmp_path.name}': .* (lacks|is it converted or not)"):
        sparsek.load(tmp_path)


def test_settings_named_beside_a_file_are_whole_and_checked(sparse_model, tmp_path):
    model = sparse_model("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="lacks topk, sinks"):
        AutoConfig.from_pretrained(tmp_path, sparsek={"window": 3})
    with pytest.raises(UsageError, match="window is 0"):
        AutoConfig.from_pretrained(tmp_path, sparsek={**model.config.sparsek, "window": 0})
    block = {**model.config.sparsek, "window": 3}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, sparsek=block)
    assert again.config.sparsek == block


def test_a_config_made_in_python_has_defaults_and_its_file_is_whole(family, tmp_path):
    made = models.FAMILIES[family].sparsek_config()
    assert made.sparsek == models.DEFAULTS
    made.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).sparsek == models.DEFAULTS


@torch.no_grad()
def test_tied_weights_are_saved_once(sparse_model, ids, tmp_path):
    model = sparse_model("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as shard:
        names = set(shard.keys())
    assert "lm_head.weight" not in names and "model.layers.1.self_attn.scorer.slopes" in names
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scorers_stay_float32(family, dtype, sparse_model, tmp_path):
    model = sparse_model(family)
    model.save_pretrained(tmp_path / "full")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=dtype)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == dtype
    for mine, theirs in zip(
        models.sparsek_attentions(model), models.sparsek_attentions(again), strict=True
    ):
        assert theirs.scorer.weight.dtype == torch.float32
        assert torch.equal(mine.scorer.weight, theirs.scorer.weight)
        assert torch.equal(mine.scorer.slopes, theirs.scorer.slopes)


def test_missing_scorers_are_initialised(dense_checkpoint, tmp_path):
    folder = dense_checkpoint("llama")
    config = models.sparsek_config_from(AutoConfig.from_pretrained(folder), {"topk": 3})
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)
    for attention in models.sparsek_attentions(model):
        weight = attention.scorer.weight
        assert torch.isfinite(weight).all() and 0.5 < weight.std() * 32**0.5 < 1.5
        assert (attention.scorer.bias == 0).all()
        assert torch.allclose(attention.scorer.slopes, torch.tensor(1e-3))


@pytest.mark.slow
def test_fresh_process_with_import(sparse_model, tokenizer, tmp_path, clean_program):
    sparse_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = clean_program(
        "import sparsek_cli.models\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model).__name__)"
    )
    assert done.returncode == 0 and done.stdout.strip() == "SparseKLlamaForCausalLM", done.stderr


def test_fresh_process_without_import(sparse_model, tokenizer, tmp_path, clean_program):
    """One process that never imports us: tokenizer, clear refusal, then trusted remote code."""
    sparse_model("qwen2").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = clean_program(
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path)!r}\n"
        "for kwargs in ({}, {'trust_remote_code': False}):\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)\n"
        "    assert tokenizer.decode(tokenizer('hello there')['input_ids']) == 'hello there'\n"
        "    assert tokenizer.chat_template\n"
        "assert not any(name.startswith('sparsek') for name in sys.modules)\n"
        "try:\n"
        "    AutoModelForCausalLM.from_pretrained(folder)\n"
        "except ValueError as error:\n"
        "    assert 'trust_remote_code=True' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('loaded without trust')\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(model).__module__ == 'sparsek_cli.models', type(model)\n"
        "model.save_pretrained(folder + '/again')\n"
        "import os\n"
        "print(sorted(name for name in os.listdir(folder + '/again') if name.endswith('.py')))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("['modeling_sparsek.py']"), done.stdout


def test_missing_package_says_so(sparse_model, tokenizer, tmp_path, clean_program):
    sparse_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = clean_program(
        "import sys\n"
        "sys.modules['sparsek_cli'] = None  # as if it were not installed\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path)!r}\n"
        "AutoTokenizer.from_pretrained(folder)\n"
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "needs the sparsek package" in last


def test_tokenizer_loads_here_too(family, sparse_model, dense_checkpoint, tmp_path):
    base = AutoTokenizer.from_pretrained(dense_checkpoint(family))
    sparse_model(family).save_pretrained(tmp_path / "out")
    base.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Ask, {and} it\n shall be given."
    assert again(text)["input_ids"] == base(text)["input_ids"]
    assert len(again) == len(base) and type(again) is type(base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": -1}, "topk is -1"),
        ({"topk": 2.5}, "not a whole number"),
        ({"topk": True}, "not a whole number"),
        ({"topk": [1]}, "1 entries for 2 layers"),
        ({"topk": [[1], 2]}, "topk of layer 0 has 1 entries for 2 KV heads"),
        ({"topk": [[1, -2], 2]}, "topk of layer 0 is -2"),
        ({"window": 0}, "window is 0"),
        ({"window": "many"}, "not a whole number"),
        ({"sinks": -1}, "sinks is -1"),
        ({"gate": "soft"}, "gate is 'soft'"),
        ({"scorer": {"type": "tree"}}, "scorer is"),
        ({"scorer": {"type": "linear", "width": 8}}, "scorer is"),
        ({"scorer": {"type": "mlp", "depth": 2}}, "scorer is"),
        ({"scorer": {"type": "mlp", "width": 0}}, "scorer.width is 0"),
        ({"topk": 10**12}, "topk is 1,000,000,000,000"),
        ({"topk": [3, [1, 10**12]]}, "topk of layer 1 is 1,000,000,000,000"),
        ({"window": 10**12}, "window is 1,000,000,000,000"),
        ({"sinks": 1 << 31}, "sinks is 2,147,483,648"),
        ({"scorer": {"type": "mlp", "width": 10**9}}, "scorer.width is 1,000,000,000"),
        ({"windows": 3}, "no key `windows`"),
    ],
)
def test_settings_are_checked(settings, message, dense_config):
    with pytest.raises(UsageError, match="^" + message.replace("[", "\\[") + "|" + message) as info:
        models.sparsek_config_from(dense_config("llama"), settings)
    assert info.value.hint


def test_never_evict_is_a_number_that_no_text_has(sparse_model, ids, tmp_path):
    """Checkpoints say so; what a cache of it takes is another question, asked where one is made."""
    model = sparse_model("llama", topk=10**9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).sparsek["topk"] == 10**9
    assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_slots_that_no_memory_holds_are_refused_before_they_are_allocated(dense_config):
    """The process was ended by the system, or said that memory was out."""
    config = models.sparsek_config_from(dense_config("llama"), {"window": 1 << 24})
    wide = [1 << 24] * config.num_key_value_heads
    config.sparsek["topk"], config.head_dim = [wide] * config.num_hidden_layers, 1 << 14
    with pytest.raises(UsageError, match="33,554,436 slots per KV head.*GiB of memory"):
        models.SparseKCache(config)
    assert models.SparseKCache(models.sparsek_config_from(dense_config("llama"), {}))


def test_slots_must_fit_into_one_memory_and_into_the_share_of_this_process(
    dense_config, tmp_path, monkeypatch
):
    """GPUs and host were added up, and a container's limit was not seen."""
    config = models.sparsek_config_from(dense_config("llama"), {"window": 1 << 17})
    needed = models.sparsek_cache_bytes(config, torch.float16)
    limit = tmp_path / "memory.max"
    gpu = SimpleNamespace(total_memory=needed - 1)
    monkeypatch.setattr("sparsek_cli.models.cache.bytes._LIMITS", (tmp_path / "none", limit))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for text in ("max\n", f"{needed}\n"):
        limit.write_text(text)
        assert models.SparseKCache(config)
    limit.write_text(f"{needed - 1}\n")
    with pytest.raises(UsageError, match="131,.* slots per KV head"):
        models.SparseKCache(config)
    gpu.total_memory = needed
    assert models.SparseKCache(config)


def test_config_keeps_the_base_and_sets_dropout_to_zero(family, dense_config):
    dropout = "attn_pdrop" if family == "gpt2" else "attention_dropout"
    base = dense_config(family, **{dropout: 0.1, "tie_word_embeddings": True})
    config = models.sparsek_config_from(base, {"topk": 7})
    mine, theirs = config.to_dict(), base.to_dict()
    changed = {key for key in theirs if mine.get(key) != theirs[key]}
    assert changed <= {"model_type", "architectures", dropout}, changed
    assert getattr(config, dropout) == 0.0
    assert config.sparsek == {**models.DEFAULTS, "topk": 7}
    assert models.family_of(config) is models.family_of(base) is models.FAMILIES[family]
    with pytest.raises(UsageError, match="converted already"):
        models.sparsek_config_from(config, {})


def test_unsupported_models_are_named(dense_config):
    with pytest.raises(UsageError, match="'t5'") as info:
        models.family_of(AutoConfig.for_model("t5"))
    assert all(name in info.value.hint for name in models.FAMILIES)
    with pytest.raises(UsageError, match="cross-attention"):
        models.sparsek_config_from(dense_config("gpt2", add_cross_attention=True), {})


def test_sliding_windows(dense_config):
    with pytest.raises(UsageError, match="sliding window of 64 tokens"):
        models.sparsek_config_from(dense_config("mistral", sliding_window=64), {})
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    mixed = models.sparsek_config_from(dense_config("qwen2", **sliding), {})
    assert mixed.sliding_window == 64 and models.sparse_layers(mixed) == (0,)
    idle = dense_config("mistral", sliding_window=4096)  # = max_position_embeddings
    assert models.sparsek_config_from(idle, {}).sliding_window is None
    idle = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
    config = models.sparsek_config_from(dense_config("qwen3", **idle), {})
    assert config.sliding_window is None and config.layer_types == ["full_attention"] * 2


def test_lora_with_trained_scorers(family, sparse_model, ids):
    from peft import LoraConfig, get_peft_model

    model = sparse_model(family)
    with torch.no_grad():
        expected = model(ids).logits
    lora = LoraConfig(
        r=2,
        target_modules=list(models.FAMILIES[family].lora_targets),
        modules_to_save=["scorer"],
        fan_in_fan_out=family == "gpt2",
    )
    wrapped = get_peft_model(model, lora)
    trainable = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert any("lora_A" in name for name in trainable)
    assert any("scorer" in name for name in trainable)
    assert not any("mlp" in name for name in trainable)
    assert torch.allclose(wrapped(ids).logits, expected, atol=1e-5)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: w.grad for n, w in wrapped.named_parameters() if "scorer.modules_to_save" in n}
    assert any(g is not None and g.abs().max() > 0 for g in gradients.values())
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(model)
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)


def test_models_without_scorers_are_refused(dense_model):
    with pytest.raises(SparsekError, match="no SparseK attention"):
        models.set_budget(dense_model("llama"), topk=3)
