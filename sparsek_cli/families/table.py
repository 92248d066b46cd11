"""The table of families. A family is one row here, and one parameter of the tests.

Rows name what transformers calls things; code per family there is none. tests/families holds
every row to the same behaviour: dense where nothing is dropped, decoding as prefill, padding,
saving, gradients, calibration and conversion.
"""

from __future__ import annotations

from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families import installed
from sparsek_cli.families.refusals import REFUSED
from sparsek_cli.families.row import Row

_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

_LFM2: dict[str, Any] = {
    "projections": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "norm": "embedding_norm",
    "dropout": None,
}

_BY_TYPE: dict[str, Any] = {"mixed": True, "rope_by_type": True}
_SHARING: dict[str, Any] = {"text": "Text", "attends": "Text", "by_layer": True, **_BY_TYPE}

_ROWS: dict[str, Row] = {
    row.model_type: row
    for row in (
        Row("llama", "Llama", plain_sizes=True),
        Row("mistral", "Mistral", window=4096),
        Row("qwen2", "Qwen2"),
        Row("qwen3", "Qwen3"),
        Row(
            "gpt_neox",
            "GPTNeoX",
            base="gpt_neox",
            attention="attention",
            projections=("query_key_value", "dense"),
            norm="final_layer_norm",
            plain_sizes=True,
            lora_targets=("query_key_value", "attention.dense"),
            keys={"rope_theta": "rotary_emb_base"},
        ),
        Row(
            "gpt2",
            "GPT2",
            plain_sizes=True,
            head="LMHeadModel",
            base="transformer",
            layers="h",
            attention="attn",
            projections=("c_attn", "c_proj"),
            norm="ln_f",
            lora_targets=("attn.c_attn", "attn.c_proj"),
            dropout="attn_pdrop",
            keys=_GPT2_KEYS,
        ),
        Row(
            "gpt_bigcode",
            "GPTBigCode",
            base="transformer",
            layers="h",
            attention="attn",
            projections=("c_attn", "c_proj"),
            norm="ln_f",
            lora_targets=("attn.c_attn", "attn.c_proj"),
            dropout="attn_pdrop",
            keys=_GPT2_KEYS,
        ),
        Row(
            "opt",
            "OPT",
            plain_sizes=True,
            layers="decoder.layers",
            decoder="OPTDecoder",
            projections=("q_proj", "k_proj", "v_proj", "out_proj"),
            norm="decoder.final_layer_norm",
        ),
        Row("gemma", "Gemma"),
        Row(
            "phi",
            "Phi",
            projections=("q_proj", "k_proj", "v_proj", "dense"),
            norm="final_layernorm",
        ),
        Row("phi3", "Phi3", projections=("qkv_proj", "o_proj")),
        Row("olmo", "Olmo"),
        Row("olmo2", "Olmo2", joint_norm=True),
        Row("smollm3", "SmolLM3"),
        Row("granite", "Granite"),
        Row("cohere", "Cohere", joint_norm=True),
        Row("starcoder2", "Starcoder2"),
        Row("stablelm", "StableLm", joint_norm=True, drops_arguments=True),
        Row("glm", "Glm"),
        Row("glm4", "Glm4"),
        Row("ernie4_5", "Ernie4_5", dropout=None),
        Row("nemotron", "Nemotron", drops_arguments=True),
        Row("hunyuan_v1_dense", "HunYuanDenseV1"),
        Row("seed_oss", "SeedOss"),
        Row("ministral3", "Ministral3"),
        Row("apertus", "Apertus"),
        Row("arcee", "Arcee"),
        Row("helium", "Helium"),
        Row("jais2", "Jais2"),
        Row("hyperclovax", "HyperCLOVAX", logit_factors=("logits_scaling",)),
        Row("internlm3", "InternLM3", run_by="llama"),
        Row("iquestcoder", "IQuestCoder", run_by="llama"),
        Row("nanochat", "NanoChat"),
        Row("bitnet", "BitNet", joint_norm=True),
        Row(
            "persimmon",
            "Persimmon",
            projections=("query_key_value", "dense"),
            norm="final_layernorm",
        ),
        Row(
            "biogpt",
            "BioGpt",
            base="biogpt",
            projections=("q_proj", "k_proj", "v_proj", "out_proj"),
            norm="layer_norm",
            dropout="attention_probs_dropout_prob",
        ),
        # Mixtures of experts: only the feed-forward blocks differ.
        Row("mixtral", "Mixtral"),
        Row("qwen2_moe", "Qwen2Moe"),
        Row("qwen3_moe", "Qwen3Moe"),
        Row("olmoe", "Olmoe", joint_norm=True),
        Row("granitemoe", "GraniteMoe"),
        Row("granitemoeshared", "GraniteMoeShared"),
        Row("phimoe", "Phimoe"),
        Row("glm4_moe", "Glm4Moe"),
        Row("ernie4_5_moe", "Ernie4_5_Moe", dropout=None),
        Row("minimax_m2", "MiniMaxM2", joint_norm=True),
        Row("dots1", "Dots1"),
        Row("flex_olmo", "FlexOlmo", joint_norm=True),
        Row("solar_open", "SolarOpen"),
        Row("hunyuan_v1_moe", "HunYuanMoEV1"),
        Row("hy_v3", "HYV3"),
        Row("aria_text", "AriaText", module="aria"),
        # Layers differ: those that attend to everything are converted, the others stay.
        Row("gemma3_text", "Gemma3", module="gemma3", text="Text", **_BY_TYPE),
        Row("gemma3n_text", "Gemma3n", module="gemma3n", streams="altup_active_idx", **_SHARING),
        Row("gemma4_text", "Gemma4", module="gemma4", **_SHARING),
        Row("gemma4_unified_text", "Gemma4Unified", module="gemma4_unified", **_SHARING),
        Row("gemma2", "Gemma2", mixed=True),
        Row("vaultgemma", "VaultGemma", mixed=True),
        Row("gpt_oss", "GptOss", mixed=True),
        Row("olmo3", "Olmo3", joint_norm=True, **_BY_TYPE),
        Row("cohere2", "Cohere2", mixed=True),
        Row("exaone4", "Exaone4", mixed=True),
        Row("ministral", "Ministral", mixed=True),
        Row("cwm", "Cwm", mixed=True),
        Row("granite_swa", "GraniteSWA", mixed=True),
        Row("granitemoe_swa", "GraniteMoeSWA", mixed=True),
        Row("exaone_moe", "ExaoneMoe", mixed=True),
        Row("cohere2_moe", "Cohere2Moe", mixed=True),
        Row("afmoe", "Afmoe", joint_norm=True, mixed=True),
        Row("laguna", "Laguna", joint_norm=True, **_BY_TYPE),
        Row("mellum", "Mellum", **_BY_TYPE),
        Row("flint", "Flint", mixed=True),
        Row("kolibri1", "Kolibri1", mixed=True),
        Row("beam", "Beam", joint_norm=True, **_BY_TYPE),
        Row("qwen3_next", "Qwen3Next", mixed=True),
        Row("qwen3_5_text", "Qwen3_5", module="qwen3_5", text="Text", mixed=True),
        Row("lfm2", "Lfm2", **_LFM2, mixed=True),
        Row("lfm2_moe", "Lfm2Moe", **_LFM2, mixed=True),
        Row("lfm3", "Lfm3", norm="embedding_norm", joint_norm=True, **_BY_TYPE),
        Row("olmo_hybrid", "OlmoHybrid", joint_norm=True, mixed=True),
        Row("qwen3_5_moe_text", "Qwen3_5Moe", module="qwen3_5_moe", text="Text", mixed=True),
        Row("jamba", "Jamba", norm="final_layernorm", mixed=True, reads_once=True),
        Row("granitemoehybrid", "GraniteMoeHybrid", mixed=True),
        Row(
            "nemotron_h",
            "NemotronH",
            stored="backbone",
            attention="mixer",
            norm="norm_f",
            mixed=True,
        ),
        Row("falcon_h1", "FalconH1", norm="final_layernorm", mixed=True),
    )
}

# Without those that the installed transformers is too old for.
TABLE: dict[str, Row] = {name: row for name, row in _ROWS.items() if installed.has(row.module)}


def check_supported(model_type: str) -> None:
    """Says why a family cannot be converted, where that is known.

    Raises:
        UsageError: the reason, one sentence.
    """
    if model_type in REFUSED:
        raise UsageError(
            f"models of type {model_type!r} cannot be converted: {REFUSED[model_type]}",
            hint="docs/families.md lists those that can",
        )
    name = model_type.removeprefix("sparsek_")
    if name in _ROWS and name not in TABLE:
        raise UsageError(
            f"transformers {installed.transformers_version()} has no models of type {name!r}",
            hint="a newer one has: pip install -U transformers",
        )


def row_of(config: Any) -> Row:
    """The row of a dense or converted config, or of a `model_type`.

    Raises:
        UsageError: the family is not supported; names those that are.
    """
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    check_supported(str(model_type))
    row = TABLE.get(str(model_type).removeprefix("sparsek_"))
    if row is None:
        raise UsageError(
            f"models of type {model_type!r} are not supported",
            hint=f"supported families: {', '.join(TABLE)}",
        )
    return row
