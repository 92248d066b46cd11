"""What random configs are made of: settings, sizes and the SparseK block (random_configs.py)."""

from __future__ import annotations

import random
from typing import Any

# Fields that many families have, and what they may be.
CHOICES: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "attention_k_eq_v": [True, False],
    "attention_dropout": [0.0, 0.1],
    "attention_multiplier": [0.1, 0.5],
    "bias": [True, False],
    "hidden_act": ["silu", "gelu", "relu"],
    "hidden_dropout": [0.0, 0.1],
    "layer_norm_eps": [1e-5, 1e-3],
    "logit_scale": [0.1, 2.0],
    "multi_query": [True, False],
    "logits_scaling": [0.5, 4.0],
    "mlp_bias": [True, False],
    "num_key_value_heads": [1, 2, 4],
    "parallel_attn": [True, False],
    "partial_rotary_factor": [0.25, 0.5, 1.0],
    "qk_layernorm": [True, False],
    "residual_multiplier": [0.3, 1.0],
    "rms_norm_eps": [1e-6, 1e-3],
    "rotary_pct": [0.25, 0.5, 1.0],
    "scale_attn_by_inverse_layer_idx": [True, False],
    "scale_attn_weights": [True, False],
    "sliding_window": [None, 5, 4096],
    "tie_word_embeddings": [True, False],
    "use_bias": [True, False],
    "use_cache": [True, False],
    "use_parallel_residual": [True, False],
    "use_qk_norm": [True, False],
    "use_qkv_bias": [True, False],
    "attn_logit_softcapping": [None, 30.0],
    "final_logit_softcapping": [None, 30.0],
    "embedding_multiplier": [0.5, 1.0],
    "use_sliding_window": [True, False],
    "no_rope_layers": [[1, 0], [0, 1], [1, 1]],
    "query_pre_attn_scalar": [4, 16],
}
# Numbers of experts, and of those that a token takes, at most.
EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
}
# Keys that some families have; in the files of others no model looks at them.
STRAY: dict[str, list[Any]] = {
    "final_logit_softcapping": [2.0],
    "is_causal": [False, True],
    "layer_types": [["full_attention", "full_attention"], ["sliding_attention", "full_attention"]],
    "lm_head_multiplier": [3.0],
    "logit_scale": [3.0],
    "logits_scaling": [3.0],
    "sliding_window": [5],
    "use_sliding_window": [False, True],
}
# Of a head; a quarter or half of some is an odd number of features, which is refused.
WIDTHS = [4, 6, 8, 10, 12, 16, 20, 24, 32]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
     "original_max_position_embeddings": 2048},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 2048},
]  # fmt: skip


def draw(rng: random.Random, family: str) -> dict[str, Any]:
    """Settings of one config: those of the tiny one, some of them otherwise."""
    from tiny_families import TINY, tiny_config

    plain = tiny_config(family).to_dict()
    own = TINY[family]
    settings: dict[str, Any] = {}
    for key, values in CHOICES.items():
        if key in plain and rng.random() < 0.4:
            settings[key] = rng.choice(values)
    if own.get("num_key_value_heads", 0) is None or "n_embd" in own:
        settings.pop("num_key_value_heads", None)
    if plain.get("rope_parameters") and "layer_types" not in own and rng.random() < 0.5:
        rope = dict(rng.choice(ROPES))
        kept = plain["rope_parameters"].get("partial_rotary_factor")
        settings["rope_parameters"] = rope | (
            {} if kept is None else {"partial_rotary_factor": kept}
        )
    if "layer_types" not in own and "layers_block_type" not in own and rng.random() < 0.3:
        settings["n_layer" if "n_layer" in own else "num_hidden_layers"] = rng.choice([1, 3])
        settings.pop("no_rope_layers", None)
    return settings


