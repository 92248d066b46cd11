"""How well-known models publish their positions: each file is taken, and means what it says.

Only sizes are tiny; keys, their places and their old names are those of the models' own files.
"""

from __future__ import annotations

import json

import pytest
from tiny_families import tiny_config

from sparsek_cli.conversion.geometry import geometry
from sparsek_cli.families import TABLE
from sparsek_cli.families.own_config import own_config
from sparsek_cli.families.positions import rope_type
from sparsek_cli.model_folder.config_file import check_config

AT = "original_max_position_embeddings"
QWEN_YARN = {"factor": 4.0, AT: 32768}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, AT: 8192}
FACTORS = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
MSCALES = {"long_mscale": 1.243163121016122, "short_mscale": 1.243163121016122}
OLMO = {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
        "factor": 8.0, AT: 8192, "rope_type": "yarn"}  # fmt: skip
OSS = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, AT: 4096, "truncate": False}
HUNYUAN = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
           "mscale_all_dim": 1.0, "type": "dynamic"}  # fmt: skip
LONG = {AT: 4096, "max_position_embeddings": 131072, "rope_theta": 1e4, "sliding_window": 262144}
SLIDE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
LOCAL = {"rope_local_base_freq": 10000, "rope_theta": 1000000}


# By model: its family, what its file says, and of full attention the base, the way, and the
# longest text that it is made for where that is not 4096.
PUBLISHED = {
    "Llama 1": ("llama", {"max_sequence_length": 2048}, 1e4, "default"),
    "Llama 2": ("llama", {"rope_scaling": None, "pretraining_tp": 1}, 1e4, "default"),
    "Vicuna 16k": ("llama", {"rope_scaling": {"factor": 4.0, "type": "linear"}}, 1e4, "linear"),
    "Yarn-Llama-2-64k": (
        "llama",
        {"max_position_embeddings": 65536,
         "rope_scaling": {"factor": 16.0, AT: 4096, "type": "yarn", "finetuned": True}},
        1e4, "yarn", 65536,
    ),
    "DeepSeek-Coder": (
        "llama", {"rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        1e5, "linear",
    ),
    "Llama 3.1": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, 5e5, "llama3",
    ),
    "Qwen2.5 with its card's YaRN": (
        "qwen2",
        {"max_position_embeddings": 32768, "rope_theta": 1e6, "use_sliding_window": False,
         "sliding_window": 131072, "rope_scaling": QWEN_YARN | {"type": "yarn"}},
        1e6, "yarn", 131072,
    ),
    "Qwen3 with its card's YaRN": (
        "qwen3",
        {"max_position_embeddings": 40960, "rope_theta": 1000000,
         "rope_scaling": QWEN_YARN | {"rope_type": "yarn"}},
        1e6, "yarn", 131072,
    ),
    "Qwen3 of transformers 5 with YaRN": (
        "qwen3", {"rope_parameters": QWEN_YARN | {"rope_type": "yarn", "rope_theta": 1000000}},
        1e6, "yarn", 131072,
    ),
    "Phi-3-mini-128k": (
        "phi3", LONG | {"rope_scaling": FACTORS | {"type": "longrope"}}, 1e4, "longrope", 131072,
    ),
    "Phi-4": (
        "phi3",
        {AT: 16384, "max_position_embeddings": 16384, "rope_scaling": None, "rope_theta": 250000},
        250000, "default", 16384,
    ),
    "Phi-3.5-MoE": (
        "phimoe", LONG | {"rope_scaling": {**FACTORS, **MSCALES, AT: 4096, "type": "longrope"}},
        1e4, "longrope", 131072,
    ),
    "Gemma 3 1B": (
        "gemma3_text", SLIDE | LOCAL | {"rope_scaling": None}, 1e6, "default",
    ),
    "Gemma 3 4B": (
        "gemma3_text", SLIDE | LOCAL | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        1e6, "linear",
    ),
    "Olmo 3": (
        "olmo3", SLIDE | {"max_position_embeddings": 65536, "rope_theta": 500000,
                          "rope_scaling": OLMO}, 5e5, "yarn", 65536,
    ),
    "gpt-oss": (
        "gpt_oss", SLIDE | {"max_position_embeddings": 131072, "rope_theta": 150000,
                            "initial_context_length": 4096,
                            "rope_scaling": OSS | {"rope_type": "yarn"}}, 150000, "yarn", 131072,
    ),
    "Pythia": ("gpt_neox", {"rotary_emb_base": 10000, "rotary_pct": 0.25}, 1e4, "default"),
    "Pythia, saved by transformers 4.57": (
        "gpt_neox",
        {"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_theta": 10000,
         "partial_rotary_factor": 0.25, "rope_scaling": None}, 1e4, "default",
    ),
    "StableLM": (
        "stablelm",
        {"rope_theta": 10000, "rope_pct": 0.25, "partial_rotary_factor": 0.25,
         "rotary_scaling_factor": 1.0}, 1e4, "default",
    ),
    "InternLM3": (
        "internlm3",
        {"rope_theta": 50000000, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}},
        5e7, "dynamic",
    ),
    "Hunyuan": (
        "hunyuan_v1_dense", {"rope_theta": 1e4, "rope_scaling": HUNYUAN}, 1e4, "dynamic",
    ),
    "Seed-OSS": (
        "seed_oss", {"rope_theta": 1e7, "rope_scaling": {"rope_type": "default"}}, 1e7, "default",
    ),
    "Nemotron-H, without rotary positions": (
        "nemotron_h", {"rope_theta": 10000, "partial_rotary_factor": 1.0}, None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_models_publish_is_taken_as_it_is_said(model):
    family, keys, theta, way, *longest = PUBLISHED[model]
    config = json.loads(tiny_config(family).to_json_string())
    for key in ("rope_parameters", AT):
        config.pop(key, None)
    config |= keys
    check_config(config, model)
    assert geometry(config, TABLE[family]).context == (longest or [4096])[0]
    rope = getattr(own_config(TABLE[family], config), "rope_parameters", None)
    block = None if rope is None else rope.get("full_attention", rope)
    assert (block and block["rope_theta"]) == theta
    assert rope_type(block) == way
    if AT in keys and way == "longrope":
        assert block[AT] == keys[AT]
