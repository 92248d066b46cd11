"""Tiny random configs of every family, by config fields; what all of them share is `tiny_config`.

One line per family: a family is added by a row of `sparsek_cli.families.TABLE` and a line here.
"""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 128

_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_CAPPED = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
           "linear_value_head_dim": 8}  # fmt: skip

# By family, what differs from `_SHARED`; None leaves a shared field to the family's own default.
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None},
    "gpt2": _GPT2,
    "gpt_bigcode": {**_GPT2, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "num_key_value_heads": None},
    "gemma": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.5},
    "starcoder2": {"residual_dropout": 0.0},
    "stablelm": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.0},
    "ministral3": {"head_dim": 8},
    "apertus": {},
    "arcee": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "jais2": {},
    "hyperclovax": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "internlm3": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "iquestcoder": {"head_dim": 8},
    "nanochat": {},
    "bitnet": {},
    "persimmon": {"num_key_value_heads": None},
    "biogpt": {"num_key_value_heads": None, "hidden_dropout_prob": 0.0},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **_ROUTED},
    "qwen3_moe": {"num_experts": 4, **_ROUTED},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8, **_ROUTED},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
                     "moe_layer_start_index": 1},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                   "rotary_dim": 4},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **_SLIDING},
    "gemma3n_text": {"head_dim": 8, "hidden_size_per_layer_input": 4, "laurel_rank": 4,
                     "vocab_size_per_layer_input": VOCAB_SIZE, "num_kv_shared_layers": 0,
                     **_SLIDING},
    "gemma4_text": {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 4,
                    "vocab_size_per_layer_input": VOCAB_SIZE, **_SLIDING},
    "gemma4_unified_text": {"head_dim": 8, "global_head_dim": 8, **_SLIDING},
    "gemma2": {"head_dim": 8, **_CAPPED, **_SLIDING},
    "vaultgemma": {"head_dim": 8, **_CAPPED, **_SLIDING},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING},
    "olmo3": _SLIDING,
    "cohere2": {"head_dim": 8, "logit_scale": 0.5, **_SLIDING},
    "exaone4": _SLIDING,
    "cwm": {"head_dim": 8, **_SLIDING},
    "ministral": {"head_dim": 8, **_SLIDING},
    "qwen3_next": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                   "num_experts": 4, "shared_expert_intermediate_size": 16, **_ROUTED, **_LINEAR},
    "qwen3_5_text": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                     **_LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
              "mamba_dt_rank": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 16,
                         "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
                         "mamba_n_groups": 1, "logits_scaling": 4.0},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8,
                   "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
                  "mamba_n_groups": 1, "lm_head_multiplier": 0.5},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "solar_open": {"n_routed_experts": 4, "head_dim": 8, **_ROUTED},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {"head_dim": 8, "num_experts": 4, **_ROUTED},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "granite_swa": {"logits_scaling": 4.0, **_SLIDING},
    "granitemoe_swa": {"num_local_experts": 4, "num_experts_per_tok": 2, **_SLIDING},
    "exaone_moe": {"head_dim": 8, "num_experts": 4, **_ROUTED, **_SLIDING},
    "cohere2_moe": {"head_dim": 8, "num_experts": 4, **_ROUTED, **_SLIDING},
    "afmoe": {"head_dim": 8, "num_experts": 4, "num_dense_layers": 1, **_ROUTED, **_SLIDING},
    "laguna": {"head_dim": 8, "num_experts": 4, "num_attention_heads_per_layer": [8, 4],
               **_ROUTED, **_SLIDING},
    "mellum": {"head_dim": 8, "num_experts": 4, **_ROUTED, **_SLIDING},
    "flint": {"head_dim": 8, "num_experts": 4, **_ROUTED, **_SLIDING},
    "kolibri1": {"head_dim": 8, "num_experts": 4, **_ROUTED, **_SLIDING},
    "beam": {"head_dim": 8, "num_experts": 4, **_ROUTED, **_SLIDING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_experts": 4,
                 "num_dense_layers": 1, **_ROUTED},
    "lfm3": {"head_dim": 8, "layer_types": ["conv", "full_attention"]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"], **_LINEAR},
    "qwen3_5_moe_text": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                         "num_experts": 4, "shared_expert_intermediate_size": 16, **_ROUTED,
                         **_LINEAR},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **_ROUTED},
}  # fmt: skip

# By family and a word: what its models may be beyond the lines above, by config fields.
VARIANTS: dict[str, dict[str, Any]] = {
    # As the dense and the routed ones: heads of their own number and width, values that are keys.
    "gemma4_text-routed": {
        "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 16},
    "gemma3n_text-shared": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "altup_active_idx": 1,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "intermediate_size": [48, 32, 48, 32], "layer_types": 2 * _SLIDING["layer_types"]},
    "gemma4_unified_text-shared": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": 2 * _SLIDING["layer_types"]},
    # As the small ones: the last layers of both kinds read what earlier ones store.
    "gemma4_text-shared": {
        "global_head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True, "layer_types": 2 * _SLIDING["layer_types"]},
}  # fmt: skip
# All that the families' tests go through.
KINDS = (*TINY, *VARIANTS)

_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large enough for peaked attention, so that errors show
}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def family_name(kind: str) -> str:
    """The family of one of `KINDS`."""
    return kind.partition("-")[0]


def tiny_config(family: str, **overrides: Any):
    """The dense config of a tiny model: 2 layers, 4 query heads of 8, 2 KV heads where it can.

    Args:
        family: one of `KINDS`.
        overrides: config fields by the family's own names, e.g. `num_hidden_layers=3`.
    """
    from transformers import AutoConfig

    overrides = VARIANTS.get(family, {}) | overrides
    family = family_name(family)
    own = TINY[family]
    sizes = {} if "n_embd" in own else _SIZES
    fields = {**_SHARED, **sizes, **own}
    if own.get("num_key_value_heads", 0) is None:
        del fields["num_key_value_heads"]
    return AutoConfig.for_model(family, **{**fields, **overrides})