def shape(rng: random.Random, family: str) -> dict[str, Any]:
    """Sizes of one config, which go over `draw`'s settings; those left out are the tiny one's."""
    from tiny_families import TINY, tiny_config

    plain, own = tiny_config(family), TINY[family]
    settings: dict[str, Any] = {}
    if rng.random() < 0.7:
        settings |= _heads(rng, own)
    for key, most in EXPERTS.items():
        if key in own and rng.random() < 0.6:
            settings[key] = rng.randint(2 if most > 2 else 1, most)
    if (types := own.get("layer_types")) and rng.random() < 0.6:
        others = [kind for kind in types if kind not in ("full_attention", "attention")]
        full = next(kind for kind in types if kind not in others)
        kinds = [full, *(rng.choice([full, *others]) for _ in range(rng.randint(1, 3)))]
        rng.shuffle(kinds)
        settings |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
        if hasattr(plain, "num_kv_shared_layers"):
            settings["num_kv_shared_layers"] = _shared(rng, kinds)
    if own.get("sliding_window"):  # without one transformers refuses layers that slide
        settings["sliding_window"] = rng.choice([2, 6, 100])
    if hasattr(plain, "intermediate_size") and rng.random() < 0.3:
        settings["intermediate_size"] = rng.choice([32, 40, 64])
    rope = getattr(plain, "rope_parameters", None)
    if types and rope and rng.random() < 0.4:
        other = dict(rng.choice(ROPES))
        if "full_attention" in rope:  # a block for each kind of layer
            settings["rope_parameters"] = {**rope, "full_attention": other}
        elif "rope_type" in rope:
            kept = rope.get("partial_rotary_factor")
            settings["rope_parameters"] = other | (
                {} if kept is None else {"partial_rotary_factor": kept}
            )
    return settings


def _shared(rng: random.Random, kinds: list[str]) -> int:
    """How many of the last layers read keys of earlier ones, which there are of each kind."""
    may = [n for n in range(len(kinds)) if set(kinds[len(kinds) - n :]) <= set(kinds[: -n or None])]
    return rng.choice(may)


def stray(rng: random.Random, family: str) -> dict[str, Any]:
    """Keys that the family does not have, in one config of five."""
    from tiny_families import tiny_config

    own = tiny_config(family).to_dict()
    others = [key for key in STRAY if key not in own]
    if not others or rng.random() < 0.8:
        return {}
    return {key: rng.choice(STRAY[key]) for key in rng.sample(others, min(2, len(others)))}


def _heads(rng: random.Random, own: dict[str, Any]) -> dict[str, Any]:
    """Heads, KV heads and their width; states need the tiny hidden size, whose parts fit."""
    heads, width = rng.choice([2, 4, 6, 8]), rng.choice(WIDTHS)
    kv = {"num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0])}
    if own.get("num_key_value_heads", 0) is None or "n_embd" in own:
        kv = {}
    if "n_embd" in own:
        return {"n_head": heads, "n_embd": heads * width}
    if "word_embed_proj_dim" in own:
        hidden = heads * width
        return {"num_attention_heads": heads, "hidden_size": hidden, "word_embed_proj_dim": hidden}
    settings = {"num_attention_heads": heads, **kv}
    if "global_head_dim" in own:  # of some layers, and their KV heads where values are keys
        few = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
        settings |= {"global_head_dim": rng.choice(WIDTHS), "num_global_key_value_heads": few}
    if "head_dim" in own:
        return {**settings, "head_dim": width, "hidden_size": heads * 8}
    if own.get("layer_types", ["full_attention"])[0] in ("full_attention", "sliding_attention"):
        return {**settings, "hidden_size": heads * width}
    heads = rng.choice([2, 4, 8])
    return {"num_attention_heads": heads, "num_key_value_heads": rng.choice([1, 2])}


def sparsek_block(rng: random.Random, heads: int, layers: int, sparse: tuple[int, ...]) -> dict:
    """Slots that drop most of the text: one size, or one for each layer and head."""
    topk: Any = rng.randint(1, 6)
    if rng.random() < 0.3:
        rows = [[rng.randint(0, 6) for _ in range(heads)] for _ in range(layers)]
        topk = [row if i in sparse else None for i, row in enumerate(rows)]
    scorer = rng.choice([{"type": "linear"}, {"type": "mlp", "width": 4}])
    return {
        "topk": topk,
        "window": rng.randint(1, 6),
        "sinks": rng.randint(0, 2),
        "gate": rng.choice(["straight_through", "straight_through", "log", "kv"]),
        "scorer": scorer,
    }
