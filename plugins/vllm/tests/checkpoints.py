"""Random checkpoints whose answers depend on what the cache forgot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TOPK = [[20, 4], 9, [0, 31]]  # per head, and of another sum in each layer
# Four heads that two ranks share: 0 and 3, 1 and 2 in the first layer, which is not their order.
TOPK_OF_FOUR = [[20, 18, 4, 2], 9, [0, 31, 8, 8]]
WINDOW, SINKS = 12, 2
LONG = WINDOW + SINKS + 30  # tokens that no layer holds all of, in all of its heads
NEW = 12  # tokens to write
VOCABULARY = 256
LENGTH = 512
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_HIDDEN = {"head_dim": None}  # vLLM knows none there: heads share the hidden size
# What a family names otherwise, or must not leave to its own default; None: not named at all.
OWN: dict[str, dict[str, Any]] = {
    "qwen2": _SHARED_HIDDEN,
    "granite": {**_SHARED_HIDDEN, "attention_multiplier": 0.3, "logits_scaling": 4.0},
    "phi3": _SHARED_HIDDEN,
    "gpt_neox": {**_SHARED_HIDDEN, "num_key_value_heads": None},
    "phi": _SHARED_HIDDEN,
    "olmo": _SHARED_HIDDEN,
    "olmo2": _SHARED_HIDDEN,
    "starcoder2": _SHARED_HIDDEN,
    "smollm3": _SHARED_HIDDEN,
    "stablelm": _SHARED_HIDDEN,
    "cohere": {**_SHARED_HIDDEN, "logit_scale": 0.5},
    "apertus": _SHARED_HIDDEN,
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_SHARED_HIDDEN, **_ROUTED, "shared_expert_intermediate_size": 32},
    "qwen3_moe": _ROUTED,
    "olmoe": {**_SHARED_HIDDEN, **_ROUTED, "moe_intermediate_size": None},
    "granitemoe": {**_SHARED_HIDDEN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {
        **_SHARED_HIDDEN, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {
        **_SHARED_HIDDEN, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
        "moe_layer_start_index": 1,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
}  # fmt: skip


def save_checkpoint(
    folder: Path,
    family: str,
    *,
    settings: dict[str, Any] | None = None,
    head_dim: int | None = None,
    kv_heads: int = 2,
) -> Path:
    """A converted model of `family` with random weights, scorers that matter, and uneven heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import sparsek_cli.models as models

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": len(TOPK),
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    sizes |= OWN.get(family, {}) | ({"head_dim": head_dim} if head_dim else {})
    named = {
        name: size for name, size in sizes.items() if size is not None or name == "sliding_window"
    }
    dense = AutoConfig.for_model(family, **named)
    topk = TOPK if kv_heads == 2 else TOPK_OF_FOUR
    scorer = {"type": "linear", "stand_ins": 1}
    block = {"topk": topk, "window": WINDOW, "sinks": SINKS, "scorer": scorer, **(settings or {})}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models.sparsek_config_from(dense, block))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scorer.slopes"):
                parameter.copy_(torch.tensor([0.0, 0.02]).repeat(kv_heads // 2))
            elif name.endswith("scorer.stand_ins"):
                parameter.normal_()  # a share of what is seen that neither vanishes nor rules
                parameter[..., -2:] = torch.tensor([0.0, 2.5])
            elif name.endswith(".bias"):
                parameter.normal_(std=0.2)
            elif "proj" in name or "lm_head" in name or "embed" in name:
                # Sharp attention and sharp answers: a forgotten key must change the text.
                parameter.normal_(std=0.35)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer():
    """Byte-level, of `VOCABULARY` ids; built in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def prompts(count: int, *, longest: int, shortest: int = 5) -> list[list[int]]:
    """Random token ids of random lengths; the same each time."""
    new = torch.Generator().manual_seed(count)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=new).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=new).tolist() for n in lengths]
