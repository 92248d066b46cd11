"""Trainers and harnesses of others run SparseK, with their own defaults."""

from __future__ import annotations

import pytest
import torch

import sparsek_cli.models as models


@pytest.fixture
def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def settings(kind, tmp_path, **more):
    return kind(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
def test_trl_sft_with_lora_defaults(bf16, model, tokenizer_of, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    trainer = trl.SFTTrainer(
        model=model,
        args=settings(trl.SFTConfig, tmp_path, bf16=bf16, per_device_train_batch_size=2),
        train_dataset=Dataset.from_dict({"text": ["A boat and a house. " * 5] * 8}),
        processing_class=tokenizer_of,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    with models.counted_calls() as calls:
        trainer.train()
    assert calls.count >= 4 and trainer.state.log_history[-1]["train_loss"] > 0
    adapted = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapted and all(".lora_" in name for name in adapted)


@pytest.mark.parametrize("bf16", [False, True])
def test_trl_grpo(bf16, model, tokenizer_of, tmp_path):
    """Generates within autocast, then learns from it."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    trainer = trl.GRPOTrainer(
        model=model,
        args=settings(
            trl.GRPOConfig, tmp_path, bf16=bf16, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=8, learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["A boat and a house. "] * 8}),
        processing_class=tokenizer_of,
        reward_funcs=lambda completions, **_: [float(len(c) % 3) for c in completions],
    )  # fmt: skip
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with models.counted_calls() as calls:
        trainer.train()
    assert calls.count >= 2 * 2 * 8  # two steps, two layers, eight tokens each
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)


def test_liger_knows_the_types():
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    table = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    known = [family for family in models.FAMILIES if family in table]
    assert {"llama", "qwen3", "mistral", "gemma3_text"} <= set(known)
    assert all(table[f"sparsek_{family}"] is table[family] for family in known)


def test_lm_eval_s_own_model_runs_sparsely(folder):
    """By the name of ours: what `lm_eval --model hf` is, whose command line imports no package."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    harness = get_model("sparsek")(pretrained=str(folder), device="cpu", dtype="float32")
    request = Instance("loglikelihood", {}, ("A boat and a house and", " a garden"), 0)
    with models.counted_calls() as calls:
        ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    assert calls.count == 2 and score < 0
