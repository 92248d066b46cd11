"""What libraries know of a family by name, they know of its converted models."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch
from sparse_path import assert_sparse
from transformers import AutoModelForCausalLM

import sparsek_cli.models as models
from sparsek_cli.models.registration.after_import import after_import


def test_classes_are_found_by_name_in_transformers(family):
    row = models.FAMILIES[family]
    row.sparsek_config()  # classes follow their first config
    transformers = importlib.import_module("transformers")  # as `transformers serve` does
    for cls in (row.sparsek_config, row.sparsek_model, row.sparsek_causal_lm):
        assert getattr(transformers, cls.__name__) is cls


def test_tokenizer_tables_say_of_a_converted_type_what_they_say_of_the_base():
    from transformers.models.auto import tokenization_auto as auto

    names, wrong = auto.TOKENIZER_MAPPING_NAMES, auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for family, row in models.FAMILIES.items():
        row.sparsek_config()  # classes follow their first config
        assert names.get(row.sparsek_type) == names.get(family)
        assert (row.sparsek_type in wrong) == (family in wrong)
        found = auto.TOKENIZER_MAPPING.get(row.sparsek_config, None)
        assert found is auto.TOKENIZER_MAPPING.get(row.config, None)
    # A name that nobody has must still be looked for in every table without an error.
    assert auto.tokenizer_class_from_name("NobodysTokenizer") is None


def test_lm_eval_and_pipelines_take_it_for_a_causal_model(family):
    from lm_eval.models.huggingface import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as of_lm_eval
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    row = models.FAMILIES[family]
    assert row.sparsek_type in of_lm_eval
    assert MODEL_FOR_CAUSAL_LM_MAPPING[row.sparsek_config] is row.sparsek_causal_lm
    assert row.sparsek_causal_lm in MODEL_FOR_CAUSAL_LM_MAPPING.values()


def learned_prompts():
    """PEFT's methods that put tokens of theirs before each text."""
    from peft import CPTConfig, PromptEncoderConfig, PromptTuningConfig

    known = {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1] * 3}
    tokens = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    return (
        PromptTuningConfig(**tokens),
        PromptEncoderConfig(**tokens, encoder_hidden_size=8),
        CPTConfig(task_type="CAUSAL_LM", **known),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_learned_prompts_are_heard_in_generate_as_in_one_pass(family, sparse_model):
    """Written tokens stood as many places too early as the prompt has: another text."""
    from peft import get_peft_model

    ids = torch.randint(4, 128, (2, 14))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for config in learned_prompts():
        model = sparse_model(family)
        plain = model.generate(ids, **options)
        tuned = get_peft_model(model, config).eval()
        text = ids
        with torch.no_grad():
            for _ in range(8):
                logits = tuned(text, use_cache=False).logits
                text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(tuned.generate(input_ids=ids, **options), text)
        assert not torch.equal(text, plain)
        assert torch.equal(model.generate(ids, **options), plain)  # and by our own loop again


def test_prefix_tuning_is_refused_by_what_works(make_checkpoint, tmp_path):
    """The hint was to pass another cache, which PEFT makes itself; `generate` failed in PEFT."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    import sparsek_cli as sparsek
    from sparsek_cli.errors import SparsekError

    base, out = make_checkpoint(tmp_path / "base", "llama"), tmp_path / "out"
    sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    ids = torch.randint(4, 128, (1, 14))
    model = AutoModelForCausalLM.from_pretrained(out)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(model, prefix)
    for attempt in (
        lambda: tuned(ids, labels=ids),
        lambda: tuned.generate(input_ids=ids, max_new_tokens=2),
    ):
        with pytest.raises(SparsekError, match="which grows with the text") as refusal:
            attempt()
        for way in ("LoraConfig", "PromptTuningConfig", "finetune MODEL OUT --recipe lora --data"):
            assert way in refusal.value.hint
    # As the hint says.
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for config in (LoraConfig(task_type="CAUSAL_LM"), prompts):
        works = get_peft_model(AutoModelForCausalLM.from_pretrained(out), config)
        works(ids, labels=ids).loss.backward()
        learnt = [p.grad for p in works.parameters() if p.requires_grad]
        assert any(grad is not None and grad.abs().sum() for grad in learnt)
        assert works.generate(input_ids=ids, max_new_tokens=2, eos_token_id=None).shape == (1, 16)
    text = tmp_path / "text.txt"
    text.write_text("Who walks at night? A quiet man. " * 200)
    short = {"steps": 1, "sequence_length": 64, "batch_size": 1, "save_steps": 0, "warmup": 0}
    done = sparsek.finetune(out, tmp_path / "tuned", recipe="lora", data=text, **short)
    assert sparsek.load(done.out, device="cpu")


def test_peft_adapts_what_it_adapts_in_the_base(family, sparse_model, dense_model):
    from peft import IA3Config, LoraConfig, get_peft_model

    def adapted(model, config) -> set[str]:
        names = (name for name, p in get_peft_model(model, config).named_parameters())
        return {name for name in names if "lora_" in name or "ia3_" in name}

    methods = [LoraConfig(task_type="CAUSAL_LM")]
    if family not in ("mistral", "qwen2", "qwen3"):  # of these PEFT has no default for IA3
        methods.append(IA3Config(task_type="CAUSAL_LM"))
    for config in methods:
        of_base = adapted(dense_model(family), config)
        assert of_base and adapted(sparse_model(family), config) == of_base
    assert_sparse(get_peft_model(sparse_model(family), LoraConfig()))


@pytest.mark.slow
def test_peft_may_be_imported_later():
    code = """
import sys
import sparsek_cli.models
assert "peft" not in sys.modules
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
assert table["sparsek_gpt2"] == table["gpt2"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_liger_patches_by_type(monkeypatch, tmp_path):
    package = tmp_path / "fake_liger"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "patches.py").write_text("TABLE = {'llama': len, 'qwen3': max}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from sparsek_cli.models.registration.tables import _copy_entries

    seen: list[types.ModuleType] = []
    after_import(
        "fake_liger.patches", lambda module: (seen.append(module), _copy_entries(module.TABLE))
    )
    import fake_liger

    assert not seen
    import fake_liger.patches

    assert seen == [fake_liger.patches]
    assert fake_liger.patches.TABLE["sparsek_qwen3"] is max
    assert "sparsek_gpt2" not in fake_liger.patches.TABLE
    after_import("fake_liger.patches", seen.append)  # imported already: at once
    assert len(seen) == 2


def test_files_of_gpt_neox_name_its_head_as_the_base_does(sparse_model, dense_model, tmp_path):
    from safetensors import safe_open

    names = []
    for kind, model in (("sparse", sparse_model("gpt_neox")), ("dense", dense_model("gpt_neox"))):
        model.save_pretrained(tmp_path / kind)
        with safe_open(tmp_path / kind / "model.safetensors", "pt") as file:
            names.append({name for name in file.keys() if ".scorer." not in name})  # noqa: SIM118
    assert names[0] == names[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(again.get_output_embeddings().weight, model_head(tmp_path / "dense"))


def model_head(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_servers_read_tool_calls_as_of_the_base(family, sparse_model, dense_model):
    utils = pytest.importorskip("transformers.cli.serving.utils")
    of = [
        next((v for types, v in utils._RESPONSE_TEMPLATE_FALLBACKS.items() if kind in types), None)
        for kind in (family, f"sparsek_{family}")
    ]
    assert of[0] is not None and of[0] is of[1]


def test_a_server_reads_replies_by_a_template_that_fits_the_chat_template():
    """Any other would hand the prompt back as the reply: `tiny` is no Qwen in how it chats."""
    utils = pytest.importorskip("transformers.cli.serving.utils")
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="sparsek_qwen3"))
    qwen = types.SimpleNamespace(chat_template="{{ '<|im_start|>assistant\\n' }}")
    assert utils.get_response_template(qwen, model)["start_anchor"] == "<|im_start|>assistant\n"
    tiny = types.SimpleNamespace(chat_template="{{ '<|assistant|>' }}")
    assert utils.get_response_template(tiny, model) is None
    own = {"defaults": {"role": "assistant"}, "fields": {}}
    assert utils.get_response_template(types.SimpleNamespace(response_template=own), model) is own
    dense = types.SimpleNamespace(config=types.SimpleNamespace(model_type="qwen3"))
    assert utils.get_response_template(tiny, dense) is not None, "dense models are not ours"
